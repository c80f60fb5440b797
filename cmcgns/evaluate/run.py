"""The evaluate job: computes features and pairs once, runs each task on them, and writes one table."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from cmcgns import storage
from cmcgns.cluster.placement import bundles
from cmcgns.cluster.session import ONE_CPU
from cmcgns.config import Config
from cmcgns.data.image import Target
from cmcgns.data.labelled import OWN_TABLES, OwnTable, open_set
from cmcgns.data.labelled.base import SPLITS, ImageSet
from cmcgns.data.labelled.corpus import labelled_set, phantom_set, with_valid_as_test
from cmcgns.data.readers import PairsSource, PhantomSource, open_index
from cmcgns.errors import UserError, cause
from cmcgns.evaluate.base import load_task, task_options
from cmcgns.evaluate.config import TASKS, EvaluateConfig, EvaluateJobConfig
from cmcgns.evaluate.encoders import open_encoders
from cmcgns.evaluate.report import Results, print_skipped_and_failed, read_results, report_page, show, write_results
from cmcgns.evaluate.scores import with_suffix
from cmcgns.evaluate.tasks import (
    FILM_HEADS,
    HEAD_TASKS,
    TASK_CPUS,
    Evaluation,
    TaskResult,
    start_feature_tasks,
    start_film_head_tasks,
    start_pair_tasks,
)
from cmcgns.evaluate.tasks.zeroshot import read_prompts
from cmcgns.job import Job, check_capacity
from cmcgns.library.runs import last_run
from cmcgns.run_folder import open_folder, write_config
from cmcgns.terminal import print_plan
from cmcgns.train.setup import with_absolute_paths

logger = logging.getLogger(__name__)


class EvaluateJob(Job):
    """Runs every task on every set with every encoder."""

    script = "evaluate"
    resume_key = ""
    packages = ("cmcgns", "ray", "torch", "transformers", "scikit-learn", "torchmetrics")

    def __init__(self, config: EvaluateJobConfig) -> None:
        settings = config.evaluate
        run = settings.run or last_run(config.run.storage)
        self.config = config.model_copy(update={"evaluate": settings.model_copy(update={"run": run})})
        encoders = open_encoders(run, list(settings.beside), settings.seed, settings.trusted)
        self.evaluation = Evaluation(settings, encoders, [], read_prompts(settings))
        self.others = {uri: read_results("evaluate.compare", uri) for uri in settings.compare}
        self.folder = open_folder(config.run, "evaluate", resume_key="")
        for name in settings.chosen_tasks:
            if name not in HEAD_TASKS:
                task_options(load_task(name), name, settings)  # refuse wrong options before anything is computed
        open_sets(self.evaluation)

    def environment(self) -> dict[str, str]:
        return task_variables(self.evaluation.settings)

    def needed(self) -> list[dict[str, float]]:
        return evaluation_bundles(self.evaluation.settings)

    def check_cluster(self, cpus: float) -> None:
        check_workers(self.evaluation.settings, self.evaluation.encoders[0].config)

    def plan(self, cpus: float) -> dict[str, str]:
        evaluation = self.evaluation
        facts = {
            "evaluation": self.folder.uri,
            "encoders": ", ".join(f"{encoder.name} ({encoder.origin})" for encoder in evaluation.encoders),
            "tasks": ", ".join(evaluation.settings.chosen_tasks),
        }
        if evaluation.settings.corpus:
            facts["corpus"] = f"{evaluation.encoders[0].config.data.uri}, {evaluation.settings.split} split"
        for images in evaluation.sets:
            counts = ", ".join(f"{len(images.split(name))} {name} ({images.digest(name)})" for name in SPLITS)
            facts[images.name] = f"{counts}; {images.rule}"
        return facts | {"workers": describe_workers(evaluation.settings), "cluster": f"{cpus:g} CPUs"}

    def run(self, terminal: Console) -> dict[str, Any]:
        evaluation = self.evaluation
        write_config(self.folder, self.config)
        measure_all(evaluation, features_folder(evaluation.settings, self.folder.storage))
        names = Counter(Path(uri).name for uri in self.others)
        for uri, results in self.others.items():
            add_other_evaluation(evaluation, Path(uri).name if names[Path(uri).name] == 1 else uri, results)
        order = [*TASKS, *evaluation.settings.chosen_tasks]
        evaluation.scores.sort(key=lambda score: (order.index(score.task), score.images))
        facts = self._facts()
        write_results(self.folder, evaluation.scores, facts)
        figures = sorted(evaluation.shown, key=lambda figure: figure.title)
        page = report_page(self.folder.name, evaluation.scores, figures, facts)
        storage.write_bytes(self.folder.file("report.html"), page.encode())
        show(terminal, evaluation.scores, evaluation.encoders[0].name)
        return {"status": "failed" if evaluation.failures else "finished"}

    def _facts(self) -> dict[str, Any]:
        evaluation = self.evaluation
        sets = {
            images.name: {
                "uri": images.source.uri,
                "rule": images.rule,
                "filtered": images.filtered,
                "splits": {name: {"images": len(images.split(name)), "digest": images.digest(name)} for name in SPLITS},
                "bad_rows": evaluation.bad_rows.get(images.name, {}),
            }
            for images in evaluation.sets
        }
        return {
            "encoders": {encoder.name: encoder.origin for encoder in evaluation.encoders},
            "sets": sets,
            "left_out": evaluation.skipped,
            "failures": evaluation.failures,
            "seconds": evaluation.seconds,
            "seed": evaluation.settings.seed,
            "split": evaluation.settings.split,
            "tests": evaluation.tests(),
            "versions": {name: metadata.version(name) for name in self.packages},
        }

    def write_result(self, result: dict[str, Any]) -> None:
        """Does nothing: evaluation.json has been written."""

    def report(self, terminal: Console, result: dict[str, Any]) -> None:
        if result["status"] == "stopped":
            terminal.print("stopped; the next evaluation reuses the features computed so far", highlight=False)
            return
        if result.get("failure"):
            super().report(terminal, result)
            return
        print_skipped_and_failed(terminal, self.evaluation.skipped, self.evaluation.failures)
        print_plan(terminal, self.summary(result))

    def summary(self, result: dict[str, Any]) -> dict[str, str]:
        return {"results": f"{self.folder.file('evaluation.json')}, evaluation.csv and report.html next to it"}


def add_other_evaluation(evaluation: Evaluation, name: str, results: Results) -> None:
    """Add the scores of another evaluation, for sets whose test images are the same."""
    ours = evaluation.tests()
    same = {images for images, digest in results.tests.items() if ours.get(images) == digest}
    scores = [score for score in results.scores if score.images in same]
    if results.seed != evaluation.settings.seed:
        scores = [replace(score, resampled_R=None) for score in scores]
        evaluation.skipped.append(
            f"intervals of {name}: it was resampled with seed {results.seed}, not {evaluation.settings.seed}"
        )
    evaluation.scores += with_suffix(scores, f" in {name}")
    other = sorted(results.tests.keys() - same)
    if other or not scores:
        evaluation.skipped.append(
            f"{', '.join(other) or 'all'} of {name}: not the same test images as in this evaluation"
        )


def open_sets(evaluation: Evaluation) -> None:
    """Open the corpus and every downstream set; one that cannot be opened is recorded as a failure."""
    settings, config = evaluation.settings, evaluation.encoders[0].config
    # the largest size that any encoder needs, since a JPEG may be decoded at a reduced scale
    largest = max(max(each.config.data.resize, each.config.data.image_size) for each in evaluation.encoders)
    target = Target(largest, "longer")

    def corpus() -> ImageSet | None:
        source, index = open_index("evaluate.run", with_absolute_paths(config).data, target)
        images = phantom_set(source) if isinstance(source, PhantomSource) else labelled_set(source, index)
        return with_valid_as_test(images, config.data.seed) if images and settings.split == "valid" else images

    openers: dict[str, Callable[[], ImageSet | None]] = {"the run's corpus": corpus} if settings.corpus else {}

    def downstream(name: str, uri: str) -> ImageSet:
        kind, uri = name.split(":")[0], storage.absolute("evaluate.sets", uri)
        # the run's seed: test images here were not in the run's random training split
        seed, borders = config.data.seed, config.data.crop_borders
        opened = open_set(kind, uri, seed, target, borders, own_table(settings, with_absolute_paths(config), name, uri))
        return replace(opened, name=name)

    for name, uri in settings.sets.items():
        openers[f"evaluate.sets {name}"] = partial(downstream, name, uri)
    for what, opener in openers.items():
        try:
            images = opener()
        except UserError as error:
            evaluation.failures.append(f"{what}: {error}")
            continue
        if images is None:
            evaluation.skipped.append(f"{what} has no labels: classification and zero-shot are skipped")
        else:
            evaluation.sets.append(images)


def own_table(settings: EvaluateConfig, run: Config, name: str, uri: str) -> OwnTable:
    """How the table of the set ``name`` at ``uri`` is read, if it is a user's own; the table of ``run`` as in training."""
    table_at = lambda uri: PairsSource.at(uri, (), 0).table_uri
    data = run.data
    is_of_run = name.split(":")[0] in OWN_TABLES and table_at(uri) == table_at(data.uri)
    return OwnTable(
        settings.draw_splits,
        settings.findings.get(name),
        settings.columns.get(name, data.columns if is_of_run else {}),
        settings.films.get(name, data.films if is_of_run else None),
    )


