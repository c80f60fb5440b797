"""What an evaluation task is: a module whose ``TASK`` turns what encoders make of the test data into scores.

Tasks of ours are in ``cmcgns.evaluate.tasks``; `evaluate.tasks` also takes `package.module` and `path/to/file.py`
(docs/evaluation.md adds one). Heads that are trained on films (segmentation, detection, tuning) are started by ``tasks`` itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from cmcgns.config import Section
from cmcgns.data.labelled.base import ImageSet
from cmcgns.errors import UserError
from cmcgns.evaluate.config import TASKS, EvaluateConfig
from cmcgns.evaluate.encoders import EncoderSpec
from cmcgns.evaluate.features import Features
from cmcgns.evaluate.figures import Figure
from cmcgns.evaluate.pairs import Pairs
from cmcgns.evaluate.scores import Score
from cmcgns.plugins import load_plugin

CORPUS = "corpus"
"""Name of the run's own corpus where it is not a set of labelled images."""


@dataclass(frozen=True)
class Inputs:
    """What a task is given."""

    encoder: EncoderSpec
    images: ImageSet | None
    """The labelled set, or the phantom behind the pairs; None for a corpus without labels."""
    settings: EvaluateConfig
    pairs: Pairs | None = None
    """For tasks that read ``pairs``."""
    features: Features | None = None
    """For tasks that read ``features``."""
    options: Section | None = None
    """The task's own ``Settings``."""
    shown: list[Figure] = field(default_factory=list)
    """Figures for report.html; a task adds its own."""

    @property
    def set_name(self) -> str:
        """Name of the set in tables."""
        return self.images.name if self.images else CORPUS


class Task(ABC):
    """One task; an instance holds nothing."""

    Settings: ClassVar[type[Section]] = Section
    """Settings of its own, given as `evaluate.options={NAME: {key: value}}`."""
    reads: ClassVar[Literal["pairs", "features"]]
    """``pairs``: the corpus's test films and reports through the model; ``features``: each labelled set's films alone."""
    needs_reports: ClassVar[bool] = False
    """Of features: also the text encoder, so a folder with an image encoder alone is left out."""
    needs_attention: ClassVar[bool] = False
    """Asks where sentences attend; encoders of methods without attention are left out."""
    needs_truth: ClassVar[bool] = False
    """Of pairs: needs what sentences say, which is known of the phantom alone."""

    def missing(self, images: ImageSet, inputs: Mapping[str, Any]) -> str | None:
        """Why ``images`` cannot be measured; None where they can. ``inputs``: the prompts by kind of set."""
        return None

    @abstractmethod
    def scores(self, inputs: Inputs) -> list[Score]:
        """The scores of one encoder on one set."""


def load_task(name: str) -> Task:
    """The task that `evaluate.tasks` names."""
    known: dict[str, str] = {each: f"cmcgns.evaluate.tasks.{each}" for each in TASKS}
    found = getattr(load_plugin("evaluate.tasks", name, known), "TASK", None)
    if not isinstance(found, Task):
        raise UserError(f"evaluate.tasks {name} defines no TASK, an instance of a Task (docs/evaluation.md)")
    return found


def task_options(task: Task, name: str, settings: EvaluateConfig) -> Section:
    """The task's own settings."""
    try:
        return task.Settings.model_validate(settings.options.get(name, {}))
    except ValueError as error:
        raise UserError(f"evaluate.options {name}: {' '.join(str(error).split())}") from None
