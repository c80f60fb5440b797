"""Ray tasks of an evaluation: which task is started for which set and encoder, each on one CPU, and a GPU if it uses one."""

import hashlib
import itertools
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from cmcgns.data.labelled.base import SPLITS, AnnotationKind, ImageSet
from cmcgns.data.readers import PhantomSource
from cmcgns.errors import UserError, cause
from cmcgns.evaluate.base import CORPUS, Inputs, Task, task_options
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.encoders import EncoderSpec
from cmcgns.evaluate.features import make_features, read_features
from cmcgns.evaluate.figures import Figure
from cmcgns.evaluate.films import Films, film_ids, load_films, make_films
from cmcgns.evaluate.pairs import Pairs, embed_pairs
from cmcgns.evaluate.scores import Score, percent
from cmcgns.evaluate.tasks.classification import drawn_groups, finetune_scores
from cmcgns.evaluate.tasks.detection import detection_scores
from cmcgns.evaluate.tasks.segmentation import segmentation_scores
from cmcgns.library.texts import Prompts
from cmcgns.models.device import device_of

FILM_HEADS: dict[str, AnnotationKind] = {
    "segmentation": "masks",
    "detection": "boxes",
    "classification": "labels",
}
"""Tasks that train a head on films, and the annotations they use; classification only with tuned encoders."""
HEAD_TASKS = ("segmentation", "detection")
"""Tasks that only train a head on films."""
TASK_CPUS = 1.0


@dataclass
class Evaluation:
    """Inputs and results of an evaluation."""

    settings: EvaluateConfig
    encoders: list[EncoderSpec]
    sets: list[ImageSet]
    prompts: dict[str, Prompts]
    """Prompts by kind of set."""
    scores: list[Score] = field(default_factory=list)
    shown: list[Figure] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Tasks that were not run for a set or encoder, with the reason."""
    failures: list[str] = field(default_factory=list)
    """Tasks and sets that failed, with the reason."""
    bad_rows: dict[str, dict[str, str]] = field(default_factory=dict)
    """Reason for each unusable image, by set."""
    seconds: dict[str, float] = field(default_factory=dict)
    pairs_digest: str | None = None
    """Digest of the corpus's studies in ``settings.split``."""

    def tests(self) -> dict[str, str]:
        """Digest of the test images of each set, and of the corpus's test studies."""
        digests = {images.name: images.digest("test") for images in self.sets}
        return {CORPUS: self.pairs_digest} | digests if self.pairs_digest else digests


def start_pair_tasks(evaluation: Evaluation, tasks: dict[str, Task]) -> dict[Any, str]:
    """Start the tasks that read pairs of the corpus. Returns a description of each by its Ray reference."""
    settings, started = evaluation.settings, dict[Any, str]()
    images = next((each for each in evaluation.sets if isinstance(each.source, PhantomSource)), None)
    if images is None:
        unknown = [name for name, task in tasks.items() if task.needs_truth]
        evaluation.skipped += [f"{name}: findings of sentences are known only for the phantom" for name in unknown]
        tasks = {name: task for name, task in tasks.items() if name not in unknown}
    shared = ray.put(images)
    for encoder in evaluation.encoders if tasks else []:
        if not encoder.has_reports:
            evaluation.skipped.append(f"{', '.join(tasks)} by {encoder.name}: it has no text encoder")
            continue
        own = tasks
        if not encoder.run.method.has_attention:
            own = {name: task for name, task in tasks.items() if not task.needs_attention}
            reason = f"{encoder.config.method.name} attends to no patches"
            evaluation.skipped += [f"{name} by {encoder.name}: {reason}" for name in tasks if name not in own]
        if not own:
            continue
        pairs = reserved(embed, settings).remote(encoder, settings)
        try:  # one at a time: each needs a CPU in addition to those for its data
            digest, number = ray.get(studies_digest.remote(pairs))
        except Exception as error:
            evaluation.failures.append(f"pairs by {encoder.name}: {cause(error)}")
            continue
        if evaluation.pairs_digest not in (None, digest):
            evaluation.skipped.append(f"{', '.join(own)} by {encoder.name}: its corpus has other test studies")
            continue
        evaluation.pairs_digest = digest
        for name, task in own.items():
            if number < task.least_studies:
                reason = f"the {settings.split} split has {number} studies, it needs {task.least_studies} or more"
                evaluation.skipped.append(f"{name} by {encoder.name}: {reason}")
                continue
            reserving = reserved(run_pair_task, settings, task.uses_gpu)
            reference = reserving.remote(task, name, pairs, encoder, shared, settings)
            started[reference] = f"{name} by {encoder.name}"
    return started


