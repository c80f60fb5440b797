"""What PRIOR adds to the two encoders: a prototype bank, a decoder of sentences, and CM-CGNS's attention and film decoder.

B studies, P patches, S sentences (padded), n real sentences of this rank, K prototypes, Q generated rows, D embedding.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from cmcgns.data.batch import NOISE_STREAM, ImageReportBatch, keyed_gumbel, mask_positions, sentence_keys
from cmcgns.methods.cm_cgns.model import (
    ConvolutionalDecoder,
    CrossModalAttention,
    TransformerDecoder,
    hide,
)
from cmcgns.methods.prior.matching import matches, wide
from cmcgns.methods.prior.settings import Settings
from cmcgns.models.attention import linear, unit
from cmcgns.models.backbones import ImageEncoder
from cmcgns.models.dual_encoder import DualEncoder, clamped_scale
from cmcgns.models.text import TextEncoder, in_slices, sentence_means

BANK = ("text_encoder.bank.",)
DECODERS = ("sentence_decoder.", "decoder.", "mask_token")
"""Name prefixes of the parameters that only stage 3 trains."""


class PriorOutputs(NamedTuple):
    """Outputs for one microbatch; fields from ``picked`` on are None in stages that do not have them."""

    image_BD: Tensor
    """Normalised film embeddings."""
    report_BD: Tensor
    """Normalised report embeddings."""
    patches_BPD: Tensor
    """Patches in raster order, not normalised."""
    sentences_BSD: Tensor
    """Sentences that meet the film, not normalised, zero where left out: as read in stage 1, then what they pick in the bank."""
    kept_BS: Tensor
    """True for real sentences that take part: in stage 3 at most the first Q."""
    image_to_text_BSD: Tensor
    """What each sentence attends to on its film, not normalised."""
    text_to_image_BPD: Tensor
    """What each patch attends to in its report, not normalised."""
    predicted_patches_BPD: Tensor
    """SimSiam prediction from the patches."""
    predicted_attended_BPD: Tensor
    """SimSiam prediction from what patches attend to."""
    scale: Tensor
    """Inverse temperature of films and reports, shape (1,)."""
    local_scale: Tensor
    """Inverse temperature of sentences, shape (1,)."""
    read_nD: Tensor | None = None
    """Sentences as read."""
    picked_nD: Tensor | None = None
    """What they pick in the bank."""
    logits_nK: Tensor | None = None
    """Products of sentences and prototypes."""
    noisy_nK: Tensor | None = None
    """The same with noise; in validation and evaluation without."""
    generated_BQD: Tensor | None = None
    """Rows generated from the film."""
    match_BQ: Tensor | None = None
    """Which generated row belongs to each of the Q rows of the report."""
    generated_logits_nK: Tensor | None = None
    """Products of prototypes and the generated row of each sentence."""
    generated_report_BD: Tensor | None = None
    """Normalised reports made of those rows."""
    masked_BP: Tensor | None = None
    """True where a patch is hidden from the reconstruction."""
    reconstruction_B1HW: Tensor | None = None
    """Films rebuilt from visible patches and reports."""


class Picked(NamedTuple):
    """What sentences pick in a bank."""

    logits_nK: Tensor
    noisy_nK: Tensor
    rows_nD: Tensor


class PrototypeBank(nn.Module):
    """K learned rows, of which each sentence is a soft choice. They do not leave the forward, in which ZeRO-3 gathers them."""

    def __init__(self, number: int, dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.randn(number, dim))
        self.used: Tensor
        self.register_buffer("used", torch.zeros(1))  # 1 once stage 2 has begun: evaluation then reads through the bank

    def forward(self, rows_nD: Tensor, noise_nK: Tensor | None) -> Picked:
        """Products with the prototypes, with and without noise, and the rows that stand for the sentences."""
        # products of some hundred, beside noise of about 1: bf16 would decide the choice by rounding
        weight_KD = wide(self.weight)
        logits_nK = wide(rows_nD) @ weight_KD.T
        noisy_nK = logits_nK if noise_nK is None else logits_nK + noise_nK.to(logits_nK.dtype)
        picked_nD = (noisy_nK / self.temperature).softmax(-1) @ weight_KD
        return Picked(logits_nK, noisy_nK, picked_nD.to(rows_nD.dtype))


class PriorTextEncoder(TextEncoder):
    """Tokens are projected and not normalised; the bank's noise is about 1, and sentences have to be larger."""

    def __init__(self, backbone: PreTrainedModel, dim: int, settings: Settings) -> None:
        super().__init__(backbone, dim)
        self.bank = PrototypeBank(settings.num_prototypes, dim, settings.prototype_temperature)

    def read(self, batch: ImageReportBatch) -> Tensor:
        """Sentences (B, S, D), zero where padded."""
        tokens = batch.token_BT, batch.token_mask_BT, batch.sentence_of_token_BT
        read = partial(self._sentences, size_S=batch.sentence_mask_BS.shape[1])
        return in_slices(read, tokens, batch.by_length_B, batch.slice_tokens)

    def forward(
        self,
        token_BT: Tensor,
        token_mask_BT: Tensor,
        sentence_of_token_BT: Tensor,
        sentence_mask_BS: Tensor,
        by_length_B: Tensor | None = None,
        slice_tokens: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        read = partial(self._sentences, size_S=sentence_mask_BS.shape[1])
        sentences_BSD = in_slices(read, (token_BT, token_mask_BT, sentence_of_token_BT), by_length_B, slice_tokens)
        if bool(self.bank.used):
            sentences_BSD = self.bank(sentences_BSD, None).rows_nD * sentence_mask_BS.unsqueeze(-1)
        return sentences_BSD, unit(self.pool(sentences_BSD, sentence_mask_BS))

    def _sentences(self, token_BT: Tensor, token_mask_BT: Tensor, sentence_of_token_BT: Tensor, size_S: int) -> Tensor:
        """Means of each sentence's tokens, (B, S, D)."""
        mask = self._attention_mask(token_mask_BT)
        hidden_BTC = self.backbone(input_ids=token_BT, attention_mask=mask).last_hidden_state
        return sentence_means(self.projection(hidden_BTC), sentence_of_token_BT, size_S)


class MultiHeadAttention(nn.Module):
    """Softmax attention of queries to keys of the same width; with every projection in a module of its own (ZeRO-3)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, own_BQD: Tensor, other_BLD: Tensor) -> Tensor:
        """What each row attends to, (B, Q, D)."""
        split = lambda rows_BLD: rows_BLD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        parts = split(self.query(own_BQD)), split(self.key(other_BLD)), split(self.value(other_BLD))
        return self.output(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class SentenceDecoderLayer(nn.Module):
    """Attention among the generated rows without a mask, attention to the patches, feed-forward; a norm after each."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.own, self.film = MultiHeadAttention(dim, heads), MultiHeadAttention(dim, heads)
        self.forth, self.back = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows_BQD: Tensor, patches_BPD: Tensor) -> Tensor:
        """The rows (B, Q, D) after the layer."""
        rows_BQD = self.norms[0](rows_BQD + self.dropout(self.own(rows_BQD, rows_BQD)))
        rows_BQD = self.norms[1](rows_BQD + self.dropout(self.film(rows_BQD, patches_BPD)))
        return self.norms[2](rows_BQD + self.dropout(self.back(F.gelu(self.forth(rows_BQD)))))


