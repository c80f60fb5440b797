"""Interface of a pretraining method.

A method's module exports ``Settings`` (the section `objective`) and ``METHOD`` (a subclass of ``Method``). Trainer, engine,
validation, checkpoint, sweep, evaluation and export only use this interface. docs/methods.md shows how to add a method.

B studies on this rank, S sentences (padded), P patches, n rows to cluster, K centroids, D embedding.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from cmcgns.config import Bank, Config, MethodSettings, method_module
from cmcgns.data.batch import ImageReportBatch
from cmcgns.errors import UserError
from cmcgns.models.device import AUTOCAST
from cmcgns.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cmcgns.data.tokenizer import ReportTokenizer
    from cmcgns.data.views import ViewSettings  # settings need pydantic, the GPU benchmark has none


class BankCentroids(dict[str, Tensor | None]):
    """Centroids (K, D) by bank, None before clustering has started."""

    def __init__(self, rows: Mapping[str, Tensor | None], counts: Mapping[str, Tensor]) -> None:
        super().__init__(rows)
        self.counts = counts
        """Members of each centroid (K,) in the bank when its version was made, float32, by bank."""


class Losses(NamedTuple):
    """Losses and statistics of one microbatch; the mean over ranks of each number is its global value."""

    total: Tensor
    """The loss for the backward pass."""
    terms: Tensor
    """Values of ``Method.terms`` in order, detached float32; the first is the total."""
    statistics: Tensor
    """Values of ``Method.statistics`` in order, detached float32."""
    bank_rows: Mapping[str, Tensor] = {}
    """Normalised rows (n, D) of this microbatch by bank, detached."""
    weighted: Mapping[str, Tensor] = {}
    """The summands of ``total`` by term, for `train.log_term_gradients`; empty if there is only the total."""


class SentenceAttention(NamedTuple):
    """Attention of each sentence over its study's film."""

    attended_BSD: Tensor
    """Attended features; not normalised."""
    weight_BSP: Tensor
    """Attention weight of each patch."""


class Parts(NamedTuple):
    """What is compared when sentences look for themselves on films: late interaction."""

    sentences: tuple[Tensor, ...]
    """Tensors with one row for each of n sentences."""
    films: tuple[Tensor, ...]
    """Tensors with one row for each of B films."""
    study_n: Tensor
    """Study of each sentence among the B, ascending."""


SettingsT = TypeVar("SettingsT", bound=MethodSettings)


class Method(ABC, Generic[SettingsT]):
    """A pretraining method. It has settings but no tensors: everything learnable is in the module of ``build_model``."""

    statistics: ClassVar[tuple[str, ...]] = ("temperature",)
    """Names of the numbers reported in addition to the loss terms."""
    collapse_statistics: ClassVar[tuple[str, ...]] = ()
    """Statistics that are about 1 for spread-out features and 0 for collapsed ones."""
    ranked_by: ClassVar[tuple[str, ...]] = ("mean_recall", "-loss")
    """Metrics that rank validations, most important first. Larger is better; with a minus in front, smaller is better."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.settings: SettingsT = config.objective  # type: ignore[assignment]

    @property
    def views(self) -> "tuple[int, ViewSettings] | None":
        """Number and strengths of the random views of each film, ``batch.view_VB1HW``; None for a method without views."""
        return None

    def continuations(self, tokenizer: "ReportTokenizer") -> "NDArray[np.bool_] | None":
        """Vocabulary entries that continue a word, for ``batch.continues_BT``; None without a setting ``whole_words``."""
        return tokenizer.continues_V if getattr(self.settings, "whole_words", False) else None

    @property
    def banks(self) -> tuple[Bank, ...]:
        """Features that are clustered during training."""
        return self.config.banks

    @property
    def wire_dtype(self) -> torch.dtype:
        """Type in which float32 features travel to the other ranks: that of the encoders' outputs, so nothing overflows."""
        return AUTOCAST.get(self.config.train.precision, torch.float32)

    @abstractmethod
    def build_model(self, vocabulary_size: int) -> DualEncoder:
        """The whole model, with weights drawn from torch's current generator.

        Its forward takes (batch, stage) and returns a NamedTuple (ZeRO-3's hooks handle no other class) with at least
        ``image_BD`` and ``report_BD``, both normalised, and ``sentences_BSD``, zero where padded. What is not trained may be
        None while training.
        """

    def frozen(self, stage: int) -> tuple[str, ...]:
        """Name prefixes of the parameters that ``stage`` does not train."""
        return ()

    @abstractmethod
    def terms(self, stage: int) -> tuple[str, ...]:
        """Names of the loss terms of ``stage``; the first is ``loss``, the total."""

    @abstractmethod
    def losses(self, outputs: Any, batch: ImageReportBatch, centroids: BankCentroids, stage: int, step: int) -> Losses:
        """Losses of one microbatch. Collective."""

    def picture(self, outputs: Any, batch: ImageReportBatch) -> Tensor | None:
        """A picture (1, H, W) in [0, 1] of a validation batch, for TensorBoard."""
        return None

    @property
    def has_attention(self) -> bool:
        """True if the method overrides ``attention``."""
        return type(self).attention is not Method.attention

    def attention(self, model: DualEncoder, outputs: Any) -> SentenceAttention | None:
        """Sentence attention, for grounding, clusters and embeddings; None for a method without attention."""
        return None


class ComparesParts(ABC):
    """A method that also compares the sentences of reports with the patches of films: retrieval by parts (docs/methods.md)."""

    @abstractmethod
    def parts(self, outputs: Any, batch: ImageReportBatch) -> Parts:
        """What ``part_scores`` needs of a batch, float32."""

    @abstractmethod
    def part_scores(self, sentences: tuple[Tensor, ...], films: tuple[Tensor, ...]) -> Tensor:
        """How well each sentence finds itself on each film, (n, B); both are of ``Parts``."""


def load_method(config: Config) -> Method[Any]:
    """The method of ``config``."""
    kind = getattr(method_module(config.method.name), "METHOD", None)
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise UserError(f"method.name {config.method.name} defines no METHOD, a subclass of Method (docs/methods.md)")
    return kind(config)


def column(*values: Tensor) -> Tensor:
    """The scalars as one detached float32 tensor."""
    return torch.stack([value.detach().float() for value in values])


def spread(rows_BLD: Tensor) -> Tensor:
    """sqrt(D) x mean standard deviation per dimension of normalised rows: about 1 when spread out, 0 when collapsed."""
    rows_ND = rows_BLD.detach().flatten(0, -2)
    return rows_ND.shape[1] ** 0.5 * rows_ND.std(dim=0).mean()


def in_full_precision(outputs: Any) -> Any:
    """``outputs``, a NamedTuple, with bf16 and fp16 tensors converted to float32, in which all losses are computed."""
    half = (torch.bfloat16, torch.float16)
    wide = {
        name: part.float() if isinstance(part, Tensor) and part.dtype in half else part
        for name, part in outputs._asdict().items()
    }
    return type(outputs)(**wide)