def task_variables(settings: EvaluateConfig) -> dict[str, str]:
    """Environment variables of the tasks."""
    return {"SCIPY_ARRAY_API": "1"} if settings.use_gpu else {}  # scikit-learn asks for it before it takes tensors


def evaluation_bundles(settings: EvaluateConfig) -> list[dict[str, float]]:
    """Resources of the workers, and one CPU each for a task and for reading films.

    With GPUs a task runs where a worker was: it needs a CPU beside the GPU.
    """
    cpus = max(settings.cpus_per_worker, TASK_CPUS) if settings.use_gpu else settings.cpus_per_worker
    return [*bundles(settings.workers, cpus, settings.use_gpu), ONE_CPU, ONE_CPU]


def describe_workers(settings: EvaluateConfig) -> str:
    """Workers and tasks with their resources, as text."""
    gpu = " + GPU" if settings.use_gpu else ""
    return f"{settings.workers} x {settings.cpus_per_worker:g} CPU{gpu}; tasks of {TASK_CPUS:g} CPU{gpu}, {settings.precision}"


def check_workers(settings: EvaluateConfig, config: Config) -> None:
    """Raise ``UserError`` if the workers, or a task of one CPU, leave no CPU for reading films."""
    own = settings
    reading = config.data.cpus_per_task
    check_capacity("evaluate", "worker", own.workers, own.cpus_per_worker, own.use_gpu, kept=reading, least=TASK_CPUS)


