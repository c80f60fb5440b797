"""CM-CGNS: four weighted losses over two stages, and one bank of attended sentence features."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.base import (
    ComparesParts,
    Losses,
    Method,
    Parts,
    SentenceAttention,
    column,
    in_full_precision,
    spread,
)
from cmcgns.methods.cm_cgns.films import Films, Questions, all_film_scores, film_alignment_loss, film_scores, parts_loss
from cmcgns.methods.cm_cgns.losses import (
    SentenceLoss,
    by_logarithm,
    patch_alignment_loss,
    reconstruction_loss,
    sentence_alignment_loss,
)
from cmcgns.methods.cm_cgns.model import PATCH_ATTENTION, PREDICTOR, RECONSTRUCTION_PARTS, CmCgnsModel, CmCgnsOutputs
from cmcgns.methods.cm_cgns.settings import Settings
from cmcgns.methods.contrastive import contrastive_loss
from cmcgns.methods.loss_weights import weight_at
from cmcgns.models.attention import unit
from cmcgns.models.dual_encoder import DualEncoder, build_encoders

LOCAL_TERMS = {
    "sentences": ("loss_local_report",),
    "films": ("loss_local_film",),
    "both": ("loss_local_report", "loss_local_film"),
}
"""Names of the sentences' loss terms by `objective.local_negatives`."""
PICTURE_STUDIES = 4


