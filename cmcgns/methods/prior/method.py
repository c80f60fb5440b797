"""PRIOR: three stages, eight losses; its prototypes are learned by gradient, so nothing is clustered.

B studies on this rank, S sentences (padded), n real sentences of this rank, N of all ranks, K prototypes, Q generated rows,
D embedding.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.data.batch import ImageReportBatch
from cmcgns.distributed import all_reduce
from cmcgns.errors import UserError
from cmcgns.methods.base import Losses, Method, SentenceAttention, column, in_full_precision, spread
from cmcgns.methods.cm_cgns.losses import patch_alignment_loss, reconstruction_loss
from cmcgns.methods.cm_cgns.method import contact_sheet
from cmcgns.methods.contrastive import contrastive_loss
from cmcgns.methods.loss_weights import weight_at
from cmcgns.methods.prior.model import (
    BANK,
    DECODERS,
    PriorModel,
    PriorOutputs,
    PriorTextEncoder,
    rearranged,
    targets_of,
)
from cmcgns.methods.prior.settings import Settings as Settings
from cmcgns.methods.within_study import equal_weights, same_sentences, within_study_losses
from cmcgns.models.attention import unit
from cmcgns.models.dual_encoder import DualEncoder, build_encoders

ALIGNMENT = ("loss_global", "loss_local_image", "loss_local_report")
GENERATION = ("loss_reconstruction", "loss_generation", "loss_consistency", "loss_prediction")


class Prior(Method[Settings]):
    """Stage 1 aligns films and reports, stage 2 does so through the bank, stage 3 also rebuilds both from the film."""

    statistics = (
        "temperature", "local_temperature", "prototype_perplexity", "prototypes_used", "assignment_max", "noise_flips",
        "sentences_cut", "patches_std", "attended_std", "report_std",
    )  # fmt: skip
    collapse_statistics = ("patches_std", "attended_std", "report_std")
    ranked_by = ("mean_recall", "-loss_global")

    def build_model(self, vocabulary_size: int) -> PriorModel:
        own, model = self.settings, self.config.model
        if model.embed_dim % own.decoder_heads:
            raise UserError(
                f"objective.decoder_heads {own.decoder_heads} does not divide model.embed_dim {model.embed_dim}; give a divisor"
            )
        encoders = build_encoders(self.config, vocabulary_size, partial(PriorTextEncoder, settings=own))
        return PriorModel(*encoders, model.embed_dim, own, model.dropout)

    def frozen(self, stage: int) -> tuple[str, ...]:
        return {1: (*BANK, *DECODERS), 2: DECODERS}.get(stage, ())

    def terms(self, stage: int) -> tuple[str, ...]:
        later = (), ("loss_prototypes",), ("loss_prototypes", *GENERATION)
        return ("loss", *ALIGNMENT, *later[stage - 1])

    def losses(
        self, outputs: Any, batch: ImageReportBatch, centroids: Mapping[str, Tensor | None], stage: int, step: int
    ) -> Losses:
        own, wide = self.settings, in_full_precision(outputs)
        kept_n = wide.kept_BS.flatten().index_select(0, batch.sentence_row_n).to(wide.image_BD.dtype)
        share_n = distributed.world_size() * kept_n / all_reduce(kept_n.sum())
        terms = alignment_losses(wide, batch, own, self.wire_dtype)
        if stage > 1:
            terms["loss_prototypes"] = share_n @ (wide.picked_nD - wide.read_nD).abs().mean(1)
        if stage == 3:
            terms |= generation_losses(wide, batch, share_n, own, self.wire_dtype)
        weights = {
            "loss_global": own.stage3_global_weight if stage == 3 else own.global_weight,
            "loss_local_image": own.local_image_weight,
            "loss_local_report": own.local_report_weight,
            "loss_prototypes": own.prototype_weight,
            "loss_reconstruction": own.reconstruction_weight,
            "loss_generation": own.generation_weight,
            "loss_consistency": own.consistency_weight,
            "loss_prediction": own.prediction_weight,
        }
        weighted = {name: weight_at(weights[name], step) * term for name, term in terms.items()}
        total = sum(weighted.values(), start=torch.zeros_like(terms["loss_global"]))
        statistics = (
            1 / wide.scale[0],
            1 / wide.local_scale[0],
            *bank_statistics(wide, share_n, own.prototype_temperature),
            distributed.world_size() * (1 - kept_n).sum() / sum(batch.rank_sentences),
            spread(unit(wide.patches_BPD)),
            spread(unit(wide.text_to_image_BPD)),
            spread(wide.report_BD),
        )
        return Losses(total, column(total, *terms.values()), column(*statistics), weighted=weighted)

    def picture(self, outputs: Any, batch: ImageReportBatch) -> Tensor | None:
        return None if outputs.reconstruction_B1HW is None else contact_sheet(batch, outputs)

    def attention(self, model: DualEncoder, outputs: Any) -> SentenceAttention:
        assert isinstance(model, PriorModel)
        weight_BSP = model.cross_attention.sentence_weights(outputs.patches_BPD, outputs.sentences_BSD)
        return SentenceAttention(outputs.image_to_text_BSD, weight_BSP)


METHOD = Prior


def alignment_losses(
    outputs: PriorOutputs, batch: ImageReportBatch, own: Settings, wire_dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The losses of every stage: films and reports, patches, and sentences inside their report."""
    left_out = own.same_text == "left_out"
    same_BSS = None
    if left_out:
        same_BSS = same_sentences(batch.sentence_hash_n, batch.sentence_row_n, batch.sentence_mask_BS)
    weight_BS = equal_weights(outputs.kept_BS, outputs.image_BD.dtype)
    sentences_BSD, seen_BSD = unit(outputs.sentences_BSD), unit(outputs.image_to_text_BSD)
    sentences = within_study_losses(
        sentences_BSD, seen_BSD, weight_BS, outputs.local_scale, outputs.kept_BS, left_out_BLL=same_BSS
    )
    hash_B = batch.report_hash_B if left_out else None
    return {
        "loss_global": contrastive_loss(
            outputs.image_BD, outputs.report_BD, hash_B, outputs.scale, wire_dtype=wire_dtype
        ),
        "loss_local_image": patch_alignment_loss(
            outputs.patches_BPD,
            outputs.text_to_image_BPD,
            outputs.predicted_patches_BPD,
            outputs.predicted_attended_BPD,
        ),
        "loss_local_report": torch.stack(sentences).mean(),
    }