class SentenceDecoder(nn.Module):
    """Generates Q rows from the patches of a film, all at once. Every row sees every other (the release: only earlier ones)."""

    def __init__(self, rows: int, dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query_QD = nn.Parameter(torch.randn(rows, dim))
        self.position_QD = nn.Parameter(torch.randn(rows, dim) * 0.02)
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)
        self.layers = nn.ModuleList(SentenceDecoderLayer(dim, heads, dropout) for _ in range(layers))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, patches_BPD: Tensor) -> Tensor:
        """Generated rows, (B, Q, D)."""
        start_QD = self.norm(self.query_QD + self.position_QD).to(patches_BPD.dtype)
        rows_BQD = self.dropout(start_QD.expand(len(patches_BPD), -1, -1))
        for layer in self.layers:
            rows_BQD = layer(rows_BQD, patches_BPD)
        return rows_BQD


class PriorModel(DualEncoder):
    """The two encoders, attention between them, a bank of prototypes, and decoders of sentences and films."""

    text_encoder: PriorTextEncoder

    def __init__(
        self, image_encoder: ImageEncoder, text_encoder: TextEncoder, dim: int, settings: Settings, dropout: float
    ) -> None:
        super().__init__(image_encoder, text_encoder, dim, settings.temperature, learn_temperature=True)
        self.settings = settings
        self.patch_projection = linear(image_encoder.dim, dim)
        self.cross_attention = CrossModalAttention(dim)
        self.predictor = nn.Sequential(linear(dim, dim // 2), nn.ReLU(), linear(dim // 2, dim))
        self.local_log_scale = nn.Parameter(torch.full((1,), math.log(1 / settings.local_temperature)))
        # only for stage 3; mask_token is on the root module, where ZeRO-3 gathers it
        self.mask_token = nn.Parameter(torch.randn(dim) / math.sqrt(dim))
        self.sentence_decoder = SentenceDecoder(
            settings.generated_sentences, dim, settings.decoder_layers, settings.decoder_heads, dropout
        )
        kind = ConvolutionalDecoder if image_encoder.is_convolutional else TransformerDecoder
        self.decoder = kind(dim, image_encoder.grid, image_encoder.stride, settings.decoder_channels)

    def forward(self, batch: ImageReportBatch, stage: int | None = None) -> PriorOutputs:
        """Embeddings of one microbatch. Without a stage: of the trained model, without generation."""
        bank = self.text_encoder.bank
        if stage is None:
            stage = 2 if bool(bank.used) else 1
        elif stage > 1:
            bank.used.fill_(1.0)
        features_BPC, image_BD = self.embed_images(batch.image_B1HW)
        patches_BPD = self.patch_projection(features_BPC)
        sentences_BSD, kept_BS, row_n = self.text_encoder.read(batch), batch.sentence_mask_BS, batch.sentence_row_n
        if stage == 3:
            place_S = torch.arange(kept_BS.shape[1], device=kept_BS.device)
            kept_BS = kept_BS & (place_S < self.settings.generated_sentences)
        more: dict[str, Tensor | None] = {}
        if stage > 1:
            read_nD = rows_of(sentences_BSD, row_n)
            picked = bank(read_nD, self._noise(batch, 0))
            sentences_BSD = scattered(picked.rows_nD, row_n, kept_BS)
            more = {"read_nD": read_nD, "picked_nD": picked.rows_nD}
            more |= {"logits_nK": picked.logits_nK, "noisy_nK": picked.noisy_nK}
        mask_token_D = self.mask_token if stage == 3 else None
        attended = self.cross_attention(patches_BPD, sentences_BSD, kept_BS, mask_token_D)
        if stage == 3:
            more |= self._generated(batch, patches_BPD, sentences_BSD, kept_BS)
        if attended.hidden_B1D is not None:
            masked_BP = mask_positions(batch.draw_key_B, patches_BPD.shape[1], self.settings.mask_ratio)
            visible_BPD = hide(patches_BPD, self.mask_token, masked_BP)
            answered_BPD = hide(attended.text_to_image_BPD, attended.hidden_B1D, masked_BP)
            rebuilt_B1HW = self.decoder(torch.cat([visible_BPD, answered_BPD], dim=-1))
            more |= {"masked_BP": masked_BP, "reconstruction_B1HW": rebuilt_B1HW}
        return PriorOutputs(
            image_BD=image_BD,
            report_BD=unit(self.text_encoder.pool(sentences_BSD, kept_BS)),
            patches_BPD=patches_BPD,
            sentences_BSD=sentences_BSD,
            kept_BS=kept_BS,
            image_to_text_BSD=attended.image_to_text_BSD,
            text_to_image_BPD=attended.text_to_image_BPD,
            predicted_patches_BPD=self.predictor(patches_BPD),
            predicted_attended_BPD=self.predictor(attended.text_to_image_BPD),
            scale=self.scale,
            local_scale=clamped_scale(self.local_log_scale),
            **more,
        )

    def _generated(
        self, batch: ImageReportBatch, patches_BPD: Tensor, sentences_BSD: Tensor, kept_BS: Tensor
    ) -> dict[str, Tensor | None]:
        """Rows generated from films, matched with those of reports, and the reports that they make."""
        generated_BQD = self.sentence_decoder(patches_BPD)
        match_BQ = matches(generated_BQD, targets_of(sentences_BSD, generated_BQD.shape[1]))
        matched_BSD = targets_of(rearranged(generated_BQD, match_BQ), kept_BS.shape[1])
        picked = self.text_encoder.bank(rows_of(matched_BSD, batch.sentence_row_n), self._noise(batch, 1))
        made_BSD = scattered(picked.rows_nD, batch.sentence_row_n, kept_BS)
        return {
            "generated_BQD": generated_BQD,
            "match_BQ": match_BQ,
            "generated_logits_nK": picked.logits_nK,
            "generated_report_BD": unit(self.text_encoder.pool(made_BSD, kept_BS)),
        }

    def _noise(self, batch: ImageReportBatch, draw: int) -> Tensor | None:
        """Gumbel noise of the batch's sentences in training, (n, K)."""
        if not self.training:
            return None
        key_n = sentence_keys(batch.draw_key_B, batch.sentence_row_n, batch.sentence_mask_BS.shape[1])
        return keyed_gumbel(key_n, self.settings.num_prototypes, NOISE_STREAM + draw)


def rows_of(sentences_BSD: Tensor, row_n: Tensor) -> Tensor:
    """The rows of real sentences."""
    return sentences_BSD.flatten(0, 1).index_select(0, row_n)


def scattered(rows_nD: Tensor, row_n: Tensor, kept_BS: Tensor) -> Tensor:
    """Rows of real sentences as (B, S, D), zero where not kept."""
    zeros_XD = rows_nD.new_zeros((kept_BS.numel(), rows_nD.shape[1]))
    return zeros_XD.index_copy(0, row_n, rows_nD).unflatten(0, tuple(kept_BS.shape)) * kept_BS.unsqueeze(-1)


def targets_of(sentences_BSD: Tensor, size: int) -> Tensor:
    """The first ``size`` sentences of each report, with rows of zeros where it has fewer."""
    missing = max(size - sentences_BSD.shape[1], 0)
    return F.pad(sentences_BSD[:, :size], (0, 0, 0, missing))


def rearranged(generated_BQD: Tensor, match_BQ: Tensor) -> Tensor:
    """Generated rows in the order of the report's."""
    return generated_BQD.gather(1, match_BQ.unsqueeze(-1).expand_as(generated_BQD))
