"""Settings of a method, the section ``objective``, and the module of others' code that settings name."""

from collections.abc import Iterable
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

from cmcgns.config.sections import FORMATS, ModelConfig, Section
from cmcgns.errors import UserError
from cmcgns.methods import METHODS
from cmcgns.plugins import is_plugin, load_plugin


class Bank(NamedTuple):
    """Features that are clustered during training."""

    name: str
    num_clusters: int
    """Centroids K."""
    dim: int
    """Dimension D."""
    setting: str
    """Name of the setting that gives K, for messages."""
    start_statistic: str | None
    """Clustering starts once this statistic of the method is at most `clustering.start_cosine`. None: as soon as the bank has
    enough rows, whatever the warm-up and `clustering.start_step` say, since nothing is learned before."""
    per_sentence: bool = True
    """Rows belong to sentences; otherwise to studies."""
    rows_each: int = 1
    """Rows of each sentence or study."""
    moves: bool = True
    """Each step moves the centroids by `clustering.momentum`; otherwise they only change with a new version."""


class MethodSettings(Section):
    """The section `objective` of one method. Its module exports a subclass as `Settings` (see ``cmcgns.methods.base``)."""

    stages: ClassVar[int] = 1
    """Number of training stages, 1 to 3."""
    compares_studies: ClassVar[bool] = True
    """Whether the losses compare the studies of a microbatch, so that one alone teaches nothing."""

    def banks(self, model: ModelConfig) -> tuple[Bank, ...]:
        """The banks that the method clusters; without banks no clustering actor starts."""
        return ()

    def complaints(self) -> Iterable[str]:
        """Settings that conflict, one sentence each, with the fix."""
        return ()

    def needs_reports(self) -> str | None:
        """The setting because of which the method learns from reports; None if it learns from films alone."""
        return "method.name"

    def learned_labels(self) -> tuple[str, ...]:
        """Names of the corpus's labels that the method learns from."""
        return ()

    def sweep_space(self, sentences: int) -> dict[str, Any]:
        """Default search space of a sweep, in the form of `sweep.space`, for a corpus with ``sentences`` training sentences."""
        return {"objective.temperature": {"log_uniform": [0.02, 0.5]}} if hasattr(self, "temperature") else {}


def foreign_modules(settings: dict[str, Any]) -> dict[str, str]:
    """Modules that unvalidated ``settings`` would execute and that are not ours, by setting."""
    value = lambda section, key: (settings[section] if isinstance(settings.get(section), dict) else {}).get(key)
    named = {
        "method.name": (value("method", "name"), METHODS),
        "data.format": (value("data", "format"), FORMATS),
        "clustering.clusterer": (value("clustering", "clusterer"), ("kmeans",)),
    }
    found = {key: name for key, (name, ours) in named.items() if isinstance(name, str) and name not in ours}
    encoder = value("model", "image_encoder")
    return found | ({"model.image_encoder": encoder} if isinstance(encoder, str) and is_plugin(encoder) else {})


def method_module(name: str) -> ModuleType:
    """The module of a method, with ``Settings`` and ``METHOD``."""
    module = load_plugin("method.name", name, METHODS)
    settings = getattr(module, "Settings", None)  # not METHOD: reading it may import torch
    if not (isinstance(settings, type) and issubclass(settings, MethodSettings)):
        raise UserError(
            f"method.name {name} defines no method: it needs `Settings`, a MethodSettings, and `METHOD` (docs/methods.md)"
        )
    return module


def method_settings(name: str) -> type[MethodSettings]:
    """The settings class of a method, the type of section ``objective``."""
    settings: type[MethodSettings] = method_module(name).Settings
    return settings
