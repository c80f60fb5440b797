"""The training objective: what the model returned, to one number and its parts. No learnable tensor lives here."""

from typing import NamedTuple

import torch
from torch import Tensor

from cmcgns.config import ObjectiveConfig
from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.cm_cgns.losses import patch_alignment_loss, reconstruction_loss, sentence_alignment_loss
from cmcgns.methods.contrastive import contrastive_loss
from cmcgns.models.attention import unit
from cmcgns.models.vision_language import Outputs

LOSS_TERMS = ("loss", "loss_global", "loss_local_image", "loss_local_report", "loss_reconstruction")
STATISTICS = ("negatives_per_sentence", "rows_restored", "mean_cosine", "patches_std", "attended_std", "temperature")


class Losses(NamedTuple):
    """What the trainer needs of one microbatch; the mean over ranks of every number is its global value."""

    total: Tensor
    """To be differentiated."""
    terms: Tensor
    """``LOSS_TERMS`` in order, detached float32; the reconstruction is 0 in stage 1."""
    statistics: Tensor
    """``STATISTICS`` in order, detached float32."""
    attended_nD: Tensor
    """Normalised z2 of this rank's sentences, detached: what the clustering lives on."""


class Objective:
    """The four losses of CM-CGNS with their weights (arXiv 2506.11674)."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def __call__(self, outputs: Outputs, batch: ImageReportBatch, centroids_KD: Tensor | None) -> Losses:
        """Losses of one microbatch; collective, since negatives come from all ranks."""
        config, outputs = self.config, in_full_precision(outputs)
        z1_nD = unit(outputs.sentences_BSD.flatten(0, 1).index_select(0, batch.sentence_row_n))
        z2_nD = unit(outputs.image_to_text_BSD.flatten(0, 1).index_select(0, batch.sentence_row_n))
        image_report = contrastive_loss(outputs.image_BD, outputs.report_BD, batch.report_hash_B, outputs.scale)
        patches = patch_alignment_loss(
            outputs.patches_BPD,
            outputs.text_to_image_BPD,
            outputs.predicted_patches_BPD,
            outputs.predicted_attended_BPD,
        )
        sentences = sentence_alignment_loss(
            z1_nD, z2_nD, batch.sentence_hash_n, batch.rank_sentences, centroids_KD, config
        )
        rebuilt = torch.zeros_like(image_report)
        if outputs.reconstruction_B1HW is not None:
            rebuilt = config.reconstruction_weight * reconstruction_loss(
                outputs.reconstruction_B1HW,
                batch.image_B1HW.to(outputs.reconstruction_B1HW.dtype),
                batch.masked_BP,
                only_masked=config.reconstruct == "masked",
            )
        total = (
            config.global_weight * image_report
            + config.local_image_weight * patches
            + config.local_report_weight * sentences.loss
            + rebuilt
        )
        statistics = (
            sentences.negatives_per_sentence,
            sentences.rows_restored,
            sentences.mean_cosine,
            spread(outputs.patches_BPD),
            spread(unit(outputs.text_to_image_BPD)),
            1 / outputs.scale[0],
        )
        return Losses(
            total=total,
            terms=_column(total, image_report, patches, sentences.loss, rebuilt),
            statistics=_column(*statistics),
            attended_nD=z2_nD.detach(),
        )


def in_full_precision(outputs: Outputs) -> Outputs:
    """``outputs`` in float32 where they came in half precision: losses are never computed in bf16 or fp16."""
    half = (torch.bfloat16, torch.float16)
    wide = {
        name: part.float() if part is not None and part.dtype in half else part
        for name, part in outputs._asdict().items()
    }
    return Outputs(**wide)


def spread(rows_BLD: Tensor) -> Tensor:
    """sqrt(D) x mean standard deviation per dimension of normalised rows: about 1 when spread out, 0 when collapsed."""
    rows_ND = rows_BLD.detach().flatten(0, -2)
    return rows_ND.shape[1] ** 0.5 * rows_ND.std(dim=0).mean()


def _column(*values: Tensor) -> Tensor:
    return torch.stack([value.detach().float() for value in values])
