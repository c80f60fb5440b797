"""MGCA: studies, words and patches, and learned prototypes are aligned (Wang et al., NeurIPS 2022, arXiv 2210.06044).

Read from the released code (HKU-MedAI/MGCA); that the paper halves the loss of words and patches and projects them for their
attention is recalled, and neither is done here. Formulas: docs/methods.md.

B studies on this rank, G studies on all ranks, T words of a report (padded), P patches, S sentences (padded), K prototypes,
D embedding.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from cmcgns import distributed
from cmcgns.config import Bank, MethodSettings, ModelConfig
from cmcgns.data.batch import ImageReportBatch
from cmcgns.distributed import all_reduce
from cmcgns.errors import UserError
from cmcgns.methods.base import Losses, Method, SentenceAttention, column, in_full_precision, spread
from cmcgns.methods.codes import Prototypes, codes_of_all_ranks, frozen_until, own_rows, swapped_loss
from cmcgns.methods.contrastive import directed_losses
from cmcgns.methods.loss_weights import LossWeight, weight_at
from cmcgns.methods.within_study import equal_weights, within_study_losses
from cmcgns.models.attention import projection, unit
from cmcgns.models.backbones import ImageEncoder
from cmcgns.models.dual_encoder import DualEncoder, build_encoders
from cmcgns.models.text import PooledTextEncoder, TextEncoder, in_slices, sentence_means, whole_words

logger = logging.getLogger(__name__)
BANK = "studies"


class Settings(MethodSettings):
    temperature: float = Field(0.07, ge=0.01, le=1.0)
    """Temperature of InfoNCE between films and reports, never learned."""
    local_temperature: float = Field(0.1, ge=0.01, le=1.0)
    """Temperature of words and patches: of their attention and of their losses."""
    prototype_temperature: float = Field(0.2, ge=0.01, le=1.0)
    """Temperature with which a film's or a report's scores predict the code of the other."""
    num_prototypes: int = Field(500, ge=2)
    """Prototypes K. More than studies in a microbatch of all ranks leave some without a study."""
    prototype_source: Literal["learned", "pool"] = "learned"
    """Prototypes are parameters (published), or the centroids of a clustering of the films and reports of all ranks (ours); until
    that has started, there is no loss of prototypes."""
    freeze_steps: int = Field(0, ge=0)
    """Steps at the start in which learned prototypes get no gradient (published: an epoch)."""
    epsilon: float = Field(0.05, gt=0.0)
    """Smoothness of the codes: scores are divided by it."""
    rounds: PositiveInt = 3
    """Rounds of Sinkhorn-Knopp."""
    word_weights: Literal["uniform", "attention"] = "uniform"
    """Weights of a report's words: equal, or by the attention of [CLS] in the last layer (published). `attention` computes the
    text encoder's attention in full, without a fused kernel."""
    patch_weights: Literal["uniform", "attention"] = "uniform"
    """The same for patches; `attention` needs an image encoder with a [CLS] token (published for ViT)."""
    attended_patches: Literal["unit", "raw"] = "unit"
    """What a patch attends to in the words has length 1 (published for ResNet), or is left as it is (published for ViT)."""
    whole_words: bool = False
    """Sum the pieces of a word, and their attention, to one word (published), or count each piece of the vocabulary as a word."""
    separator: bool = False
    """Count [SEP] as a word of the report (published)."""
    regions: Literal["last", "before_last"] = "last"
    """Feature map of the image encoder whose positions are patches: the last one, or that before the last stage, with four times
    as many (published for ResNet-50)."""
    heads: Literal["linear", "mlp"] = "linear"
    """Projections of films, patches and text: one linear layer, or two with a ReLU between them."""
    text_layers: int = Field(0, ge=0)
    """The first layers of the text encoder that are used, 0 for all (published: 6 of 12)."""
    same_text: Literal["left_out", "negatives"] = "left_out"
    """Two studies whose reports are the same: neither positives nor negatives of each other, or negatives (published)."""
    global_weight: LossWeight = 1.0
    """Weight of InfoNCE between films and reports; a number or a ramp."""
    token_weight: LossWeight = 1.0
    """Weight of the loss of words and patches; a number or a ramp."""
    prototype_weight: LossWeight = 1.0
    """Weight of the loss of prototypes; a number or a ramp."""

    def banks(self, model: ModelConfig) -> tuple[Bank, ...]:
        """Films and reports, if their centroids are the prototypes."""
        if self.prototype_source == "learned":
            return ()
        setting = "objective.num_prototypes"
        return (Bank(BANK, self.num_prototypes, model.embed_dim, setting, "mean_cosine", False, rows_each=2),)


