"""Settings of `jobs/embed.py` and `jobs/evaluate.py`."""

import difflib
from typing import Any, Literal, Self, get_args

from pydantic import Field, PositiveInt, model_validator

from cmcgns.config import RunConfig, Section
from cmcgns.config.sections import Columns
from cmcgns.data.listed_findings import ListedFindings


class EmbedConfig(Section):
    run: str = ""
    """Folder of a finished pretraining run, local or `s3://`: its model, vocabulary and corpus are used."""
    trusted: tuple[str, ...] = ()
    """Modules and files of others' run settings (method, backbone, reader) that may be executed; ones that are not named here
    are refused."""
    split: Literal["train", "valid", "test", "all"] = "test"
    """Studies that are embedded."""
    uri: str | None = None
    """Corpus to embed instead of the run's own, in any layout that `data.uri` of a run supports."""
    studies: PositiveInt | None = None
    """Embed the first studies of the split, this many; by default all."""
    batch_size: PositiveInt = 32
    """Studies of one forward."""
    workers: PositiveInt = 1
    """Ray actors that run the model."""
    cpus_per_worker: float = Field(1.0, gt=0.0)
    """CPUs that Ray reserves for one worker; torch uses the same number of threads."""
    use_gpu: bool = False
    """One GPU per worker."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the model; vectors are stored as fp32."""


