"""Interface of an evaluation task: a module whose ``TASK`` computes scores from an encoder's outputs on the test data.

Built-in tasks are in ``cmcgns.evaluate.tasks``; `evaluate.tasks` also accepts `package.module` and `path/to/file.py` (see
docs/evaluation.md). Heads trained on films (segmentation, detection, fine-tuning) do not use it; ``tasks`` starts them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from cmcgns.config import Section
from cmcgns.data.labelled.base import ImageSet
from cmcgns.errors import UserError
from cmcgns.evaluate.config import TASKS, EvaluateConfig
from cmcgns.evaluate.encoders import EncoderSpec
from cmcgns.evaluate.features import Features
from cmcgns.evaluate.figures import Figure
from cmcgns.evaluate.pairs import Pairs
from cmcgns.evaluate.scores import Score
from cmcgns.library.texts import Prompts
from cmcgns.models.device import CPU
from cmcgns.plugins import load_plugin

CORPUS = "corpus"
"""Name of the run's own corpus if it has no labelled set."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a task: one encoder on one set."""

    name: str
    """The task's name in `evaluate.tasks`, for its scores."""
    encoder: EncoderSpec
    images: ImageSet | None
    """The labelled set, or the phantom behind the pairs; None for a corpus without labels."""
    settings: EvaluateConfig
    pairs: Pairs | None = None
    """For tasks that read ``pairs``."""
    features: Features | None = None
    """For tasks that read ``features``."""
    prompts: Prompts | None = None
    """For tasks that read ``features``: the prompts of the set's classes, if there are any for its kind."""
    options: Section | None = None
    """The task's own ``Settings``."""
    device: torch.device = CPU
    """The task's own GPU if it ``uses_gpu`` and the settings give one."""
    shown: list[Figure] = field(default_factory=list)
    """Figures for report.html; a task appends its own."""

    @property
    def set_name(self) -> str:
        """Name of the set in tables."""
        return self.images.name if self.images else CORPUS


class Task(ABC):
    """An evaluation task; instances have no state."""

    Settings: ClassVar[type[Section]] = Section
    """The task's settings, given as `evaluate.options={NAME: {key: value}}`."""
    reads: ClassVar[Literal["pairs", "features"]]
    """``pairs``: embeddings of the corpus's test films and reports; ``features``: features of each labelled set's films."""
    needs_reports: ClassVar[bool] = False
    """With ``features``: needs a text encoder too, so encoders without one are skipped."""
    needs_attention: ClassVar[bool] = False
    """Needs sentence attention, so encoders of methods without it are skipped."""
    least_studies: ClassVar[int] = 1
    """With ``pairs``: skipped when the split has fewer studies."""
    needs_truth: ClassVar[bool] = False
    """With ``pairs``: needs the findings that each sentence states, which are known only for the phantom."""

    uses_gpu: ClassVar[bool] = False
    """Runs a model or trains a head on ``inputs.device``: with `evaluate.use_gpu` it gets a GPU of its own."""

    def missing(self, images: ImageSet, prompts: Prompts) -> str | None:
        """Why the task cannot run on ``images``, whose kind has these ``prompts``; None if it can."""
        return None

    @abstractmethod
    def scores(self, inputs: Inputs) -> list[Score]:
        """The scores of one encoder on one set."""


def load_task(name: str) -> Task:
    """The task ``name`` of `evaluate.tasks`."""
    known: dict[str, str] = {each: f"cmcgns.evaluate.tasks.{each}" for each in TASKS}
    task = getattr(load_plugin("evaluate.tasks", name, known), "TASK", None)
    if not isinstance(task, Task):
        raise UserError(f"evaluate.tasks {name} defines no TASK, an instance of a Task (docs/evaluation.md)")
    return task


def task_options(task: Task, name: str, settings: EvaluateConfig) -> Section:
    """The task's validated settings."""
    try:
        return task.Settings.model_validate(settings.options.get(name, {}))
    except ValueError as error:
        raise UserError(f"evaluate.options {name}: {' '.join(str(error).split())}") from None
