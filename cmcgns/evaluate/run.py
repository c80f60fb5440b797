"""The driver of `jobs/evaluate.py`: features and pairs once, then each task by itself, then one table."""

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
from cmcgns.cli import STATUS_INTERRUPTED, to_yaml
from cmcgns.cluster.placement import bundles
from cmcgns.cluster.session import ONE_CPU, ray_session
from cmcgns.data.image import Target
from cmcgns.data.labelled import open_set
from cmcgns.data.labelled.base import SPLITS, ImageSet
from cmcgns.data.labelled.corpus import labelled_set, phantom_set
from cmcgns.data.readers import PhantomSource, open_index
from cmcgns.errors import UserError, cause
from cmcgns.evaluate.config import TASKS, EvaluateConfig, EvaluateJobConfig
from cmcgns.evaluate.encoders import last_run, open_encoders
from cmcgns.evaluate.report import Results, read_results, report_page, show, tell_rest, write_results
from cmcgns.evaluate.scores import named
from cmcgns.evaluate.tasks import (
    ON_FEATURES,
    ON_PAIRS,
    ON_PLACES,
    Evaluation,
    Measured,
    start_feature_tasks,
    start_pair_tasks,
    start_place_tasks,
)
from cmcgns.evaluate.tasks.zeroshot import read_prompts
from cmcgns.run_folder import RunFolder, open_folder, warn_of_passing_folder
from cmcgns.terminal import console, log_on, print_plan, quiet_terminal
from cmcgns.train.setup import with_absolute_paths

logger = logging.getLogger(__name__)
PACKAGES = ("cmcgns", "ray", "torch", "transformers", "scikit-learn", "torchmetrics")


def evaluate(config: EvaluateJobConfig) -> int:
    """Exit status of an evaluation: 0 all was measured, 1 something could not be, 130 stopped by the user."""
    terminal, settings = console(), config.evaluate
    logging.getLogger("cmcgns").setLevel(logging.INFO)  # each task's end is told
    run = settings.run or last_run(config.run.storage)
    found = Evaluation(settings, open_encoders(run, list(settings.beside), settings.seed), [], read_prompts(settings))
    others = {uri: read_results("evaluate.compare", uri) for uri in settings.compare}
    folder = open_folder(config.run, "evaluate", resume_key="")
    open_sets(found)
    # beside the workers, a task of one CPU and one that reads, as ``check_capacity`` counts them
    workers = bundles(settings.workers, settings.cpus_per_worker, settings.use_gpu)
    with quiet_terminal(), log_on(terminal), ray_session(needed=[*workers, ONE_CPU, ONE_CPU]) as cpus:
        check_capacity(settings, cpus, found.encoders[0].config.data.cpus_per_task)
        print_plan(terminal, describe_plan(found, folder, cpus))
        warn_of_passing_folder(terminal, folder)
        chosen = config.model_copy(update={"evaluate": settings.model_copy(update={"run": run})})
        storage.write_bytes(folder.file("config.yaml"), to_yaml(chosen).encode())
        try:
            measure_all(found, features_folder(settings, folder.storage))
        except KeyboardInterrupt:
            terminal.print("stopped; features that were made are kept for the next time", highlight=False)
            return STATUS_INTERRUPTED
        names = Counter(Path(uri).name for uri in others)
        for uri, results in others.items():
            beside(found, Path(uri).name if names[Path(uri).name] == 1 else uri, results)
        return conclude(terminal, folder, found)


def beside(found: Evaluation, name: str, results: Results) -> None:
    """Put the scores of another evaluation beside ours, those of sets whose test images are the same."""
    ours = found.tests()
    same = {images for images, digest in results.tests.items() if ours.get(images) == digest}
    scores = [score for score in results.scores if score.images in same]
    if results.seed != found.settings.seed:
        scores = [replace(score, resampled_R=None) for score in scores]
        found.left_out.append(
            f"intervals of {name}: it was resampled with seed {results.seed}, not {found.settings.seed}"
        )
    found.scores += named(scores, f" in {name}")
    other = sorted(results.tests.keys() - same)
    if other or not scores:
        found.left_out.append(f"{', '.join(other) or 'all'} of {name}: other test images than here, or none here")


