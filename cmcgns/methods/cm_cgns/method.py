"""CM-CGNS: four weighted losses over two stages, and one bank of attended sentence features."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.base import Losses, Method, SentenceAttention, column, in_full_precision
from cmcgns.methods.cm_cgns.losses import patch_alignment_loss, reconstruction_loss, sentence_alignment_loss
from cmcgns.methods.cm_cgns.model import RECONSTRUCTION_PARTS, CmCgnsModel, CmCgnsOutputs
from cmcgns.methods.cm_cgns.settings import Settings
from cmcgns.methods.contrastive import contrastive_loss
from cmcgns.models.attention import unit
from cmcgns.models.dual_encoder import DualEncoder, build_encoders

ALIGNMENT_TERMS = ("loss", "loss_global", "loss_local_image", "loss_local_report")
PICTURE_STUDIES = 4


class CmCgns(Method[Settings]):
    """Stage 1 aligns films and reports, stage 2 also reconstructs masked films."""

    statistics = (
        "negatives_per_sentence", "rows_restored", "mean_cosine", "patches_std", "attended_std", "temperature",
    )  # fmt: skip
    collapse_statistics = ("patches_std", "attended_std")
    ranked_by = ("mean_recall", "-loss_global")

    def build_model(self, vocabulary_size: int) -> CmCgnsModel:
        encoders, own = build_encoders(self.config, vocabulary_size), self.settings
        dim = self.config.model.embed_dim
        return CmCgnsModel(*encoders, dim, own.temperature, own.learn_temperature, own.mask_ratio)

    def frozen(self, stage: int) -> tuple[str, ...]:
        return RECONSTRUCTION_PARTS if stage == 1 else ()

    def terms(self, stage: int) -> tuple[str, ...]:
        return ALIGNMENT_TERMS if stage == 1 else (*ALIGNMENT_TERMS, "loss_reconstruction")

    def losses(
        self, outputs: Any, batch: ImageReportBatch, centroids: Mapping[str, Tensor | None], stage: int, step: int
    ) -> Losses:
        own, wide = self.settings, in_full_precision(outputs)
        z1_nD = unit(wide.sentences_BSD.flatten(0, 1).index_select(0, batch.sentence_row_n))
        z2_nD = unit(wide.image_to_text_BSD.flatten(0, 1).index_select(0, batch.sentence_row_n))
        image_report = contrastive_loss(wide.image_BD, wide.report_BD, batch.report_hash_B, wide.scale)
        patches = patch_alignment_loss(
            wide.patches_BPD, wide.text_to_image_BPD, wide.predicted_patches_BPD, wide.predicted_attended_BPD
        )
        sentences = sentence_alignment_loss(
            z1_nD, z2_nD, batch.sentence_hash_n, batch.rank_sentences, centroids["sentences"], own
        )
        total = (
            own.global_weight * image_report
            + own.local_image_weight * patches
            + own.local_report_weight * sentences.loss
        )
        terms = [image_report, patches, sentences.loss]
        if stage == 2:
            terms.append(self._reconstruction(wide, batch))
            total = total + terms[-1]
        statistics = (
            sentences.negatives_per_sentence,
            sentences.rows_restored,
            sentences.mean_cosine,
            spread(wide.patches_BPD),
            spread(unit(wide.text_to_image_BPD)),
            1 / wide.scale[0],
        )
        return Losses(total, column(total, *terms), column(*statistics), {"sentences": z2_nD.detach()})

    def _reconstruction(self, outputs: CmCgnsOutputs, batch: ImageReportBatch) -> Tensor:
        rebuilt_B1HW = outputs.reconstruction_B1HW
        assert rebuilt_B1HW is not None
        assert outputs.masked_BP is not None
        only_masked = self.settings.reconstruct == "masked"
        target_B1HW = batch.image_B1HW.to(rebuilt_B1HW.dtype)
        error = reconstruction_loss(rebuilt_B1HW, target_B1HW, outputs.masked_BP, only_masked)
        return self.settings.reconstruction_weight * error

    def picture(self, outputs: Any, batch: ImageReportBatch) -> Tensor | None:
        return None if outputs.reconstruction_B1HW is None else contact_sheet(batch, outputs)

    def attention(self, model: DualEncoder, outputs: Any) -> SentenceAttention:
        assert isinstance(model, CmCgnsModel)
        weight_BSP = model.cross_attention.sentence_weights(outputs.patches_BPD, outputs.sentences_BSD)
        return SentenceAttention(outputs.image_to_text_BSD, weight_BSP)


METHOD = CmCgns


def spread(rows_BLD: Tensor) -> Tensor:
    """sqrt(D) x mean standard deviation per dimension of normalised rows: about 1 when spread out, 0 when collapsed."""
    rows_ND = rows_BLD.detach().flatten(0, -2)
    return rows_ND.shape[1] ** 0.5 * rows_ND.std(dim=0).mean()


def contact_sheet(batch: ImageReportBatch, outputs: CmCgnsOutputs) -> Tensor:
    """Some films in three rows (input, masked, reconstructed), in [0, 1], shape (1, 3H, nW)."""
    assert outputs.reconstruction_B1HW is not None
    assert outputs.masked_BP is not None
    image_n1HW = batch.image_B1HW[:PICTURE_STUDIES].float()
    rebuilt_n1HW = outputs.reconstruction_B1HW[:PICTURE_STUDIES].float()
    masked_n1HW = pixel_mask(outputs.masked_BP[:PICTURE_STUDIES], image_n1HW.shape[-1])
    hidden_n1HW = image_n1HW.masked_fill(masked_n1HW, -1.0)
    rows = [torch.cat(list(row), dim=2) for row in (image_n1HW, hidden_n1HW, rebuilt_n1HW)]
    return ((torch.cat(rows, dim=1) + 1) / 2).clamp(0, 1).cpu()


def pixel_mask(masked_BP: Tensor, side: int) -> Tensor:
    """The patch mask at pixel resolution, bool (B, 1, side, side)."""
    grid = int(masked_BP.shape[1] ** 0.5)
    cell = side // grid
    mask_Bgg = masked_BP.unflatten(1, (grid, grid))
    return mask_Bgg.repeat_interleave(cell, 1).repeat_interleave(cell, 2).unsqueeze(1)
