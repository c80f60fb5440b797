"""GLoRIA: the words of a text find film regions, beside InfoNCE of whole films and texts (Huang et al., ICCV 2021).

Read from the released code (marshuang80/gloria). Its softmax over words is not in the paper's formula. Formulas: docs/methods.md.

B studies on this rank, G studies on all ranks, c texts of one chunk, T words of a text (padded), R regions of a film, S sentences
(padded), D embedding.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cmcgns import distributed
from cmcgns.config import MethodSettings
from cmcgns.data.batch import ImageReportBatch, with_one_sentence
from cmcgns.distributed import all_gather, all_gather_with_grad
from cmcgns.errors import UserError
from cmcgns.methods.base import Losses, Method, SentenceAttention, column, in_full_precision
from cmcgns.methods.contrastive import directed_losses, same_text_mask
from cmcgns.methods.loss_weights import LossWeight, weight_at
from cmcgns.models.attention import unit
from cmcgns.models.backbones import ImageEncoder
from cmcgns.models.dual_encoder import DualEncoder, build_encoders
from cmcgns.models.text import PooledTextEncoder, TextEncoder, sentence_means, whole_words

CHUNK_WEIGHTS = 2**25
"""Attention weights (films x texts x words x regions) of one chunk; the backward pass computes chunks again."""


class Settings(MethodSettings):
    region_scale: float = Field(4.0, gt=0.0)
    """Factor before the softmax over regions (published as temp1)."""
    word_scale: float = Field(5.0, gt=0.0)
    """Factor of a word's cosine in the sum over words (published as temp2)."""
    loss_scale: float = Field(10.0, gt=0.0)
    """Factor of the scores in both losses (published as temp3), never learned."""
    words: Literal["sum", "mean"] = "sum"
    """A text's score is the logarithm of a sum over its words (published; long texts score higher on all films), or of a mean."""
    whole_words: bool = False
    """Sum the pieces of a word to one word (published), or count each piece of the vocabulary as a word."""
    local_features: Literal["raw", "unit"] = "raw"
    """Words and regions as projected (published), or of length 1, with which attention stays flat."""
    regions: Literal["last", "before_last"] = "last"
    """Feature map of the image encoder whose positions are regions: the last one, or that before the last stage, with four times
    as many (published for ResNet-50)."""
    word_layers: int = Field(1, ge=1)
    """Last layers of the text encoder whose sum is the state of a word (published: 4)."""
    same_text: Literal["left_out", "negatives"] = "left_out"
    """Two studies whose texts are the same: neither positives nor negatives of each other, or negatives like all others
    (published)."""
    caption: Literal["report", "sentence"] = "report"
    """Text of a study in training: the whole report, or one sentence drawn for each study and epoch (published). Validation and
    evaluation read whole reports."""
    global_weight: LossWeight = 1.0
    """Weight of InfoNCE between whole films and texts; a number or a ramp."""
    local_weight: LossWeight = 1.0
    """Weight of InfoNCE by words and regions; a number or a ramp."""

    def sweep_space(self, sentences: int) -> dict[str, Any]:
        """The three scales."""
        return {
            f"objective.{name}_scale": {"log_uniform": [low, high]}
            for name, low, high in (("region", 1.0, 16.0), ("word", 1.0, 20.0), ("loss", 2.0, 50.0))
        }


class GloriaOutputs(NamedTuple):
    """Outputs for one microbatch."""

    image_BD: Tensor
    """Normalised film embeddings."""
    report_BD: Tensor
    """Normalised text embeddings: means over tokens."""
    sentences_BSD: Tensor
    """Normalised sentence embeddings, zero where padded."""
    regions_BRD: Tensor
    """Regions of films in raster order, not normalised."""
    words_BTD: Tensor
    """Words of texts, not normalised; any values where padded."""
    word_mask_BT: Tensor
    """True for [CLS] and for words; not for [SEP] and padding."""
    sentence_of_word_BT: Tensor
    """Which sentence a word belongs to, -1 for [CLS], [SEP] and padding."""
    text_hash_B: Tensor
    """Hash of the text that was embedded: the report's, or the drawn sentence's."""