class CmCgns(Method[Settings], ComparesParts):
    """Stage 1 aligns films and reports, stage 2 also reconstructs masked films."""

    statistics = (
        "negatives_per_sentence", "rows_restored", "mean_cosine", "patches_std", "attended_std", "temperature",
    )  # fmt: skip
    collapse_statistics = ("patches_std", "attended_std")
    ranked_by = ("mean_recall", "-loss_global")

    def build_model(self, vocabulary_size: int) -> CmCgnsModel:
        encoders, own = build_encoders(self.config, vocabulary_size), self.settings
        dim = self.config.model.embed_dim
        return CmCgnsModel(*encoders, dim, own.temperature, own.learn_temperature, own.mask_ratio, own.decoder_channels)

    def frozen(self, stage: int) -> tuple[str, ...]:
        untrained: tuple[str, ...] = RECONSTRUCTION_PARTS if stage == 1 else ()
        if self.settings.local_image_weight == 0.0:
            untrained += (*PREDICTOR, *PATCH_ATTENTION) if stage == 1 else PREDICTOR
        return untrained

    def terms(self, stage: int) -> tuple[str, ...]:
        own = self.settings
        names = ("loss", "loss_global", "loss_local_image", *LOCAL_TERMS[own.local_negatives])
        if own.parts_weight != 0.0:
            names = (*names, "loss_parts")
        return names if stage == 1 else (*names, "loss_reconstruction")

    def losses(
        self, outputs: Any, batch: ImageReportBatch, centroids: Mapping[str, Tensor | None], stage: int, step: int
    ) -> Losses:
        own, wide = self.settings, in_full_precision(outputs)
        z2_nD = unit(wide.image_to_text_BSD.flatten(0, 1).index_select(0, batch.sentence_row_n))
        terms = {
            "loss_global": contrastive_loss(
                wide.image_BD, wide.report_BD, batch.report_hash_B, wide.scale, wire_dtype=self.wire_dtype
            ),
            "loss_local_image": patch_alignment_loss(
                wide.patches_BPD, wide.text_to_image_BPD, wide.predicted_patches_BPD, wide.predicted_attended_BPD
            ),
        }
        by_sentences, local = self._sentence_losses(wide, z2_nD, batch, centroids["sentences"])
        terms |= by_sentences
        if own.local_image_weight == 0.0:  # only logged: without a backward pass
            terms["loss_local_image"] = terms["loss_local_image"].detach()
        if stage == 2:
            terms["loss_reconstruction"] = self._reconstruction(wide, batch)
        weights = {
            "loss_global": own.global_weight,
            "loss_local_image": own.local_image_weight,
            "loss_local_report": own.local_report_weight,
            "loss_local_film": own.local_film_weight,
            "loss_parts": own.parts_weight,
            "loss_reconstruction": own.reconstruction_weight,
        }
        weight = {name: weight_at(weights[name], step) for name in terms}
        levelled = terms if own.balance == "fixed" else by_logarithm(terms)
        weighted = {name: weight[name] * term for name, term in levelled.items()}
        total = sum(weighted.values(), start=torch.zeros_like(terms["loss_global"]))
        # the reconstruction is logged with its weight, as it always was
        logged = [weight[name] * term if name == "loss_reconstruction" else term for name, term in terms.items()]
        statistics = (
            local.negatives_per_sentence,
            local.rows_restored,
            local.mean_cosine,
            spread(wide.patches_BPD),
            spread(unit(wide.text_to_image_BPD)),
            1 / wide.scale[0],
        )
        bank_rows = {"sentences": z2_nD.detach()}
        return Losses(total, column(total, *logged), column(*statistics), bank_rows, weighted)

    def _sentence_losses(
        self, outputs: CmCgnsOutputs, z2_nD: Tensor, batch: ImageReportBatch, centroids_KD: Tensor | None
    ) -> tuple[dict[str, Tensor], SentenceLoss]:
        """The losses of the sentences by name of their term, and the one whose statistics are logged."""
        own, losses = self.settings, dict[str, SentenceLoss]()
        parts = self.parts(outputs, batch)
        questions, films = Questions(*parts.sentences), Films(*parts.films)
        if own.local_negatives != "films":
            losses["loss_local_report"] = sentence_alignment_loss(
                questions.z1_nD, z2_nD, batch.sentence_hash_n, batch.rank_sentences, centroids_KD, own, self.wire_dtype
            )
        if own.compares_films:
            scores = all_film_scores(questions, films, batch.rank_sentences, self.wire_dtype)
        if own.local_negatives != "sentences":
            losses["loss_local_film"] = film_alignment_loss(
                scores.of_own_sentences_nG, questions.z1_nD, batch.sentence_hash_n, parts.study_n,
                batch.rank_sentences, centroids_KD, own,
            )  # fmt: skip
        terms = {name: found.loss for name, found in losses.items()}
        if own.parts_weight != 0.0:
            terms["loss_parts"] = parts_loss(
                scores, parts.study_n, batch.report_hash_B, batch.rank_sentences, own.parts_temperature
            )
        return terms, next(iter(losses.values()))

    def _reconstruction(self, outputs: CmCgnsOutputs, batch: ImageReportBatch) -> Tensor:
        rebuilt_B1HW = outputs.reconstruction_B1HW
        assert rebuilt_B1HW is not None
        assert outputs.masked_BP is not None
        only_masked = self.settings.reconstruct == "masked"
        target_B1HW = batch.image_B1HW.to(rebuilt_B1HW.dtype)
        return reconstruction_loss(rebuilt_B1HW, target_B1HW, outputs.masked_BP, only_masked)

    def picture(self, outputs: Any, batch: ImageReportBatch) -> Tensor | None:
        return None if outputs.reconstruction_B1HW is None else contact_sheet(batch, outputs)

    def attention(self, model: DualEncoder, outputs: Any) -> SentenceAttention:
        assert isinstance(model, CmCgnsModel)
        weight_BSP = model.cross_attention.sentence_weights(outputs.patches_BPD, outputs.sentences_BSD)
        return SentenceAttention(outputs.image_to_text_BSD, weight_BSP)

    def parts(self, outputs: Any, batch: ImageReportBatch) -> Parts:
        wide = in_full_precision(outputs)
        rows = lambda values_BSD: values_BSD.flatten(0, 1).index_select(0, batch.sentence_row_n)
        return Parts(
            Questions(rows(wide.sentence_query_BSD), unit(rows(wide.sentences_BSD))),
            Films(wide.patch_key_BPD, wide.patch_value_BPD),
            batch.sentence_row_n // wide.sentences_BSD.shape[1],
        )

    def part_scores(self, sentences: tuple[Tensor, ...], films: tuple[Tensor, ...]) -> Tensor:
        return film_scores(Questions(*sentences), Films(*films))


METHOD = CmCgns


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
