"""SigLIP: each film and text are told apart as a pair or no pair, by a sigmoid loss (Zhai et al. 2023, arXiv 2303.15343).

B studies on this rank, G studies on all ranks, C of their texts, D embedding.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cmcgns import distributed
from cmcgns.data.batch import ImageReportBatch
from cmcgns.distributed import all_gather, all_gather_with_grad
from cmcgns.methods.base import Losses, column, in_full_precision
from cmcgns.methods.pairs import PairMethod, PairModel, PairSettings


class Settings(PairSettings):
    temperature: float = Field(0.1, ge=0.01, le=1.0)
    """Initial temperature; cosines are divided by it."""
    logit_bias: float = -10.0
    """Initial bias of all logits, learned: with the default almost every pair starts as no pair, as most are."""
    same_text: Literal["left_out", "negatives", "positives"] = "left_out"
    """Two studies whose texts are the same: neither positives nor negatives of each other, negatives like all others
    (published), or positives."""


class SigLIP(PairMethod[Settings]):
    """Each film and each text of all ranks are a pair or not."""

    statistics = ("temperature", "logit_bias")

    def build_model(self, vocabulary_size: int) -> PairModel:
        model = super().build_model(vocabulary_size)
        model.logit_bias = nn.Parameter(torch.full((1,), self.settings.logit_bias))
        return model

    def terms(self, stage: int) -> tuple[str, ...]:
        return ("loss",)

    def losses(
        self, outputs: Any, batch: ImageReportBatch, centroids: Mapping[str, Tensor | None], stage: int, step: int
    ) -> Losses:
        wide = in_full_precision(outputs)
        loss = sigmoid_loss(
            wide.image_BD, wide.report_BD, wide.text_hash_B, wide.scale, wide.logit_bias, self.settings.same_text,
            self.wire_dtype,
        )  # fmt: skip
        return Losses(loss, column(loss), column(1 / wide.scale[0], wide.logit_bias[0]))


METHOD = SigLIP
TEXTS = 4096
"""Texts that are compared at a time: 1 MiB of logits for 64 films."""


def sigmoid_loss(
    image_BD: Tensor,
    report_BD: Tensor,
    text_hash_B: Tensor,
    scale: Tensor,
    bias: Tensor,
    same_text: str,
    wire_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Negative log-likelihood of all pairs of this rank's films and every rank's texts, divided by the number of films.

    Collective. ``TEXTS`` texts at a time: no rank holds G x G logits, and the backward pass computes them again.
    """
    size = len(image_BD)
    report_GD, hash_G = all_gather_with_grad(report_BD, wire_dtype), all_gather(text_hash_B)
    place_G = torch.arange(len(hash_G), device=hash_G.device)
    own_B1 = place_G.narrow(0, distributed.rank() * size, size).unsqueeze(1)
    total = torch.zeros_like(scale[0])
    parts = (each.split(TEXTS) for each in (report_GD, hash_G, place_G))
    for other_CD, other_hash_C, place_C in zip(*parts, strict=True):
        own_BC = own_B1 == place_C
        same_BC = text_hash_B.unsqueeze(1) == other_hash_C
        pair_BC = own_BC | same_BC if same_text == "positives" else own_BC
        counted_BC = own_BC | ~same_BC if same_text == "left_out" else torch.ones_like(same_BC)
        total = total + checkpoint(
            _block_loss, image_BD, other_CD, pair_BC, counted_BC, scale, bias,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return total / size


def _block_loss(
    image_BD: Tensor, report_CD: Tensor, pair_BC: Tensor, counted_BC: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    logits_BC = scale * image_BD @ report_CD.T + bias
    return F.binary_cross_entropy_with_logits(
        logits_BC, pair_BC.to(logits_BC.dtype), counted_BC.to(logits_BC.dtype), reduction="sum"
    )