class GloriaModel(DualEncoder):
    """The two encoders and a projection of regions; words have that of the text encoder."""

    text_encoder: PooledTextEncoder

    def __init__(self, image_encoder: ImageEncoder, text_encoder: TextEncoder, dim: int, settings: Settings) -> None:
        super().__init__(image_encoder, text_encoder, dim, 1 / settings.loss_scale, learn_temperature=False)
        self.settings = settings
        last = settings.regions == "last"
        channels = image_encoder.dim if last else image_encoder.dim_before_last
        self.region_projection = nn.Linear(channels, dim, bias=False)
        nn.init.normal_(self.region_projection.weight, std=channels**-0.5)

    def forward(self, batch: ImageReportBatch, stage: int = 1) -> GloriaOutputs:
        """Embeddings of one microbatch."""
        own, encoder = self.settings, self.text_encoder
        read = with_one_sentence(batch) if self.training and own.caption == "sentence" else batch
        if own.regions == "last":
            features_BRC, pooled_BC = self.image_encoder(batch.image_B1HW)
        else:
            features_BRC, pooled_BC = self.image_encoder.before_last(batch.image_B1HW)
        owner_BT, mask_BT = read.sentence_of_token_BT, read.token_mask_BT
        hidden_BTC = encoder.token_states(read.token_BT, mask_BT, read.by_length_B, read.slice_tokens)
        sentences_BSD, report_BD = encoder.embed(hidden_BTC, mask_BT, owner_BT, read.sentence_mask_BS)
        word_BTC = hidden_BTC
        if own.whole_words:
            assert read.continues_BT is not None
            word_BTC, owner_BT = whole_words(hidden_BTC, read.continues_BT, owner_BT)
        first_T = torch.arange(mask_BT.shape[1], device=mask_BT.device) == 0
        return GloriaOutputs(
            image_BD=unit(self.image_projection(pooled_BC)),
            report_BD=report_BD,
            sentences_BSD=sentences_BSD,
            regions_BRD=self.region_projection(features_BRC),
            words_BTD=encoder.projection(word_BTC),
            word_mask_BT=(owner_BT >= 0) | first_T,
            sentence_of_word_BT=owner_BT,
            text_hash_B=read.report_hash_B,
        )


class Gloria(Method[Settings]):
    """One stage, two losses, no clustering."""

    statistics = ("word_norm", "region_norm")

    def build_model(self, vocabulary_size: int) -> GloriaModel:
        reader = partial(PooledTextEncoder, pooling="mean", layers=self.settings.word_layers)
        encoders = build_encoders(self.config, vocabulary_size, reader)
        layers = encoders[1].backbone.config.num_hidden_layers
        if self.settings.word_layers > layers:
            name, given = self.config.model.text_encoder, self.settings.word_layers
            raise UserError(
                f"objective.word_layers {given}: model.text_encoder {name} has {layers} layers; give at most {layers}"
            )
        return GloriaModel(*encoders, self.config.model.embed_dim, self.settings)

    def terms(self, stage: int) -> tuple[str, ...]:
        return ("loss", "loss_global", "loss_local")

    def losses(
        self, outputs: Any, batch: ImageReportBatch, centroids: Mapping[str, Tensor | None], stage: int, step: int
    ) -> Losses:
        own, wide = self.settings, in_full_precision(outputs)
        hash_B = wide.text_hash_B if own.same_text == "left_out" else None
        scale = wide.image_BD.new_full((1,), own.loss_scale)
        # the losses are sums of both directions, as published
        both = {
            "loss_global": directed_losses(wide.image_BD, wide.report_BD, hash_B, scale, self.wire_dtype),
            "loss_local": local_losses(*self._local(wide), wide.word_mask_BT, hash_B, own, self.wire_dtype),
        }
        terms = {name: films + texts for name, (films, texts) in both.items()}
        weights = {"loss_global": own.global_weight, "loss_local": own.local_weight}
        weighted = {name: weight_at(weights[name], step) * term for name, term in terms.items()}
        total = weighted["loss_global"] + weighted["loss_local"]
        mask_BT = wide.word_mask_BT
        word_norm = ((wide.words_BTD.norm(dim=-1) * mask_BT).sum(1) / mask_BT.sum(1)).mean()
        statistics = column(word_norm, wide.regions_BRD.norm(dim=-1).mean())
        return Losses(total, column(total, *terms.values()), statistics, weighted=weighted)

    def attention(self, model: DualEncoder, outputs: Any) -> SentenceAttention:
        """A sentence's weights are the mean of its words'."""
        wide = in_full_precision(outputs)
        regions_BRD, words_BTD = self._local(wide)
        weight_BTR = region_weights(words_BTD @ regions_BRD.mT, wide.word_mask_BT, self.settings.region_scale)
        weight_BSR = sentence_means(weight_BTR, wide.sentence_of_word_BT, wide.sentences_BSD.shape[1])
        return SentenceAttention(weight_BSR @ regions_BRD, weight_BSR)

    def _local(self, outputs: GloriaOutputs) -> tuple[Tensor, Tensor]:
        """Regions and words, of length 1 if the settings say so."""
        both = outputs.regions_BRD, outputs.words_BTD
        return both if self.settings.local_features == "raw" else (unit(both[0]), unit(both[1]))


