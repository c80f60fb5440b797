"""SigLIP: each film and text are told apart as a pair or no pair, by a sigmoid loss (Zhai et al. 2023, arXiv 2303.15343).

B studies on this rank, G studies on all ranks, D embedding.
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
            wide.image_BD, wide.report_BD, wide.text_hash_B, wide.scale, wide.logit_bias, self.settings.same_text
        )
        return Losses(loss, column(loss), column(1 / wide.scale[0], wide.logit_bias[0]))


METHOD = SigLIP


def sigmoid_loss(
    image_BD: Tensor, report_BD: Tensor, text_hash_B: Tensor, scale: Tensor, bias: Tensor, same_text: str
) -> Tensor:
    """Negative log-likelihood of all pairs of this rank's films and every rank's texts, divided by the number of films.

    Collective. The texts of one rank at a time: logits are B x B, and the backward pass computes them again.
    """
    size, own = len(image_BD), distributed.rank()
    report_GD, hash_G = all_gather_with_grad(report_BD), all_gather(text_hash_B)
    total = torch.zeros_like(scale[0])
    for rank, (other_BD, other_hash_B) in enumerate(zip(report_GD.split(size), hash_G.split(size), strict=True)):
        same_BB = text_hash_B.unsqueeze(1) == other_hash_B
        pair_BB = same_BB if same_text == "positives" else torch.zeros_like(same_BB)
        counted_BB = ~same_BB if same_text == "left_out" else torch.ones_like(same_BB)
        if rank == own:
            pair_BB, counted_BB = pair_BB.fill_diagonal_(True), counted_BB.fill_diagonal_(True)
        total = total + checkpoint(
            _block_loss, image_BD, other_BD, pair_BB, counted_BB, scale, bias,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return total / size


def _block_loss(
    image_BD: Tensor, report_BD: Tensor, pair_BB: Tensor, counted_BB: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    logits_BB = scale * image_BD @ report_BD.T + bias
    return F.binary_cross_entropy_with_logits(
        logits_BB, pair_BB.to(logits_BB.dtype), counted_BB.to(logits_BB.dtype), reduction="sum"
    )