class MgcaOutputs(NamedTuple):
    """Outputs for one microbatch."""

    image_BD: Tensor
    """Normalised film embeddings."""
    report_BD: Tensor
    """Normalised report embeddings: of [CLS]."""
    sentences_BSD: Tensor
    """Normalised sentence embeddings, zero where padded."""
    patches_BPD: Tensor
    """Normalised patches in raster order."""
    words_BTD: Tensor
    """Normalised words; any values where padded."""
    word_mask_BT: Tensor
    """True for words."""
    word_weight_BT: Tensor
    """Weights of words with sum 1 in each report, zero where padded, without gradient."""
    patch_weight_BP: Tensor
    """Weights of patches with sum 1 in each film, without gradient."""
    sentence_of_word_BT: Tensor
    """Which sentence a word belongs to, -1 for none."""
    prototypes_KD: Tensor | None
    """Unit rows; None if a clustering makes them."""


class AttentiveTextEncoder(PooledTextEncoder):
    """A text is the state of [CLS]; also gives the attention that [CLS] pays to each token."""

    def states_and_attention(self, batch: ImageReportBatch) -> tuple[Tensor, Tensor]:
        """Token states (B, T, C), and the attention of [CLS] in the last layer, the mean over heads (B, T)."""
        read = partial(self._states_and_attention, length=batch.token_BT.shape[1])
        tokens = batch.token_BT, batch.token_mask_BT
        both_BTC = in_slices(read, tokens, batch.by_length_B, batch.slice_tokens)
        return both_BTC[..., :-1], both_BTC[..., -1].detach()

    def _states_and_attention(self, token_bt: Tensor, token_mask_bt: Tensor, length: int) -> Tensor:
        found = self.backbone(
            input_ids=token_bt, attention_mask=self._attention_mask(token_mask_bt), output_attentions=True
        )
        received_bt = found.attentions[-1][:, :, 0].mean(1)
        both_btC = torch.cat([found.last_hidden_state, received_bt.unsqueeze(-1)], dim=-1)
        return F.pad(both_btC, (0, 0, 0, length - token_bt.shape[1]))


