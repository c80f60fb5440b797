"""The contract between model and objective: everything learnable has happened by the time this exists."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cmcgns.config import Config
from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.cm_cgns.decoder import build_decoder
from cmcgns.models.attention import CrossModalAttention, linear, unit
from cmcgns.models.backbones import ImageEncoder, build_image_backbone, build_text_backbone
from cmcgns.models.text import TextEncoder


class Outputs(NamedTuple):
    """What the model makes of one microbatch (a NamedTuple for ZeRO-3's hooks).

    B studies, P patches, S sentences (padded), D embedding.
    """

    image_BD: Tensor
    """Normalised film embeddings."""
    report_BD: Tensor
    """Normalised report embeddings."""
    patches_BPD: Tensor
    """Normalised patch embeddings."""
    sentences_BSD: Tensor
    """Sentence embeddings: means of normalised tokens, not normalised themselves."""
    image_to_text_BSD: Tensor
    """Each sentence's attention over its study's patches, raw."""
    text_to_image_BPD: Tensor
    """Each patch's attention over its study's sentences, raw."""
    predicted_patches_BPD: Tensor
    """SimSiam prediction from the patches."""
    predicted_attended_BPD: Tensor
    """SimSiam prediction from the attended sentences."""
    scale: Tensor
    """Inverse temperature of the global loss, shape (1,)."""
    reconstruction_B1HW: Tensor | None
    """Films rebuilt from unmasked patches and reports (stage 2)."""


MIN_SCALE, MAX_SCALE = 1.0, 100.0
RECONSTRUCTION_PARTS = ("decoder.", "mask_token")
"""Names of the parameters that only stage 2 trains."""


class VisionLanguageModel(nn.Module):
    """Image and text encoder, cross-modal attention, SimSiam predictor, decoder and temperature."""

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        dim: int,
        temperature: float,
        learn_temperature: bool,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.patch_projection = linear(image_encoder.dim, dim)
        self.image_projection = linear(image_encoder.dim, dim)
        self.cross_attention = CrossModalAttention(dim)
        self.predictor = nn.Sequential(linear(dim, dim // 2), nn.ReLU(), linear(dim // 2, dim))
        # CM-MIR's own parts; they stay out of stage 1's optimizer. The token belongs to the root, where ZeRO-3 has it at hand
        self.mask_token = nn.Parameter(torch.randn(dim) / math.sqrt(dim))
        self.decoder = build_decoder(dim, image_encoder.grid, image_encoder.stride, image_encoder.is_convolutional)
        # shape (1,): DeepSpeed cannot partition a 0-dim parameter
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)), requires_grad=learn_temperature)

    def forward(self, batch: ImageReportBatch, reconstruct: bool = False) -> Outputs:
        """Embeddings and alignments of one microbatch; with ``reconstruct`` also films rebuilt from half their patches."""
        features_BPC, pooled_BC = self.image_encoder(batch.image_B1HW)
        patches_BPD = unit(self.patch_projection(features_BPC))
        sentences_BSD, report_BD = self.text_encoder(
            batch.token_BT,
            batch.token_mask_BT,
            batch.sentence_of_token_BT,
            batch.sentence_mask_BS,
            batch.by_length_B,
            batch.slice_tokens,
        )
        image_to_text_BSD, text_to_image_BPD, hidden_B1D = self.cross_attention(
            patches_BPD, sentences_BSD, batch.sentence_mask_BS, self.mask_token if reconstruct else None
        )
        reconstruction_B1HW = None
        if hidden_B1D is not None:
            visible_BPD = self._hide(patches_BPD, self.mask_token, batch.masked_BP)
            answered_BPD = self._hide(text_to_image_BPD, hidden_B1D, batch.masked_BP)
            reconstruction_B1HW = self.decoder(torch.cat([visible_BPD, answered_BPD], dim=-1))
        return Outputs(
            image_BD=unit(self.image_projection(pooled_BC)),
            report_BD=report_BD,
            patches_BPD=patches_BPD,
            sentences_BSD=sentences_BSD,
            image_to_text_BSD=image_to_text_BSD,
            text_to_image_BPD=text_to_image_BPD,
            predicted_patches_BPD=self.predictor(patches_BPD),
            predicted_attended_BPD=self.predictor(text_to_image_BPD),
            scale=limited_scale(self.log_scale),
            reconstruction_B1HW=reconstruction_B1HW,
        )

    @staticmethod
    def _hide(rows_BPD: Tensor, stand_in: Tensor, masked_BP: Tensor) -> Tensor:
        """``rows_BPD`` with ``stand_in`` at hidden positions, so that nothing of what stood there remains."""
        return torch.where(masked_BP.unsqueeze(-1), stand_in.to(rows_BPD.dtype), rows_BPD)


class _PassThroughClamp(torch.autograd.Function):
    """Clamp whose gradient ignores the limits, so that a scale at its limit can still come back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clamp(MIN_SCALE, MAX_SCALE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def limited_scale(log_scale: Tensor) -> Tensor:
    """exp(log_scale) within [1, 100], float32 at least, shape (1,)."""
    wide = log_scale if log_scale.dtype == torch.float64 else log_scale.float()
    return _PassThroughClamp.apply(wide.exp())


def build_model(config: Config, vocabulary_size: int) -> VisionLanguageModel:
    """The model that ``config`` describes, on the CPU, with weights drawn from torch's current generator."""
    model, data = config.model, config.data
    image_backbone = build_image_backbone(model.image_encoder, data.image_size, model.dropout)
    text_backbone = build_text_backbone(model.text_encoder, vocabulary_size, data.max_tokens, model.dropout)
    if config.train.activation_checkpointing:
        for backbone in (image_backbone, text_backbone):
            if backbone.supports_gradient_checkpointing:
                backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return VisionLanguageModel(
        ImageEncoder(image_backbone, data.image_size, model.fixed_batch_statistics),
        TextEncoder(text_backbone, model.embed_dim),
        model.embed_dim,
        config.objective.temperature,
        config.objective.learn_temperature,
    )
