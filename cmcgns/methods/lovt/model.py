"""What LoVT adds to the two encoders: pools that say how much each part counts, heads, and symmetric attention.

B studies, P patches, S sentences (padded), n real sentences of this rank, L parts (patches or sentences), N rows, H heads,
C channels of a backbone, D embedding.
"""

import math
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cmcgns.data.batch import ImageReportBatch
from cmcgns.errors import UserError
from cmcgns.models.attention import linear, masked_mean, unit
from cmcgns.models.backbones import ImageEncoder
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.models.text import TextEncoder, in_slices, sentence_maxima

Norm = Literal["layer", "batch", "none"]
POOL_HEADS = 8


class LovtOutputs(NamedTuple):
    """Outputs for one microbatch."""

    image_BD: Tensor
    """Normalised film embeddings."""
    report_BD: Tensor
    """Normalised report embeddings."""
    patches_BPD: Tensor
    """Normalised patches in raster order."""
    sentences_BSD: Tensor
    """Normalised sentences, zero where padded."""
    text_to_image_BPD: Tensor
    """What each patch reads in its study's sentences, not normalised."""
    image_to_text_BSD: Tensor
    """What each sentence sees on its study's patches, not normalised; zero where padded."""
    patch_weight_BP: Tensor
    """Attention of the film's pool, sum 1, without gradient."""
    sentence_weight_BS: Tensor
    """Attention of the report's pool, sum 1 and zero where padded, without gradient."""
    sentence_patch_weight_BSP: Tensor
    """Attention of each sentence over patches."""