class MgcaModel(DualEncoder):
    """The two encoders, a projection of patches and the prototypes; words have the projection of the text encoder."""

    text_encoder: AttentiveTextEncoder

    def __init__(self, image_encoder: ImageEncoder, text_encoder: TextEncoder, dim: int, settings: Settings) -> None:
        super().__init__(image_encoder, text_encoder, dim, settings.temperature, learn_temperature=False)
        self.settings = settings
        last = settings.regions == "last"
        channels = image_encoder.dim if last else image_encoder.dim_before_last
        self.image_projection = projection(settings.heads, image_encoder.dim, dim)
        self.patch_projection = projection(settings.heads, channels, dim)
        learned = settings.prototype_source == "learned"
        self.prototypes = Prototypes(settings.num_prototypes, dim) if learned else None

    def forward(self, batch: ImageReportBatch, stage: int = 1) -> MgcaOutputs:
        """Embeddings of one microbatch."""
        features_BPC, pooled_BC, patch_weight_BP = self._read_films(batch)
        hidden_BTC, attention_BT = self._read_reports(batch)
        owner_BT, mask_BT = batch.sentence_of_token_BT, batch.token_mask_BT
        sentences_BSD, report_BD = self.text_encoder.embed(hidden_BTC, mask_BT, owner_BT, batch.sentence_mask_BS)
        word_BTC = hidden_BTC
        if self.settings.whole_words:
            assert batch.continues_BT is not None
            tokens = batch.continues_BT, owner_BT
            word_BTC, owner_BT = whole_words(hidden_BTC, *tokens)
            if attention_BT is not None:
                attention_BT = whole_words(attention_BT.unsqueeze(-1), *tokens)[0].squeeze(-1)
            starts_BT = mask_BT & ~batch.continues_BT
            mask_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) < starts_BT.sum(1, keepdim=True)
        word_mask_BT = owner_BT >= 0
        if attention_BT is None:
            weight_BT = equal_weights(word_mask_BT, hidden_BTC.dtype)
        else:
            weight_BT = clipped_weights(attention_BT, word_mask_BT)
        if self.settings.separator:
            word_mask_BT = mask_BT & (torch.arange(mask_BT.shape[1], device=mask_BT.device) > 0)
        image_BD = unit(self.image_projection(pooled_BC))
        return MgcaOutputs(
            image_BD=image_BD,
            report_BD=report_BD,
            sentences_BSD=sentences_BSD,
            patches_BPD=unit(self.patch_projection(features_BPC)),
            words_BTD=unit(self.text_encoder.projection(word_BTC)),
            word_mask_BT=word_mask_BT,
            word_weight_BT=weight_BT,
            patch_weight_BP=patch_weight_BP,
            sentence_of_word_BT=owner_BT,
            prototypes_KD=None if self.prototypes is None else self.prototypes(),
        )

    def _read_films(self, batch: ImageReportBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Features of patches, pooled features, and the weights of patches."""
        if self.settings.patch_weights == "attention":
            features_BPC, pooled_BC, attention_BP = self.image_encoder.with_attention(batch.image_B1HW)
            everything_BP = torch.ones_like(attention_BP, dtype=torch.bool)
            return features_BPC, pooled_BC, clipped_weights(attention_BP.detach(), everything_BP)
        encode = self.image_encoder if self.settings.regions == "last" else self.image_encoder.before_last
        features_BPC, pooled_BC = encode(batch.image_B1HW)
        everything_BP = torch.ones(features_BPC.shape[:2], dtype=torch.bool, device=features_BPC.device)
        return features_BPC, pooled_BC, equal_weights(everything_BP, features_BPC.dtype)

    def _read_reports(self, batch: ImageReportBatch) -> tuple[Tensor, Tensor | None]:
        if self.settings.word_weights == "attention":
            return self.text_encoder.states_and_attention(batch)
        tokens = batch.token_BT, batch.token_mask_BT
        return self.text_encoder.token_states(*tokens, batch.by_length_B, batch.slice_tokens), None


class Mgca(Method[Settings]):
    """One stage, three losses; a clustering only if its centroids are the prototypes."""

    statistics = ("mean_cosine", "prototypes_used", "code_agreement", "patches_std", "attended_std")
    collapse_statistics = ("patches_std", "attended_std")

    def build_model(self, vocabulary_size: int) -> MgcaModel:
        own, model, train = self.settings, self.config.model, self.config.train
        reader = partial(AttentiveTextEncoder, pooling="cls", head=own.heads)
        encoders = build_encoders(self.config, vocabulary_size, reader)
        check_attention(encoders[0], own)
        if own.text_layers:
            keep_first_layers(encoders[1], own.text_layers, model.text_encoder)
        backbones: tuple[Any, ...] = encoders[0].backbone, encoders[1].backbone
        for backbone, kind in zip(backbones, (own.patch_weights, own.word_weights), strict=True):
            if kind == "attention":
                backbone.set_attn_implementation("eager")
        if own.num_prototypes > train.compared and distributed.rank() == 0:
            logger.warning(
                "objective.num_prototypes %d is more than the %d studies that are compared at a time: not all will be used",
                own.num_prototypes, train.compared,
            )  # fmt: skip
        return MgcaModel(*encoders, model.embed_dim, own)

    def terms(self, stage: int) -> tuple[str, ...]:
        return ("loss", "loss_global", "loss_tokens", "loss_prototypes")

    def losses(
        self, outputs: Any, batch: ImageReportBatch, centroids: Mapping[str, Tensor | None], stage: int, step: int
    ) -> Losses:
        own, wide = self.settings, in_full_precision(outputs)
        hash_B = batch.report_hash_B if own.same_text == "left_out" else None
        scale = wide.image_BD.new_full((1,), 1 / own.temperature)
        films, reports = directed_losses(wide.image_BD, wide.report_BD, hash_B, scale, self.wire_dtype)
        tokens, attended_BPD = token_alignment_loss(wide, own)
        prototypes, used, agreement = self._prototype_loss(wide, centroids.get(BANK), step)
        # the global loss is the sum of both directions, as published
        terms = {"loss_global": films + reports, "loss_tokens": tokens, "loss_prototypes": prototypes}
        weights = {
            "loss_global": own.global_weight,
            "loss_tokens": own.token_weight,
            "loss_prototypes": own.prototype_weight,
        }
        weighted = {name: weight_at(weights[name], step) * term for name, term in terms.items()}
        total = sum(weighted.values(), start=torch.zeros_like(tokens))
        image_BD, report_BD = wide.image_BD.detach(), wide.report_BD.detach()
        cosine = image_BD.mean(0) @ all_reduce(report_BD.mean(0)) / distributed.world_size()
        statistics = column(cosine, used, agreement, spread(wide.patches_BPD), spread(attended_BPD))
        bank_rows = {bank.name: torch.cat([image_BD, report_BD]) for bank in self.banks}
        return Losses(total, column(total, *terms.values()), statistics, bank_rows, weighted)

    def _prototype_loss(
        self, outputs: MgcaOutputs, centroids_KD: Tensor | None, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of prototypes, how many have a study, and the share of studies whose film and report have the same."""
        own, rows_KD = self.settings, centroids_KD
        if outputs.prototypes_KD is not None:
            rows_KD = frozen_until(outputs.prototypes_KD, own.freeze_steps, step)
        if rows_KD is None:
            return (outputs.image_BD.sum() * 0.0,) * 3
        score_2BK = torch.stack([outputs.image_BD, outputs.report_BD]) @ rows_KD.to(outputs.image_BD.dtype).T
        code_2GK = codes_of_all_ranks(score_2BK, None, own.epsilon, own.rounds)
        loss = swapped_loss(score_2BK, own_rows(code_2GK, score_2BK.shape[1]), own.prototype_temperature)
        most_2G = code_2GK.argmax(-1)
        used = torch.zeros_like(code_2GK[0, 0]).index_fill_(0, most_2G.flatten(), 1.0).sum()
        return loss, used, (most_2G[0] == most_2G[1]).to(loss.dtype).mean()

    def attention(self, model: DualEncoder, outputs: Any) -> SentenceAttention:
        """A sentence's weights are the mean of its words'."""
        wide = in_full_precision(outputs)
        weight_BTP = (wide.words_BTD @ wide.patches_BPD.mT / self.settings.local_temperature).softmax(-1)
        weight_BSP = sentence_means(weight_BTP, wide.sentence_of_word_BT, wide.sentences_BSD.shape[1])
        return SentenceAttention(weight_BSP @ wide.patches_BPD, weight_BSP)


METHOD = Mgca


def token_alignment_loss(outputs: MgcaOutputs, own: Settings) -> tuple[Tensor, Tensor]:
    """Words and patches of a study find what they attend to among those of the same study; and what patches attend to."""
    patches_BPD, words_BTD, mask_BT = outputs.patches_BPD, outputs.words_BTD, outputs.word_mask_BT
    scale = 1 / own.local_temperature
    seen_BTD = attended(words_BTD, patches_BPD, scale)
    words = within_study_losses(words_BTD, unit(seen_BTD), outputs.word_weight_BT, scale, mask_BT)
    read_BPD = attended(patches_BPD, words_BTD, scale, mask_BT)
    if own.attended_patches == "unit":
        read_BPD = unit(read_BPD)
    patches = within_study_losses(patches_BPD, read_BPD, outputs.patch_weight_BP, scale)
    return torch.stack([*words, *patches]).sum() / 2, unit(read_BPD)


def attended(own_BLD: Tensor, other_BMD: Tensor, scale: float, mask_BM: Tensor | None = None) -> Tensor:
    """What each part attends to among the unmasked others, with a softmax of ``scale`` times their products; (B, L, D)."""
    product_BLM = scale * own_BLD @ other_BMD.mT
    if mask_BM is not None:
        product_BLM = product_BLM.masked_fill(~mask_BM.unsqueeze(1), -torch.inf)
    return product_BLM.softmax(-1) @ other_BMD


def clipped_weights(attention_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Attention within its quantiles of 10 and 90 % of each study, divided by its sum; 0 where masked."""
    sorted_BL = attention_BL.masked_fill(~mask_BL, torch.inf).sort(1).values
    last_B1 = mask_BL.sum(1, keepdim=True).clamp(min=1) - 1
    limits = []
    for share in (0.1, 0.9):
        place_B1 = share * last_B1.to(attention_BL.dtype)
        below_B1 = place_B1.floor().long()
        above_B1 = torch.minimum(below_B1 + 1, last_B1)
        limits.append(torch.lerp(sorted_BL.gather(1, below_B1), sorted_BL.gather(1, above_B1), place_B1 - below_B1))
    kept_BL = attention_BL.clamp(*limits).masked_fill(~mask_BL, 0.0)
    return kept_BL / kept_BL.sum(1, keepdim=True)


def check_attention(image_encoder: ImageEncoder, own: Settings) -> None:
    """Raise ``UserError`` if patches are to be weighted by an attention that the encoder does not have."""
    backbone = image_encoder.backbone
    if own.patch_weights == "attention" and not (image_encoder.prefix and isinstance(backbone, PreTrainedModel)):
        raise UserError(
            f"objective.patch_weights attention: a {type(backbone).__name__} has no [CLS] token; give a ViT, or "
            "objective.patch_weights=uniform"
        )


def keep_first_layers(text_encoder: TextEncoder, number: int, name: str) -> None:
    """Drop the layers of a BERT after the first ``number``.

    Raises:
        UserError: the text encoder ``name`` has fewer, or is not built like BERT.
    """
    backbone = text_encoder.backbone
    layers = getattr(getattr(backbone, "encoder", None), "layer", None)
    if layers is None or number > len(layers):
        has = "is not built like BERT" if layers is None else f"has {len(layers)} layers"
        raise UserError(f"objective.text_layers {number}: model.text_encoder {name} {has}; give fewer, or 0 for all")
    backbone.encoder.layer = layers[:number]
    backbone.config.num_hidden_layers = number