METHOD = Gloria


def local_losses(
    regions_BRD: Tensor,
    words_BTD: Tensor,
    mask_BT: Tensor,
    text_hash_B: Tensor | None,
    own: Settings,
    wire_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """InfoNCE of this rank's films among the texts of every rank, and of its texts among all films, by words. Collective.

    Words travel and regions stay: each rank scores the texts of all ranks on its own films, and sends the scores back. Without
    hashes every other text is a negative.
    """
    size, offset = len(regions_BRD), distributed.rank() * len(regions_BRD)
    [longest] = map(max, zip(*distributed.exchange([words_BTD.shape[1]]), strict=True))
    missing = longest - words_BTD.shape[1]
    words_GTD = all_gather_with_grad(F.pad(words_BTD, (0, 0, 0, missing)), wire_dtype)
    mask_GT = all_gather(F.pad(mask_BT, (0, missing)).byte()).bool()
    film_to_text_BG = text_scores(regions_BRD, words_GTD, mask_GT, own)
    text_to_film_BG = distributed.to_owners(film_to_text_BG.T, (size,) * distributed.world_size())
    if text_hash_B is not None:
        same_text_BG = same_text_mask(text_hash_B, all_gather(text_hash_B), offset)
        film_to_text_BG = film_to_text_BG.masked_fill(same_text_BG, -torch.inf)
        text_to_film_BG = text_to_film_BG.masked_fill(same_text_BG, -torch.inf)
    label_B = torch.arange(offset, offset + size, device=regions_BRD.device)
    return F.cross_entropy(film_to_text_BG, label_B), F.cross_entropy(text_to_film_BG, label_B)


def text_scores(regions_BRD: Tensor, words_GTD: Tensor, mask_GT: Tensor, own: Settings) -> Tensor:
    """How well the words of each text match what they attend to on each film, (B, G)."""
    gram_BRR = regions_BRD @ regions_BRD.mT
    rows = max(CHUNK_WEIGHTS // (regions_BRD[..., 0].numel() * words_GTD.shape[1]), 1)
    if len(words_GTD) <= rows:
        return _text_scores(regions_BRD, gram_BRR, words_GTD, mask_GT, own)
    chunks = [
        # nothing random in it, and to save a GPU's random state is to wait for the GPU
        checkpoint(_text_scores, regions_BRD, gram_BRR, *texts, own, use_reentrant=False, preserve_rng_state=False)
        for texts in zip(words_GTD.split(rows), mask_GT.split(rows), strict=True)
    ]
    return torch.cat(chunks, dim=1)


def _text_scores(regions_BRD: Tensor, gram_BRR: Tensor, words_cTD: Tensor, mask_cT: Tensor, own: Settings) -> Tensor:
    """``text_scores`` without chunks."""
    product_BcTR = torch.einsum("ctd,brd->bctr", words_cTD, regions_BRD)
    weight_BcTR = region_weights(product_BcTR, mask_cT, own.region_scale)
    cosine_BcT = word_cosines(product_BcTR, weight_BcTR, gram_BRR, words_cTD)
    score_Bc = (own.word_scale * cosine_BcT).masked_fill(~mask_cT, -torch.inf).logsumexp(-1)
    if own.words == "mean":
        score_Bc = score_Bc - mask_cT.sum(-1).to(score_Bc.dtype).log()
    return own.loss_scale * score_Bc


def word_cosines(product_BcTR: Tensor, weight_BcTR: Tensor, gram_BRR: Tensor, words_cTD: Tensor) -> Tensor:
    """Cosine of each word with what it attends to on each film, (B, c, T).

    What it attends to is never built: with weights a, its product with the word is the sum of a times the products of regions
    and word, and its squared length a' (v v') a.
    """
    dot_BcT = (weight_BcTR * product_BcTR).sum(-1)
    square_BcT = ((weight_BcTR.flatten(1, 2) @ gram_BRR).view_as(weight_BcTR) * weight_BcTR).sum(-1)
    length_BcT = words_cTD.norm(dim=-1) * square_BcT.clamp(min=1e-24).sqrt()
    return dot_BcT / length_BcT.clamp(min=1e-8)


def region_weights(product_TR: Tensor, mask_T: Tensor, scale: float) -> Tensor:
    """Weights of regions for each word, (..., T, R), from products (..., T, R) of words and regions.

    Each region first spreads over the words of the text, then each word over the regions.
    """
    share_TR = product_TR.masked_fill(~mask_T.unsqueeze(-1), -torch.inf).softmax(-2)
    return (scale * share_TR).softmax(-1)