def generation_losses(
    outputs: PriorOutputs, batch: ImageReportBatch, share_n: Tensor, own: Settings, wire_dtype: torch.dtype
) -> dict[str, Tensor]:
    """The losses of stage 3: the rebuilt film, the generated rows, what they pick, and the report that they make."""
    assert outputs.reconstruction_B1HW is not None
    assert outputs.masked_BP is not None
    assert outputs.generated_report_BD is not None
    film_B1HW = batch.image_B1HW.to(outputs.image_BD.dtype)
    hash_B = batch.report_hash_B if own.same_text == "left_out" else None
    only_masked = own.reconstruct == "masked"
    return {
        "loss_reconstruction": reconstruction_loss(
            outputs.reconstruction_B1HW, film_B1HW, outputs.masked_BP, only_masked
        ),
        "loss_generation": generation_loss(outputs),
        "loss_consistency": share_n @ pick_divergence(outputs.logits_nK, outputs.generated_logits_nK),
        "loss_prediction": contrastive_loss(
            outputs.generated_report_BD, outputs.report_BD, hash_B, outputs.scale, wire_dtype=wire_dtype
        ),
    }


def generation_loss(outputs: PriorOutputs) -> Tensor:
    """Mean distance of generated rows and the rows of reports, zero rows included."""
    assert outputs.generated_BQD is not None
    assert outputs.match_BQ is not None
    target_BQD = targets_of(outputs.sentences_BSD, outputs.generated_BQD.shape[1])
    return (rearranged(outputs.generated_BQD, outputs.match_BQ) - target_BQD).abs().mean()


def pick_divergence(logits_nK: Tensor | None, generated_logits_nK: Tensor | None) -> Tensor:
    """KL divergence of each sentence's choice, without noise, from that of its generated row, (n,)."""
    assert logits_nK is not None
    assert generated_logits_nK is not None
    both = generated_logits_nK.log_softmax(-1), logits_nK.log_softmax(-1)
    return F.kl_div(*both, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def bank_statistics(outputs: PriorOutputs, share_n: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Over all ranks: how many prototypes are used alike and at all, the largest share of a choice, and the share of sentences
    whose first choice the noise changes. Zero without a bank. Collective."""
    if outputs.logits_nK is None or outputs.noisy_nK is None:
        return (torch.zeros_like(outputs.image_BD[0, 0]),) * 4
    choice_nK = (outputs.logits_nK / temperature).softmax(-1)
    mean_K = all_reduce(share_n @ choice_nK) / distributed.world_size()
    first_n = choice_nK.argmax(-1)
    taken_K = torch.zeros_like(mean_K).scatter_reduce_(0, first_n, (share_n > 0).to(mean_K.dtype), "amax")
    flipped_n = (outputs.noisy_nK.argmax(-1) != first_n).to(share_n.dtype)
    return (
        torch.special.entr(mean_K).sum().exp(),
        all_reduce(taken_K, dist.ReduceOp.MAX).sum(),
        share_n @ choice_nK.amax(-1),
        share_n @ flipped_n,
    )