class WeightedPool(nn.Module):
    """Multi-head attention; the query is the mean of the real parts, which are keys and values."""

    def __init__(self, dim: int, heads: int = POOL_HEADS) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(
                f"method.name lovt pools with {heads} heads, which do not divide an encoder's {dim} channels; give one with a "
                f"multiple of {heads}"
            )
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.uniform_(
                layer.weight, -math.sqrt(1.5 / dim), math.sqrt(1.5 / dim)
            )  # as nn.MultiheadAttention starts
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.zeros_(layer.bias)

    def forward(self, parts_BLC: Tensor, mask_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One vector per study (B, C), and the weights of its parts, the mean over heads (B, L)."""
        query_BH1d = self._split(self.q_proj(masked_mean(parts_BLC, mask_BL).unsqueeze(1)))
        product_BH1L = query_BH1d @ self._split(self.k_proj(parts_BLC)).mT / math.sqrt(query_BH1d.shape[-1])
        if mask_BL is not None:
            product_BH1L = product_BH1L.masked_fill(~mask_BL[:, None, None], -torch.inf)
        weight_BH1L = product_BH1L.softmax(-1)
        pooled_BH1d = weight_BH1L @ self._split(self.v_proj(parts_BLC))
        return self.out_proj(pooled_BH1d.transpose(1, 2).flatten(1)), weight_BH1L.squeeze(2).mean(1)

    def _split(self, rows_BLC: Tensor) -> Tensor:
        return rows_BLC.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def norm_of(kind: Norm, dim: int) -> nn.Module:
    """A norm over rows (N, D)."""
    return {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "none": nn.Identity}[kind](dim)


class Head(nn.Module):
    """A projection of two layers with a norm and a ReLU between them."""

    def __init__(self, dim_in: int, hidden: int, dim: int, norm: Norm) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(dim_in, hidden), norm_of(norm, hidden), nn.Linear(hidden, dim)
        for layer, std in ((self.first, (2 / hidden) ** 0.5), (self.second, dim**-0.5)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., D) from (..., C); all rows must be real, since a batch norm counts them."""
        hidden_ND = self.norm(self.first(rows).flatten(0, -2))
        return self.second(hidden_ND.relu()).unflatten(0, rows.shape[:-1])


def scattered(rows_nD: Tensor, row_n: Tensor, shape: torch.Size) -> Tensor:
    """Rows of real sentences as (B, S, D), zero where padded."""
    zeros_XD = rows_nD.new_zeros((shape[0] * shape[1], rows_nD.shape[1]))
    return zeros_XD.index_copy(0, row_n, rows_nD).unflatten(0, tuple(shape[:2]))


class Read(NamedTuple):
    """What both modalities attend to; each field as in ``LovtOutputs``."""

    text_to_image_BPD: Tensor
    image_to_text_BSD: Tensor
    sentence_patch_weight_BSP: Tensor


class SymmetricAttention(nn.Module):
    """One head; one key, value and output map for both modalities, so that both directions have the same scores."""

    def __init__(self, dim: int, norm: Norm) -> None:
        super().__init__()
        self.key, self.value, self.output = (linear(dim, dim) for _ in range(3))
        # one for each direction: with a common one running statistics would mix both
        self.patch_norm, self.sentence_norm = norm_of(norm, dim), norm_of(norm, dim)

    def forward(self, patches_BPD: Tensor, sentences_BSD: Tensor, mask_BS: Tensor, row_n: Tensor) -> Read:
        """What patches read and sentences see; padded sentences are not read and see nothing."""
        product_BPS = self.scores(patches_BPD, sentences_BSD)
        share_BPS = shares(product_BPS, mask_BS)
        weight_BSP = product_BPS.mT.softmax(-1) * mask_BS.unsqueeze(-1)
        read_BPD = self.output(share_BPS @ self.value(sentences_BSD))
        seen_nD = self.output((weight_BSP @ self.value(patches_BPD)).flatten(0, 1).index_select(0, row_n))
        read_BPD = self.patch_norm(read_BPD.flatten(0, 1)).view_as(read_BPD)
        return Read(read_BPD, scattered(self.sentence_norm(seen_nD), row_n, mask_BS.shape), weight_BSP)

    def scores(self, patches_BPD: Tensor, sentences_BSD: Tensor) -> Tensor:
        """How well each patch fits each sentence, (B, P, S)."""
        return self.key(patches_BPD) @ self.key(sentences_BSD).mT / math.sqrt(patches_BPD.shape[-1])


def shares(product_BPS: Tensor, mask_BS: Tensor) -> Tensor:
    """Attention of each patch over the real sentences of its study, (B, P, S)."""
    return product_BPS.masked_fill(~mask_BS.unsqueeze(1), -torch.inf).softmax(-1)


class LovtImageEncoder(ImageEncoder):
    """Pools patches by attention and gives their weights; the backbone's own [CLS] is not used."""

    pool: WeightedPool

    def __init__(self, backbone: PreTrainedModel, image_size: int, *options: bool) -> None:
        super().__init__(backbone, image_size, *options)
        self.pool = WeightedPool(self.dim)

    def with_weights(self, image_B1HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``features_BPC``, ``pooled_BC`` and the weights of patches (B, P)."""
        hidden = self.backbone(pixel_values=self._pixels(image_B1HW), **self.forward_options).last_hidden_state
        features_BPC = self._patches(hidden)
        return features_BPC, *self.pool(features_BPC)

    def _features(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        features_BPC = self._patches(hidden)
        return features_BPC, self.pool(features_BPC)[0]


class ReadReports(NamedTuple):
    """What ``LovtTextEncoder`` makes of reports."""

    sentences_BSD: Tensor
    """Sentences, not normalised; zero where padded."""
    report_BD: Tensor
    """Normalised report embeddings."""
    weight_BS: Tensor
    """Attention of the pool over sentences."""


class LovtTextEncoder(TextEncoder):
    """A sentence is the maximum over its tokens' states, a report pools its sentences; each has a head of its own."""

    pool: WeightedPool  # type: ignore[assignment]

    def __init__(self, backbone: PreTrainedModel, dim: int, hidden: int, norm: Norm) -> None:
        super().__init__(backbone, dim)
        channels = backbone.config.hidden_size
        self.pool = WeightedPool(channels)
        self.projection, self.report_projection = (Head(channels, hidden, dim, norm) for _ in range(2))

    def read(self, batch: ImageReportBatch) -> ReadReports:
        """Sentences and reports of a batch."""
        mask_BS = batch.sentence_mask_BS
        tokens = batch.token_BT, batch.token_mask_BT, batch.sentence_of_token_BT
        return self._read(tokens, mask_BS, batch.sentence_row_n, batch.by_length_B, batch.slice_tokens)

    def forward(
        self,
        token_BT: Tensor,
        token_mask_BT: Tensor,
        sentence_of_token_BT: Tensor,
        sentence_mask_BS: Tensor,
        by_length_B: Tensor | None = None,
        slice_tokens: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        row_n = sentence_mask_BS.flatten().nonzero()[:, 0]
        tokens = token_BT, token_mask_BT, sentence_of_token_BT
        found = self._read(tokens, sentence_mask_BS, row_n, by_length_B, slice_tokens)
        return unit(found.sentences_BSD), found.report_BD

    def _read(
        self,
        tokens: tuple[Tensor, Tensor, Tensor],
        mask_BS: Tensor,
        row_n: Tensor,
        by_length_B: Tensor | None,
        slice_tokens: tuple[int, ...],
    ) -> ReadReports:
        read = partial(self._sentences, size_S=mask_BS.shape[1])
        sentences_BSC = in_slices(read, tokens, by_length_B, slice_tokens)
        pooled_BC, weight_BS = self.pool(sentences_BSC, mask_BS)
        own_nD = self.projection(sentences_BSC.flatten(0, 1).index_select(0, row_n))
        return ReadReports(scattered(own_nD, row_n, mask_BS.shape), unit(self.report_projection(pooled_BC)), weight_BS)

    def _sentences(self, token_BT: Tensor, token_mask_BT: Tensor, sentence_of_token_BT: Tensor, size_S: int) -> Tensor:
        """Maxima of each sentence's token states, (B, S, C)."""
        mask = self._attention_mask(token_mask_BT)
        hidden_BTC = self.backbone(input_ids=token_BT, attention_mask=mask).last_hidden_state
        return sentence_maxima(hidden_BTC, sentence_of_token_BT, size_S)


class LovtModel(DualEncoder):
    """The two encoders with their pools and heads, and symmetric attention."""

    image_encoder: LovtImageEncoder
    text_encoder: LovtTextEncoder

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        dim: int,
        temperature: float,
        hidden: int,
        norm: Norm,
    ) -> None:
        super().__init__(image_encoder, text_encoder, dim, temperature, learn_temperature=False)
        self.image_projection = Head(image_encoder.dim, hidden, dim, norm)
        self.patch_projection = Head(image_encoder.dim, hidden, dim, norm)
        self.attention = SymmetricAttention(dim, norm)

    def forward(self, batch: ImageReportBatch, stage: int = 1) -> LovtOutputs:
        """Embeddings of one microbatch, and what patches and sentences read in each other."""
        features_BPC, pooled_BC, patch_weight_BP = self.image_encoder.with_weights(batch.image_B1HW)
        patches_BPD = self.patch_projection(features_BPC)
        reports = self.text_encoder.read(batch)
        read = self.attention(patches_BPD, reports.sentences_BSD, batch.sentence_mask_BS, batch.sentence_row_n)
        return LovtOutputs(
            image_BD=unit(self.image_projection(pooled_BC)),
            report_BD=reports.report_BD,
            patches_BPD=unit(patches_BPD),
            sentences_BSD=unit(reports.sentences_BSD),
            text_to_image_BPD=read.text_to_image_BPD,
            image_to_text_BSD=read.image_to_text_BSD,
            patch_weight_BP=patch_weight_BP.detach(),
            sentence_weight_BS=reports.weight_BS.detach(),
            sentence_patch_weight_BSP=read.sentence_patch_weight_BSP,
        )
