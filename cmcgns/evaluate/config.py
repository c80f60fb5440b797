"""Settings of `jobs/embed.py` and `jobs/evaluate.py`."""

import difflib
from typing import Any, Literal, Self, get_args

from pydantic import Field, PositiveInt, model_validator

from cmcgns.config import RunConfig, Section


class EmbedConfig(Section):
    run: str = ""
    """Folder of a finished pretraining run, local or `s3://`: its model, vocabulary and corpus are used."""
    split: Literal["train", "valid", "test"] = "test"
    """Studies whose sentences are embedded."""
    uri: str | None = None
    """Another corpus than the run's own, in any layout that `data.uri` of a run takes."""
    studies: PositiveInt | None = None
    """Embed that many studies of the split, the first by index; by default all."""
    batch_size: PositiveInt = 32
    """Studies of one forward."""
    workers: PositiveInt = 1
    """Ray actors that hold the model."""
    cpus_per_worker: float = Field(1.0, gt=0.0)
    """CPUs that Ray reserves for one of them; torch uses as many threads."""
    use_gpu: bool = False
    """One GPU for each of them."""


TaskName = Literal["retrieval", "zeroshot", "classification", "segmentation", "detection", "clusters", "grounding"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)


class EvaluateConfig(Section):
    run: str = ""
    """Folder of a finished pretraining run, or the `export` in it, local or `s3://`: what is evaluated. By default the last
    one under run.storage that was not given a name."""
    beside: tuple[str, ...] = ("random",)
    """Encoders for the same table: `random` (the run's model before training), folders of other runs, Hugging Face folders."""
    tasks: tuple[str, ...] = TASKS
    """What is measured, of retrieval, zeroshot, classification, segmentation, detection, clusters, grounding, and tasks of your
    own as `package.module` or `path/to/file.py`. A task that a set has no truth for is left out, and reported."""
    options: dict[str, dict[str, Any]] = {}
    """Settings of your own tasks: `{NAME: {key: value}}`, by the name under `tasks`."""
    sets: dict[str, str] = {}
    """Downstream sets beside the run's own corpus: name (chexpert, nih, rsna, siim, covidx, object-cxr, masked) and folder or
    `s3://` URI, such as `{rsna: /data/rsna}`. Of one kind several have names of their own: `{masked:a: ..., masked:b: ...}`."""
    draw_splits: bool = False
    """Draw the splits of `masked` anew by group, whatever its table says."""
    corpus: bool = True
    """Evaluate on the run's own corpus too."""
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the training labels that classifiers are given."""
    draws: int = Field(5, ge=1, le=1000)
    """Times that labels are drawn for each share under 1, for linear probes; other heads see one draw."""
    segmentation_fractions: tuple[float, ...] = (0.1,)
    """Shares of the training masks that segmentation is given."""
    detection_fractions: tuple[float, ...] = (1.0,)
    """Shares of the training boxes that detection is given."""
    encoder: tuple[Literal["frozen", "tuned"], ...] = ("frozen",)
    """Whether encoders stay as they are under heads, or are trained too; both may be asked for. Frozen ones are classified by
    linear probes."""
    head_steps: PositiveInt = 300
    """Most optimizer steps of a head; it ends sooner where the validation loss no longer falls."""
    head_batch: PositiveInt = 16
    """Films of one such step."""
    head_rate: float = Field(1e-3, gt=0.0)
    """Its learning rate; a tuned encoder has a tenth of it."""
    prompts: str | None = None
    """YAML file of prompts for zero-shot classification: `{set: {class: {present: [...], absent: [...]}}}`; by default ours."""
    ablation: str | None = None
    """YAML file of an ablation, such as jobs/ablation.yaml: its variants are pretrained with its seeds, those that have
    finished not again after `run.resume`, and evaluated side by side. `evaluate.run` does not count then."""
    compare: tuple[str, ...] = ()
    """Folders of other evaluations to show beside this one, where the test images are the same; differences are in pairs."""
    resamples: int = Field(1000, ge=100)
    """Bootstrap resamples of the test images behind each 95 % interval."""
    seed: int = 0
    """Decides label draws, resamples, and the weights of `random` (drawn splits go by the run's data.seed)."""
    batch_size: PositiveInt = 32
    """Films of one forward."""
    workers: PositiveInt = 1
    """Ray actors that hold the encoders."""
    cpus_per_worker: float = Field(1.0, gt=0.0)
    """CPUs that Ray reserves for one of them; torch uses as many threads."""
    use_gpu: bool = False
    """One GPU for each of them."""
    features: str | None = None
    """Folder where features of frozen encoders are kept for the next evaluation; by default `features/` in run.storage."""


class EvaluateJobConfig(Section):
    """All settings of the job."""

    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def parts_work_together(self) -> Self:
        for task in self.evaluate.tasks:
            if task not in TASKS and "." not in task:
                near = difflib.get_close_matches(task, TASKS, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"evaluate.tasks {task}: there is no such task; {hint}known are {', '.join(TASKS)}")
        for name in ("fractions", "segmentation_fractions", "detection_fractions"):
            for share in getattr(self.evaluate, name):
                if not 0.0 < share <= 1.0:
                    raise ValueError(
                        f"evaluate.{name} {share} is no share of the labels; give numbers above 0, up to 1"
                    )
        if self.run.resume is not None and self.evaluate.ablation is None:
            raise ValueError(
                "run.resume: an evaluation starts anew, and takes up the features that it has; leave it out"
            )
        for complaint in self.run.complaints():
            raise ValueError(complaint)
        return self


class EmbedJobConfig(Section):
    """All settings of the job."""

    embed: EmbedConfig = EmbedConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def parts_work_together(self) -> Self:
        if not self.embed.run:
            raise ValueError("embed.run is missing; name the folder of a finished pretraining run, such as runs/NAME")
        if self.run.resume is not None:
            raise ValueError("run.resume: embedding starts anew each time; give a new run.name instead")
        for complaint in self.run.complaints():
            raise ValueError(complaint)
        return self
