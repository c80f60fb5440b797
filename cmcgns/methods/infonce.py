"""Image-report InfoNCE over all ranks, without further losses (van den Oord et al. 2018; ConVIRT, CLIP)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import Field
from torch import Tensor

from cmcgns.config import MethodSettings
from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.base import Losses, Method, column, in_full_precision
from cmcgns.methods.contrastive import contrastive_loss
from cmcgns.models.dual_encoder import DualEncoder, build_encoders


class Settings(MethodSettings):
    temperature: float = Field(0.1, ge=0.01, le=1.0)
    """Temperature of the loss; the initial value if it is learned."""
    learn_temperature: bool = True
    """Learn the temperature; a sweep over `temperature` sets it to false."""


class InfoNCEOutputs(NamedTuple):
    """Normalised embeddings of one microbatch, its sentences, and the inverse temperature (1,)."""

    image_BD: Tensor
    report_BD: Tensor
    sentences_BSD: Tensor
    scale: Tensor


class InfoNCEModel(DualEncoder):
    """The two encoders."""

    def forward(self, batch: ImageReportBatch, stage: int = 1) -> InfoNCEOutputs:
        """Embeddings of one microbatch."""
        _, image_BD = self.embed_images(batch.image_B1HW)
        sentences_BSD, report_BD = self.embed_reports(batch)
        return InfoNCEOutputs(image_BD, report_BD, sentences_BSD, self.scale)


class InfoNCE(Method[Settings]):
    """One stage, one loss, no clustering."""

    def build_model(self, vocabulary_size: int) -> InfoNCEModel:
        encoders, settings = build_encoders(self.config, vocabulary_size), self.settings
        return InfoNCEModel(*encoders, self.config.model.embed_dim, settings.temperature, settings.learn_temperature)

    def terms(self, stage: int) -> tuple[str, ...]:
        return ("loss",)

    def losses(
        self, outputs: Any, batch: ImageReportBatch, centroids: Mapping[str, Tensor | None], stage: int, step: int
    ) -> Losses:
        wide = in_full_precision(outputs)
        loss = contrastive_loss(
            wide.image_BD, wide.report_BD, batch.report_hash_B, wide.scale, wire_dtype=self.wire_dtype
        )
        return Losses(loss, column(loss), column(1 / wide.scale[0]))


METHOD = InfoNCE
