"""What methods share that compare whole films with whole texts: settings, a model without further parts, and frozen layers.

B studies on this rank, S sentences (padded), D embedding.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeVar

from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from cmcgns.config import MethodSettings
from cmcgns.data.batch import ImageReportBatch, with_one_sentence
from cmcgns.errors import UserError
from cmcgns.methods.base import Method
from cmcgns.models.attention import projection
from cmcgns.models.backbones import ImageEncoder
from cmcgns.models.dual_encoder import DualEncoder, build_encoders
from cmcgns.models.text import PooledTextEncoder, TextEncoder


class PairSettings(MethodSettings):
    temperature: float = Field(0.07, ge=0.01, le=1.0)
    """Temperature of the loss; the initial value if it is learned."""
    learn_temperature: bool = True
    """Learn the temperature; a sweep over `temperature` sets it to false."""
    heads: Literal["linear", "mlp"] = "linear"
    """Projections of films and texts: one linear layer, or two with a ReLU between them."""
    text_pooling: Literal["sentences", "cls", "max", "mean"] = "sentences"
    """A text is its sentences, weighted by attention; or the state of [CLS], or the maximum or the mean of all token states."""
    caption: Literal["report", "sentence"] = "report"
    """Text of a study in training: the whole report, or one sentence drawn for each study and epoch. Validation and evaluation
    read whole reports."""
    frozen_text_layers: int = Field(0, ge=0)
    """The first layers of the text encoder, and its embeddings, that are not trained; 0 trains everything."""


class PairOutputs(NamedTuple):
    """Outputs for one microbatch."""

    image_BD: Tensor
    """Normalised film embeddings."""
    report_BD: Tensor
    """Normalised text embeddings."""
    sentences_BSD: Tensor
    """Sentence embeddings, zero where padded."""
    text_hash_B: Tensor
    """Hash of the text that was embedded: the report's, or the drawn sentence's."""
    scale: Tensor
    """Inverse temperature, shape (1,)."""
    logit_bias: Tensor | None
    """Added to all logits, shape (1,), if the method learns one."""


class PairModel(DualEncoder):
    """The two encoders and their heads."""

    def __init__(
        self, image_encoder: ImageEncoder, text_encoder: TextEncoder, dim: int, settings: PairSettings
    ) -> None:
        super().__init__(image_encoder, text_encoder, dim, settings.temperature, settings.learn_temperature)
        self.image_projection = projection(settings.heads, image_encoder.dim, dim)
        self.draws_sentences = settings.caption == "sentence"
        self.logit_bias: nn.Parameter | None = None

    def forward(self, batch: ImageReportBatch, stage: int = 1) -> PairOutputs:
        """Embeddings of one microbatch."""
        read = with_one_sentence(batch) if self.training and self.draws_sentences else batch
        _, image_BD = self.embed_images(batch.image_B1HW)
        sentences_BSD, report_BD = self.embed_reports(read)
        return PairOutputs(image_BD, report_BD, sentences_BSD, read.report_hash_B, self.scale, self.logit_bias)


SettingsT = TypeVar("SettingsT", bound=PairSettings)


class PairMethod(Method[SettingsT]):
    """One stage, no clustering; a subclass adds terms and losses."""

    def build_model(self, vocabulary_size: int) -> PairModel:
        own, model = self.settings, self.config.model
        reader: Callable[[PreTrainedModel, int], TextEncoder] = partial(TextEncoder, head=own.heads)
        if own.text_pooling != "sentences":
            reader = partial(PooledTextEncoder, pooling=own.text_pooling, head=own.heads)
        encoders = build_encoders(self.config, vocabulary_size, reader)
        check_frozen(encoders[1], own.frozen_text_layers, model.text_encoder)
        return PairModel(*encoders, model.embed_dim, own)

    def frozen(self, stage: int) -> tuple[str, ...]:
        return tuple(f"text_encoder.backbone.{part}" for part in first_layers(self.settings.frozen_text_layers))


def first_layers(number: int) -> tuple[str, ...]:
    """Prefixes of a BERT's parameters in its embeddings and first ``number`` layers; nothing for 0."""
    return ("embeddings.", *(f"encoder.layer.{layer}." for layer in range(number))) if number else ()


def check_frozen(text_encoder: TextEncoder, number: int, name: str) -> None:
    """Raise ``UserError`` if the text encoder ``name`` has no ``number`` layers to freeze."""
    layers = text_encoder.backbone.config.num_hidden_layers
    names = [key for key, _ in text_encoder.backbone.named_parameters()]
    if number > layers or not all(any(key.startswith(part) for key in names) for part in first_layers(number)):
        raise UserError(
            f"objective.frozen_text_layers {number}: model.text_encoder {name} has {layers} layers; give at most {layers}, or 0 "
            "for an encoder that is not built like BERT"
        )