TaskName = Literal["retrieval", "zeroshot", "classification", "segmentation", "detection", "clusters", "grounding"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
FAST_TASKS: tuple[TaskName, ...] = ("retrieval", "classification", "clusters")
"""Tasks that train no heads on maps of patches."""


class EvaluateConfig(Section):
    run: str = ""
    """Folder of the finished pretraining run to evaluate, or the `export` in it, local or `s3://`. By default the last finished
    run under run.storage with an automatic name."""
    beside: tuple[str, ...] = ("random",)
    """Encoders to compare with: `random` (the run's model before training), folders of other runs, Hugging Face folders."""
    tasks: tuple[str, ...] | None = None
    """Tasks to run: retrieval, zeroshot, classification, segmentation, detection, clusters, grounding, and your own as
    `package.module` or `path/to/file.py`. A task for which a set has no labels is skipped and reported. By default all, in an
    ablation retrieval, classification and clusters."""
    trusted: tuple[str, ...] = ()
    """Modules and files of others' run settings (method, backbone, reader) that may be executed; ones that are not named here
    are refused."""
    options: dict[str, dict[str, Any]] = {}
    """Settings of your own tasks: `{NAME: {key: value}}`, with the name used in `tasks`."""
    sets: dict[str, str] = {}
    """Downstream sets besides the run's own corpus: name (chexpert, nih, rsna, siim, covidx, object-cxr, vindr-cxr, masked,
    labelled) and folder or `s3://` URI, such as `{rsna: /data/rsna}`. Several sets of one kind:
    `{masked:a: ..., masked:b: ...}`."""
    findings: dict[str, ListedFindings] = {}
    """How the tables of `labelled` list findings, by the name in `sets`: `{labelled: {column: problems, separator: ";",
    commonest: 10}}`. By default a column `labels` with findings separated by `|`. Keys: column, separator, classes, commonest,
    no_finding, unknown (docs/evaluation.md)."""
    columns: dict[str, Columns] = {}
    """Names of the columns of tables of `masked` and `labelled` that have other names, by the name in `sets`, each as
    `data.columns`: `{labelled: {image: File, patient: PatientID, split: Part}}`. The run's own table takes the run's
    `data.columns`."""
    films: dict[str, str] = {}
    """Folders of the films that such tables name, by the name in `sets`; relative to the folder of the table. By default that
    folder; for the run's own table the run's `data.films`."""
    draw_splits: bool = False
    """Ignore the splits in the tables of `masked` and `labelled` and draw new ones by group."""
    corpus: bool = True
    """Evaluate on the run's own corpus too."""
    split: Literal["valid", "test"] = "test"
    """Split of the run's corpus on which tasks are measured; `valid` for a corpus without test films. Labels are then learned
    from nine tenths of the training patients, and the probe's penalty is chosen on the other tenth."""
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Fractions of the training labels for classification."""
    draws: int = Field(5, ge=1, le=1000)
    """Random label subsets for each fraction below 1, for linear probes; other heads use one."""
    segmentation_fractions: tuple[float, ...] = (0.1,)
    """Fractions of the training masks for segmentation."""
    detection_fractions: tuple[float, ...] = (1.0,)
    """Fractions of the training boxes for detection."""
    encoder: tuple[Literal["frozen", "tuned"], ...] = ("frozen",)
    """Train only heads on a `frozen` encoder, or the encoder too (`tuned`), or both. Frozen encoders are classified by linear
    probes."""
    head_steps: PositiveInt = 300
    """Maximum number of optimizer steps of a head; training stops early once the validation loss no longer falls."""
    head_batch: PositiveInt = 16
    """Films per step of a head."""
    head_rate: float = Field(1e-3, gt=0.0)
    """Learning rate of a head; a tuned encoder uses a tenth of it."""
    prompts: str | None = None
    """YAML file of prompts for zero-shot classification: `{set: {class: {present: [...], absent: [...]}}}`; default: built in."""
    ablation: str | None = None
    """YAML file of an ablation, such as jobs/ablation.yaml: pretrains its variants with its seeds (after `run.resume` only
    unfinished ones) and compares them. `evaluate.run` is then ignored."""
    compare: tuple[str, ...] = ()
    """Folders of other evaluations to include in the table if their test images are the same; differences are paired."""
    resamples: int = Field(1000, ge=100)
    """Bootstrap resamples of the test images for each 95 % interval."""
    seed: int = 0
    """Seed of label subsets, resamples and the weights of `random` (random splits use the run's data.seed)."""
    batch_size: PositiveInt = 32
    """Films of one forward."""
    workers: PositiveInt = 1
    """Ray actors that run the encoders."""
    cpus_per_worker: float = Field(1.0, gt=0.0)
    """CPUs that Ray reserves for one worker; torch uses the same number of threads."""
    use_gpu: bool = False
    """One GPU per worker, and one per task that runs a model or trains a head: the tasks wait for each other if there are
    fewer."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of encoders and heads; losses and scores are always fp32."""
    features: str | None = None
    """Folder where features of frozen encoders are stored and reused; by default `features/` in run.storage."""

    @property
    def chosen_tasks(self) -> tuple[str, ...]:
        """`tasks`, or the default of an evaluation or an ablation."""
        if self.tasks is not None:
            return self.tasks
        return FAST_TASKS if self.ablation else TASKS


class EvaluateJobConfig(Section):
    """All settings of the job."""

    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def parts_work_together(self) -> Self:
        for task in self.evaluate.chosen_tasks:
            if task not in TASKS and "." not in task:
                near = difflib.get_close_matches(task, TASKS, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"evaluate.tasks {task}: no such task; {hint}Known tasks: {', '.join(TASKS)}")
        for name in ("fractions", "segmentation_fractions", "detection_fractions"):
            for share in getattr(self.evaluate, name):
                if not 0.0 < share <= 1.0:
                    raise ValueError(f"evaluate.{name} {share} is not a fraction; give numbers above 0, up to 1")
        for key in ("findings", "columns", "films"):
            for name in getattr(self.evaluate, key):
                if name not in self.evaluate.sets:
                    known = ", ".join(self.evaluate.sets) or "none"
                    raise ValueError(f"evaluate.{key} {name}: no such set in evaluate.sets; given are: {known}")
        if self.run.resume is not None and self.evaluate.ablation is None:
            raise ValueError(
                "run.resume: an evaluation cannot be resumed; remove run.resume. Stored features are reused"
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
            raise ValueError("run.resume: an embedding cannot be resumed; give a new run.name instead")
        for complaint in self.run.complaints():
            raise ValueError(complaint)
        return self