def features_folder(settings: EvaluateConfig, default_parent: str) -> str:
    """Folder of stored features: ``evaluate.features``, by default `features/` in ``default_parent``."""
    given = settings.features
    return storage.join(default_parent, "features") if given is None else storage.absolute("evaluate.features", given)


def measure_all(evaluation: Evaluation, cache: str) -> None:
    """Run every task on every set with every encoder."""
    settings = evaluation.settings
    logging.getLogger("cmcgns").setLevel(logging.INFO)  # to log the end of each task
    waiting: dict[Any, str] = {}
    tasks = {name: load_task(name) for name in settings.chosen_tasks if name not in HEAD_TASKS}
    on_pairs = {name: task for name, task in tasks.items() if task.reads == "pairs"}
    on_features = {name: task for name, task in tasks.items() if task.reads == "features"}
    if settings.corpus and on_pairs:
        waiting |= start_pair_tasks(evaluation, on_pairs)
    if on_features:
        for images in evaluation.sets:
            waiting |= start_feature_tasks(evaluation, on_features, images, cache)
    if set(FILM_HEADS) & set(settings.chosen_tasks):
        for images in evaluation.sets:
            waiting |= start_film_head_tasks(evaluation, images, cache)
    while waiting:
        (done, *_), _ = ray.wait(list(waiting))
        collect(evaluation, waiting.pop(done), done)


def collect(evaluation: Evaluation, what: str, reference: Any) -> None:
    """Add the scores of one task, or its failure."""
    try:
        measured: TaskResult = ray.get(reference)
        evaluation.scores += measured.scores
        evaluation.shown += measured.shown
        evaluation.seconds[what] = measured.seconds
        logger.info("%s: %.0f s", what, measured.seconds)
    except Exception as error:  # the other tasks continue
        evaluation.failures.append(f"{what}: {cause(error)}")
        logger.warning("%s could not be measured: %s", what, cause(error))
