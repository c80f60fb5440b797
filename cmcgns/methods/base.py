"""What a method is: everything that tells one way of learning from films and reports from another.

A method's module exports ``Settings`` (the section `objective`) and ``METHOD`` (a subclass of ``Method``). Trainer, engine,
validation, checkpoint, sweep, evaluation and export ask the method and know none by name. docs/methods.md adds one.

B studies on this rank, S sentences (padded), P patches, n rows to be clustered, K centroids, D embedding.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from cmcgns.config import Bank, Config, MethodSettings, method_module
from cmcgns.data.batch import ImageReportBatch
from cmcgns.errors import UserError
from cmcgns.models.dual_encoder import DualEncoder


class Outputs(Protocol):
    """What a method's model returns: a NamedTuple (ZeRO-3's hooks walk into nothing fancier) with at least these."""

    @property
    def image_BD(self) -> Tensor:
        """Normalised film embeddings."""

    @property
    def report_BD(self) -> Tensor:
        """Normalised report embeddings."""

    @property
    def sentences_BSD(self) -> Tensor:
        """Sentence embeddings, zero where padded."""


class Losses(NamedTuple):
    """What the trainer needs of one microbatch; the mean over ranks of every number is its global value."""

    total: Tensor
    """To be differentiated."""
    terms: Tensor
    """``Method.terms`` of the stage in order, detached float32; the first is the total."""
    statistics: Tensor
    """``Method.statistics`` in order, detached float32."""
    bank_rows: Mapping[str, Tensor] = {}
    """For each bank the normalised rows (n, D) of this microbatch, detached."""


class SentenceAttention(NamedTuple):
    """Where each sentence attends on its study's film."""

    attended_BSD: Tensor
    """What it reads there; not normalised."""
    weight_BSP: Tensor
    """How strongly it attends to each patch."""


SettingsT = TypeVar("SettingsT", bound=MethodSettings)


class Method(ABC, Generic[SettingsT]):
    """One way of learning; it holds settings and no tensors: everything learnable is in ``build_model``'s module."""

    statistics: ClassVar[tuple[str, ...]] = ("temperature",)
    """Names of the numbers reported beside the loss terms."""
    collapse_statistics: ClassVar[tuple[str, ...]] = ()
    """Statistics that are about 1 for spread-out features and 0 for collapsed ones."""
    ranked_by: ClassVar[tuple[str, ...]] = ("mean_recall", "-loss")
    """What makes one validation better than another, the weightiest first; larger is better, or smaller after a minus."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.settings: SettingsT = config.objective  # type: ignore[assignment]

    @property
    def banks(self) -> tuple[Bank, ...]:
        """Features that are clustered while training."""
        return self.config.banks

    @abstractmethod
    def build_model(self, vocabulary_size: int) -> DualEncoder:
        """The whole model with weights drawn from torch's current generator; called with (batch, stage)."""

    def frozen(self, stage: int) -> tuple[str, ...]:
        """Prefixes of the names of parameters that ``stage`` does not train."""
        return ()

    @abstractmethod
    def terms(self, stage: int) -> tuple[str, ...]:
        """Names of the loss terms of ``stage``; the first is ``loss``, the total."""

    @abstractmethod
    def losses(
        self, outputs: Any, batch: ImageReportBatch, centroids: Mapping[str, Tensor | None], stage: int, step: int
    ) -> Losses:
        """Losses of one microbatch under the centroids (K, D) of each bank, None before clustering has started. Collective."""

    def picture(self, outputs: Any, batch: ImageReportBatch) -> Tensor | None:
        """A picture (1, H, W) in [0, 1] for TensorBoard out of a validation batch."""
        return None

    @property
    def has_attention(self) -> bool:
        """Whether ``attention`` returns something."""
        return type(self).attention is not Method.attention

    def attention(self, model: DualEncoder, outputs: Any) -> SentenceAttention | None:
        """Where sentences attend, for grounding, clusters and embeddings; None for a method without attention."""
        return None


def load_method(config: Config) -> Method[Any]:
    """The method of ``config``."""
    kind = getattr(method_module(config.method.name), "METHOD", None)
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise UserError(f"method.name {config.method.name} defines no METHOD, a subclass of Method (docs/methods.md)")
    return kind(config)


def column(*values: Tensor) -> Tensor:
    """Detached float32 scalars as one tensor."""
    return torch.stack([value.detach().float() for value in values])


def in_full_precision(outputs: Any) -> Any:
    """``outputs``, a NamedTuple, with halves as float32: losses are never computed in bf16 or fp16."""
    half = (torch.bfloat16, torch.float16)
    wide = {
        name: part.float() if isinstance(part, Tensor) and part.dtype in half else part
        for name, part in outputs._asdict().items()
    }
    return type(outputs)(**wide)
