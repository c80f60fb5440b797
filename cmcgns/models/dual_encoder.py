"""Image and text encoder with a shared embedding space, the base of every method's model.

B studies, P patches, S sentences (padded), C channels of the image backbone, D embedding.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cmcgns.config import Config
from cmcgns.data.batch import ImageReportBatch
from cmcgns.models.attention import linear, unit
from cmcgns.models.backbones import ImageEncoder, build_image_backbone, build_text_backbone
from cmcgns.models.text import TextEncoder

MIN_SCALE, MAX_SCALE = 1.0, 100.0


class DualEncoder(nn.Module):
    """Image encoder, text encoder, image projection and temperature. A method's model adds its own parts."""

    training_only: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the buffers that only training needs: they are in checkpoints and not in the export."""

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        dim: int,
        temperature: float,
        learn_temperature: bool,
    ) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.add_parts(dim)
        # shape (1,): DeepSpeed cannot partition a 0-dim parameter
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)), requires_grad=learn_temperature)

    def add_parts(self, dim: int) -> None:
        """Create the modules after the encoders; an override must create ``image_projection`` too."""
        self.image_projection: nn.Module = linear(self.image_encoder.dim, dim)

    def train(self, mode: bool = True) -> "DualEncoder":
        super().train(mode)
        for backbone in (self.image_encoder.backbone, self.text_encoder.backbone):
            if not any(parameter.requires_grad for parameter in backbone.parameters()):
                backbone.eval()  # frozen: neither dropout nor new running statistics
        return self

    def embed_images(self, image_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features ``features_BPC`` and the normalised ``image_BD``."""
        features_BPC, pooled_BC = self.image_encoder(image_B1HW)
        return features_BPC, unit(self.image_projection(pooled_BC))

    def embed_reports(self, batch: ImageReportBatch) -> tuple[Tensor, Tensor]:
        """``sentences_BSD`` (means of normalised tokens, zero where padded) and the normalised ``report_BD``."""
        sentences_BSD, report_BD = self.text_encoder(
            batch.token_BT,
            batch.token_mask_BT,
            batch.sentence_of_token_BT,
            batch.sentence_mask_BS,
            batch.by_length_B,
            batch.slice_tokens,
        )
        return sentences_BSD, report_BD

    @property
    def scale(self) -> Tensor:
        """Inverse temperature within [1, 100], at least float32, shape (1,)."""
        return clamped_scale(self.log_scale)


class _PassThroughClamp(torch.autograd.Function):
    """Clamp whose gradient ignores the limits, so that a scale at a limit can still change."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clamp(MIN_SCALE, MAX_SCALE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def clamped_scale(log_scale: Tensor) -> Tensor:
    """exp(log_scale) clamped to [1, 100], at least float32, shape (1,)."""
    wide = log_scale if log_scale.dtype == torch.float64 else log_scale.float()
    return _PassThroughClamp.apply(wide.exp())


def build_encoders(
    config: Config,
    vocabulary_size: int,
    text_encoder: Callable[[PreTrainedModel, int], TextEncoder] = TextEncoder,
    image_encoder: type[ImageEncoder] = ImageEncoder,
) -> tuple[ImageEncoder, TextEncoder]:
    """Both encoders of ``config`` on the CPU, with weights drawn from torch's current generator.

    ``text_encoder`` makes one of a backbone and the dimension D.
    """
    model, data = config.model, config.data
    image_backbone = build_image_backbone(model.image_encoder, data.image_size, model.dropout)
    text_backbone = build_text_backbone(model.text_encoder, vocabulary_size, data.max_tokens, model.dropout)
    if config.train.activation_checkpointing:
        for backbone in (image_backbone, text_backbone):
            if backbone.supports_gradient_checkpointing:
                backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return (
        image_encoder(image_backbone, data.image_size, model.fixed_batch_statistics, model.channels_last),
        text_encoder(text_backbone, model.embed_dim),
    )
