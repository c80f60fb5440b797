"""LoVT: InfoNCE of films and reports, and contrast of patches and of sentences inside each study.

B studies on this rank, P patches (g x g), S sentences (padded), D embedding.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from cmcgns.config import MethodSettings
from cmcgns.data.batch import ImageReportBatch
from cmcgns.errors import UserError
from cmcgns.methods.base import Losses, Method, SentenceAttention, column, in_full_precision, spread
from cmcgns.methods.contrastive import contrastive_loss
from cmcgns.methods.loss_weights import LossWeight, weight_at
from cmcgns.methods.lovt.model import LovtImageEncoder, LovtModel, LovtOutputs, LovtTextEncoder
from cmcgns.methods.pairs import check_frozen, first_layers
from cmcgns.methods.within_study import same_sentences, within_study_losses
from cmcgns.models.attention import unit
from cmcgns.models.dual_encoder import DualEncoder, build_encoders


class Settings(MethodSettings):
    temperature: float = Field(0.1, ge=0.01, le=1.0)
    """Temperature of InfoNCE between films and reports, never learned."""
    film_weight: float = Field(0.75, ge=0.0, le=1.0)
    """Share of the direction in which each film has to find its report; the other direction has the rest."""
    local_temperature: float = Field(0.3, ge=0.01, le=1.0)
    """Temperature of both losses inside a study."""
    radius: float = Field(0.5, ge=0.0, le=1.0)
    """A patch has to find what the patches within this distance read; in diagonals of the grid."""
    beta: float = Field(1.0, gt=0.0)
    """Those patches count by exp(-distance / beta)."""
    hidden: PositiveInt = 2048
    """Width of the hidden layer of the four heads."""
    norm: Literal["layer", "batch", "none"] = "layer"
    """Norm in the heads and behind the attention. `batch` (published) makes results depend on microbatch_size; on GPUs
    `train.sync_batchnorm` shares its statistics."""
    frozen_text_layers: int = Field(0, ge=0)
    """The first layers of the text encoder, and its embeddings, that are not trained (published: 6); 0 trains everything."""
    same_text: Literal["left_out", "negatives"] = "left_out"
    """Reports of the same text, and sentences of one report with the same text: neither positives nor negatives of each other, or
    negatives like all others (published)."""
    global_weight: LossWeight = 1.0
    """Weight of InfoNCE between films and reports; a number or a ramp."""
    local_image_weight: LossWeight = 0.75
    """Weight of the loss of patches; a number or a ramp."""
    local_report_weight: LossWeight = 0.75
    """Weight of the loss of sentences; a number or a ramp."""


class Lovt(Method[Settings]):
    """One stage, three losses, no clustering."""

    statistics = (
        "local_image_excess", "effective_patches", "effective_sentences", "sentences_found", "sentences_found_by_chance",
        "spatial_std", "patches_std", "attended_std",
    )  # fmt: skip
    collapse_statistics = ("spatial_std", "patches_std", "attended_std")

    def build_model(self, vocabulary_size: int) -> LovtModel:
        own, model = self.settings, self.config.model
        if own.norm == "batch" and self.config.train.microbatch_size == 1:
            raise UserError(
                "objective.norm batch needs train.microbatch_size of at least 2, not 1; or give objective.norm=layer"
            )
        reader = partial(LovtTextEncoder, hidden=own.hidden, norm=own.norm)
        encoders = build_encoders(self.config, vocabulary_size, reader, LovtImageEncoder)
        check_frozen(encoders[1], own.frozen_text_layers, model.text_encoder)
        return LovtModel(*encoders, model.embed_dim, own.temperature, own.hidden, own.norm)

    def frozen(self, stage: int) -> tuple[str, ...]:
        return tuple(f"text_encoder.backbone.{part}" for part in first_layers(self.settings.frozen_text_layers))

    def terms(self, stage: int) -> tuple[str, ...]:
        return ("loss", "loss_global", "loss_local_image", "loss_local_report")

    def losses(
        self, outputs: Any, batch: ImageReportBatch, centroids: Mapping[str, Tensor | None], stage: int, step: int
    ) -> Losses:
        own, wide = self.settings, in_full_precision(outputs)
        left_out = own.same_text == "left_out"
        scale = wide.image_BD.new_full((1,), 1 / own.temperature)
        hash_B, same_BSS = (batch.report_hash_B, same_texts(batch)) if left_out else (None, None)
        target_PP = grid_positives(wide.patches_BPD.shape[1], own.radius, own.beta, scale.device).to(scale.dtype)
        terms = {
            "loss_global": contrastive_loss(
                wide.image_BD, wide.report_BD, hash_B, scale, own.film_weight, self.wire_dtype
            ),
            "loss_local_image": torch.stack(patch_losses(wide, target_PP, own)).mean(),
            "loss_local_report": torch.stack(sentence_losses(wide, batch.sentence_mask_BS, same_BSS, own)).mean(),
        }
        weights = {
            "loss_global": own.global_weight,
            "loss_local_image": own.local_image_weight,
            "loss_local_report": own.local_report_weight,
        }
        weighted = {name: weight_at(weights[name], step) * term for name, term in terms.items()}
        total = sum(weighted.values(), start=torch.zeros_like(terms["loss_global"]))
        floor = (wide.patch_weight_BP @ entropy(target_PP)).mean()
        statistics = column(terms["loss_local_image"] - floor, *local_statistics(wide, batch.sentence_mask_BS))
        return Losses(total, column(total, *terms.values()), statistics, weighted=weighted)

    def attention(self, model: DualEncoder, outputs: Any) -> SentenceAttention:
        return SentenceAttention(outputs.image_to_text_BSD, outputs.sentence_patch_weight_BSP)


METHOD = Lovt


def patch_losses(outputs: LovtOutputs, target_PP: Tensor, own: Settings) -> tuple[Tensor, Tensor]:
    """Patches find what their neighbourhood reads among what all patches of the film read, and the other way round."""
    read_BPD = unit(outputs.text_to_image_BPD)
    scale = 1 / own.local_temperature
    return within_study_losses(outputs.patches_BPD, read_BPD, outputs.patch_weight_BP, scale, target_LL=target_PP)


def sentence_losses(
    outputs: LovtOutputs, mask_BS: Tensor, same_BSS: Tensor | None, own: Settings
) -> tuple[Tensor, Tensor]:
    """Sentences find what they see among what all sentences of the report see, and the other way round."""
    seen_BSD = unit(outputs.image_to_text_BSD)
    scale = 1 / own.local_temperature
    return within_study_losses(
        outputs.sentences_BSD, seen_BSD, outputs.sentence_weight_BS, scale, mask_BS, left_out_BLL=same_BSS
    )


def same_texts(batch: ImageReportBatch) -> Tensor:
    """True for two different sentences of one report that have the same words, (B, S, S)."""
    return same_sentences(batch.sentence_hash_n, batch.sentence_row_n, batch.sentence_mask_BS)


def grid_positives(patches: int, radius: float, beta: float, device: torch.device | None = None) -> Tensor:
    """How much each patch counts as right for each, float64 (P, P) with rows of sum 1.

    Distances are in diagonals of the grid; which ones are within ``radius`` is decided by whole numbers.
    """
    side = math.isqrt(patches)
    place_P = torch.arange(patches, device=device)
    row_P, column_P = place_P.div(side, rounding_mode="floor"), place_P.remainder(side)
    square_PP = (row_P.unsqueeze(1) - row_P).square() + (column_P.unsqueeze(1) - column_P).square()
    distance_PP = (square_PP.double() / (2 * side**2)).sqrt()
    near_PP = square_PP <= math.floor(2 * side**2 * radius**2 + 1e-9)
    share_PP = (-distance_PP / beta).exp() * near_PP
    return share_PP / share_PP.sum(1, keepdim=True)


def entropy(share_BL: Tensor) -> Tensor:
    """Entropy of each row; zeros count 0."""
    return torch.special.entr(share_BL).sum(-1)


@torch.no_grad()
def local_statistics(outputs: LovtOutputs, mask_BS: Tensor) -> list[Tensor]:
    """``Lovt.statistics`` but the first."""
    seen_BSD = unit(outputs.image_to_text_BSD)
    cosine_BSS = (outputs.sentences_BSD @ seen_BSD.mT).masked_fill(~mask_BS.unsqueeze(1), -torch.inf)
    place_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    found_BS = (cosine_BSS.argmax(-1) == place_S) & mask_BS
    count_B = mask_BS.sum(1)
    return [
        entropy(outputs.patch_weight_BP).exp().mean(),
        entropy(outputs.sentence_weight_BS).exp().mean(),
        (found_BS.sum(1) / count_B).mean(),
        (1 / count_B).mean(),
        outputs.patches_BPD.shape[-1] ** 0.5 * outputs.patches_BPD.std(dim=1).mean(),
        spread(outputs.patches_BPD),
        spread(unit(outputs.text_to_image_BPD)),
    ]