def start_feature_tasks(evaluation: Evaluation, tasks: dict[str, Task], images: ImageSet, cache: str) -> dict[Any, str]:
    """Start the tasks that read features of ``images``. Returns a description of each by its Ray reference."""
    settings, started = evaluation.settings, dict[Any, str]()
    if not images.classes:
        evaluation.skipped.append(f"{images.name}: it has no labels for classification")
        return started
    wanted, prompts = {}, evaluation.prompts.get(images.kind, {})
    for name, task in tasks.items():
        if name == "classification" and "frozen" not in settings.encoder:
            continue
        reason = task.missing(images, prompts)
        if reason is None:
            wanted[name] = task
        else:
            evaluation.skipped.append(f"{name} of {images.name}: {reason}")
    if not wanted:
        return started
    try:
        uris, bad = make_features(evaluation.encoders, images, cache, settings)
    except Exception as error:
        evaluation.failures.append(f"features of {images.name}: {cause(error)}")
        return started
    evaluation.bad_rows[images.name] = bad
    shared = ray.put(images)
    for encoder, uri in zip(evaluation.encoders, uris, strict=True):
        for name, task in wanted.items():
            if task.needs_reports and not encoder.has_reports:
                evaluation.skipped.append(f"{name} of {images.name} by {encoder.name}: it has no text encoder")
                continue
            reserving = reserved(run_feature_task, settings, task.uses_gpu)
            reference = reserving.remote(task, name, uri, encoder, shared, prompts, settings)
            started[reference] = f"{name} of {images.name} by {encoder.name}"
    return started


def start_film_head_tasks(evaluation: Evaluation, images: ImageSet, cache: str) -> dict[Any, str]:
    """Start the tasks that train a head on the films of ``images``. Returns a description of each by its Ray reference."""
    settings, started, data = evaluation.settings, dict[Any, str](), evaluation.encoders[0].config.data
    shares = {
        "segmentation": settings.segmentation_fractions,
        "detection": settings.detection_fractions,
        "classification": settings.fractions,
    }
    classes = {"segmentation": images.mask_classes, "detection": images.box_classes, "classification": images.classes}
    asked = [task for task in FILM_HEADS if task in settings.chosen_tasks]
    if "tuned" not in settings.encoder and "classification" in asked:
        asked.remove("classification")
    empty = {task: _empty_split(images, FILM_HEADS[task]) for task in asked if classes[task]}
    evaluation.skipped += [
        f"{task} of {images.name}: no image of its {split} split has {FILM_HEADS[task]}"
        for task, split in empty.items()
        if split
    ]
    wanted = [task for task, split in empty.items() if not split]
    absent = [task for task in asked if not classes[task] and task != "classification"]
    evaluation.skipped += [f"{task} of {images.name}: it has no {FILM_HEADS[task]}" for task in absent]
    if not wanted:
        return started
    needed = pa.concat_tables(
        [images.annotated(images.table, FILM_HEADS[task]).select(["image_id"]) for task in wanted]
    )
    images = replace(images, table=images.table.filter(pc.is_in(images.table["image_id"], needed["image_id"])))
    shared = ray.put(images)
    for side in dict.fromkeys(encoder.config.data.image_size for encoder in evaluation.encoders):
        try:
            uri, bad = make_films(images, side, data.cpus_per_task, cache)
        except Exception as error:
            evaluation.failures.append(f"films of {images.name}: {cause(error)}")
            continue
        evaluation.bad_rows.setdefault(images.name, {}).update(bad)
        for encoder in (each for each in evaluation.encoders if each.config.data.image_size == side):
            for task in wanted:
                modes = [mode for mode in settings.encoder if mode == "tuned" or task != "classification"]
                for share, mode in itertools.product(shares[task], modes):
                    reference = reserved(run_film_head, settings).remote(
                        task, uri, shared, encoder, share, mode == "tuned", settings
                    )
                    started[reference] = (
                        f"{task} of {images.name} by {encoder.name}, {mode}, {percent(share)} of labels"
                    )
    return started


def _empty_split(images: ImageSet, what: AnnotationKind) -> str | None:
    """The first split without an image annotated for ``what``; None if there is none."""
    return next((split for split in SPLITS if not len(images.annotated(images.split(split), what))), None)