def open_sets(found: Evaluation) -> None:
    """Open the corpus and every downstream set; one that cannot be is a failure, and the others go on."""
    settings, config = found.settings, found.encoders[0].config
    # as large as any encoder needs them: a JPEG may be decoded at a reduced scale
    largest = max(max(each.config.data.resize, each.config.data.image_size) for each in found.encoders)
    target = Target(largest, "longer")

    def corpus() -> ImageSet | None:
        source, index = open_index("evaluate.run", with_absolute_paths(config).data, target)
        return phantom_set(source) if isinstance(source, PhantomSource) else labelled_set(source, index)

    openers: dict[str, Callable[[], ImageSet | None]] = {"the run's corpus": corpus} if settings.corpus else {}

    def downstream(name: str, uri: str) -> ImageSet:
        kind, uri = name.split(":")[0], storage.absolute("evaluate.sets", uri)
        # what is drawn for testing here was not drawn for training there
        seed, borders = config.data.seed, config.data.crop_borders
        return replace(open_set(kind, uri, seed, target, borders, settings.draw_splits), name=name)

    for name, uri in settings.sets.items():
        openers[f"evaluate.sets {name}"] = partial(downstream, name, uri)
    for what, opener in openers.items():
        try:
            images = opener()
        except UserError as error:
            found.failures.append(f"{what}: {error}")
            continue
        if images is None:
            found.left_out.append(f"{what} has no labels: classification and zero-shot are left out")
        else:
            found.sets.append(images)


def check_capacity(settings: EvaluateConfig, cpus: float, reading: float) -> None:
    """Refuse what would leave Ray Data without the CPUs of one ``reading`` task, with the numbers."""
    wanted = max(settings.workers * settings.cpus_per_worker, 1.0)  # tasks have one CPU
    if wanted + reading > cpus:
        raise UserError(
            f"evaluate.workers {settings.workers} of {settings.cpus_per_worker:g} CPUs (or a task of one) need {wanted:g}, and "
            f"{reading:g} are kept for data; the cluster has {cpus:g}. Lower evaluate.workers or evaluate.cpus_per_worker"
        )
    gpus = float(ray.cluster_resources().get("GPU", 0))
    if settings.use_gpu and settings.workers > gpus:
        raise UserError(f"evaluate.workers {settings.workers} need as many GPUs; the cluster has {gpus:g}")


def features_folder(settings: EvaluateConfig, otherwise: str) -> str:
    """Where features are kept: as told, else beside what is in ``otherwise``."""
    told = settings.features
    return storage.join(otherwise, "features") if told is None else storage.absolute("evaluate.features", told)


def measure_all(found: Evaluation, cache: str) -> None:
    """Every task on every set with every encoder."""
    settings = found.settings
    waiting: dict[Any, str] = {}
    if settings.corpus and set(ON_PAIRS) & set(settings.tasks):
        waiting |= start_pair_tasks(found)
    if set(ON_FEATURES) & set(settings.tasks):
        for images in found.sets:
            waiting |= start_feature_tasks(found, images, cache)
    if set(ON_PLACES) & set(settings.tasks):
        for images in found.sets:
            waiting |= start_place_tasks(found, images, cache)
    while waiting:
        (done, *_), _ = ray.wait(list(waiting))
        collect(found, waiting.pop(done), done)


def collect(found: Evaluation, what: str, reference: Any) -> None:
    """Add the scores of one task, or why there are none."""
    try:
        measured: Measured = ray.get(reference)
        found.scores += measured.scores
        found.shown += measured.shown
        found.seconds[what] = measured.seconds
        logger.info("%s: %.0f s", what, measured.seconds)
    except Exception as error:  # the others go on
        found.failures.append(f"{what}: {cause(error)}")
        logger.warning("%s could not be measured: %s", what, cause(error))


def describe_plan(found: Evaluation, folder: RunFolder, cpus: float) -> dict[str, str]:
    """What is about to be measured."""
    facts = {
        "evaluation": folder.uri,
        "encoders": ", ".join(f"{encoder.name} ({encoder.origin})" for encoder in found.encoders),
        "tasks": ", ".join(found.settings.tasks),
    }
    for images in found.sets:
        counts = ", ".join(f"{len(images.split(name))} {name} ({images.digest(name)})" for name in SPLITS)
        facts[images.name] = f"{counts}; {images.rule}"
    return facts | {"cluster": f"{cpus:g} CPUs"}


def conclude(terminal: Console, folder: RunFolder, found: Evaluation) -> int:
    """Write everything down, show the table; the exit status."""
    sets = {
        images.name: {
            "uri": images.source.uri,
            "rule": images.rule,
            "filtered": images.filtered,
            "splits": {name: {"images": len(images.split(name)), "digest": images.digest(name)} for name in SPLITS},
            "bad_rows": found.bad_rows.get(images.name, {}),
        }
        for images in found.sets
    }
    facts = {
        "encoders": {encoder.name: encoder.origin for encoder in found.encoders},
        "sets": sets,
        "left_out": found.left_out,
        "failures": found.failures,
        "seconds": found.seconds,
        "seed": found.settings.seed,
        "tests": found.tests(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    found.scores.sort(key=lambda score: (TASKS.index(score.task), score.images))
    write_results(folder, found.scores, facts)
    page = report_page(folder.name, found.scores, sorted(found.shown, key=lambda figure: figure.title), facts)
    storage.write_bytes(folder.file("report.html"), page.encode())
    show(terminal, found.scores, found.encoders[0].name)
    results = f"{folder.file('evaluation.json')}, evaluation.csv and report.html beside it"
    return tell_rest(terminal, found.left_out, found.failures, results)