def reserved(function: Any, settings: EvaluateConfig, uses_gpu: bool = True) -> Any:
    """The Ray function with a GPU of its own, if it uses one and the settings give it."""
    return function.options(num_gpus=int(settings.use_gpu and uses_gpu))


@dataclass(frozen=True)
class TaskResult:
    """Result of one task."""

    scores: list[Score]
    shown: list[Figure]
    seconds: float


@ray.remote(num_cpus=TASK_CPUS)
def embed(encoder: EncoderSpec, settings: EvaluateConfig) -> Pairs:
    """Embeddings of a split of the corpus by an encoder's model."""
    device = device_of(settings.use_gpu)
    return embed_pairs(encoder.load_model(), encoder.run, settings.split, device, settings.precision)


@ray.remote(num_cpus=0)
def studies_digest(pairs: Pairs) -> tuple[str, int]:
    """Hash of the studies and films of ``pairs`` and their number, computed where they are stored."""
    shown = [*pairs.study_N, *pairs.path_N]
    return hashlib.blake2b("\n".join(shown).encode(), digest_size=6).hexdigest(), len(pairs.study_N)


@ray.remote(num_cpus=TASK_CPUS)
def run_pair_task(
    task: Task, name: str, pairs: Pairs, encoder: EncoderSpec, images: ImageSet | None, settings: EvaluateConfig
) -> TaskResult:
    """Scores of a task that reads pairs."""
    device, options = device_of(settings.use_gpu and task.uses_gpu), task_options(task, name, settings)
    return measure(task, Inputs(name, encoder, images, settings, pairs=pairs, options=options, device=device))


@ray.remote(num_cpus=TASK_CPUS)
def run_feature_task(
    task: Task, name: str, uri: str, encoder: EncoderSpec, images: ImageSet, prompts: Prompts, settings: EvaluateConfig
) -> TaskResult:
    """Scores of a task that reads the features at ``uri``."""
    device, options = device_of(settings.use_gpu and task.uses_gpu), task_options(task, name, settings)
    inputs = Inputs(name, encoder, images, settings, prompts=prompts, options=options, device=device)
    return measure(task, replace(inputs, features=read_features(uri)))


def measure(task: Task, inputs: Inputs) -> TaskResult:
    """Scores, figures and seconds of one task."""
    began = time.perf_counter()
    return TaskResult(task.scores(inputs), inputs.shown, time.perf_counter() - began)


@ray.remote(num_cpus=TASK_CPUS)
def run_film_head(
    task: str, uri: str, images: ImageSet, encoder: EncoderSpec, share: float, tuned: bool, settings: EvaluateConfig
) -> TaskResult:
    """Scores of one of ``FILM_HEADS`` on the films at ``uri``."""
    began, shown = time.perf_counter(), list[Figure]()
    torch.set_num_threads(1)
    side, device = encoder.config.data.image_size, device_of(settings.use_gpu)
    parts, groups = parts_of(uri, images, side, FILM_HEADS[task], share, settings.seed)
    if task == "classification":
        scores = finetune_scores(encoder, images, parts, groups, share, settings, device)
    else:
        measured = segmentation_scores if task == "segmentation" else detection_scores
        scores = measured(encoder, images, parts, groups, share, tuned, settings, shown, device)
    return TaskResult(scores, shown, time.perf_counter() - began)


def parts_of(
    uri: str, images: ImageSet, side: int, what: AnnotationKind, share: float, seed: int
) -> tuple[dict[str, Films], list[str]]:
    """The films of each split that are annotated for ``what`` (in training a ``share`` of the groups), and the groups of
    the test films.

    Raises:
        UserError: a split has no such film.
    """
    usable, parts, groups = pa.array(film_ids(uri), pa.string()), dict[str, Films](), list[str]()
    for split in SPLITS:
        rows = images.annotated(images.split(split), what)
        rows = rows.filter(pc.is_in(rows["image_id"], usable))
        if not len(rows):
            raise UserError(f"{images.name}: the {split} split has no usable image with {what}")
        if split == "train":
            rows = rows.filter(pa.array(drawn_groups(rows["group"].to_pylist(), share, seed)))
        # in the set's order, as in the file
        parts[split] = load_films(uri, images, side, rows["image_id"].to_pylist())
        groups = rows["group"].to_pylist()
    return parts, groups
