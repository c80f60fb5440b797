"""Ablations: pretrain variants with several seeds each, and compare them with intervals over studies and seeds."""

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table

from cmcgns import storage
from cmcgns.cli import STATUS_FAILED, STATUS_INTERRUPTED, STATUS_TERMINATED, read_yaml, resolve
from cmcgns.cluster.placement import run_bundles
from cmcgns.cluster.session import ONE_CPU
from cmcgns.config import Config, Section
from cmcgns.errors import UserError
from cmcgns.evaluate.config import EvaluateJobConfig
from cmcgns.evaluate.encoders import EncoderSpec
from cmcgns.evaluate.figures import bars
from cmcgns.evaluate.report import cell, gap, print_skipped_and_failed, without_nan, write_results
from cmcgns.evaluate.run import (
    check_workers,
    evaluation_bundles,
    features_folder,
    measure_all,
    open_sets,
    task_variables,
)
from cmcgns.evaluate.scores import OF_A_CLASS, Difference, Score, over_draws
from cmcgns.evaluate.tasks import Evaluation
from cmcgns.evaluate.tasks.zeroshot import read_prompts
from cmcgns.job import Job
from cmcgns.library.runs import open_run
from cmcgns.run_folder import RunFolder, find_folder, has_finished, refuse_changes, write_config
from cmcgns.terminal import log_on, print_plan
from cmcgns.train.run import check_cpus, pretrain, reserved_cpus, worker_variables
from cmcgns.train.setup import FREE_TO_CHANGE, with_absolute_paths

RUNS = "runs"
CORPUS = ("uri", "format", "columns", "films", "views", "seed", "phantom_studies", "phantom_size")
"""Settings of `data` that determine the test studies and their films."""


@dataclass(frozen=True)
class Ablation:
    """Settings by variant, in order."""

    variants: dict[str, Config]
    seeds: tuple[int, ...]
    compared_with: dict[str, str]
    """The other variant with which one is compared."""

    def config(self, folder: RunFolder, variant: str, seed: int) -> Config:
        """The settings of one run; resumes it if it has started."""
        config, name = self.variants[variant], run_name(variant, seed)
        runs = storage.join(folder.uri, RUNS)
        started = storage.exists(storage.join(runs, f"{name}/config.yaml"))
        overrides = {"train.seed": seed, "run.storage": runs, f"run.{'resume' if started else 'name'}": name}
        return resolve(config.model_dump(mode="json"), overrides, Config)


def run_name(variant: str, seed: int) -> str:
    """Name of a run's folder."""
    return f"{re.sub(r'[^a-z0-9]+', '-', variant.lower()).strip('-')}-{seed}"


class AblationFile(Section):
    """Content of an ablation's YAML file."""

    base: str | None = None
    """Config of all variants; path relative to this file."""
    seeds: tuple[int, ...] = Field(min_length=1)
    variants: dict[str, dict[str, Any] | None] = Field(min_length=2)
    """Settings of each variant that differ from the base; or `extends`, a config that it starts from instead of the base."""
    compare_with: dict[str, str] = {}
    """The variant with which one is compared: `{variant: other}`; by default the one before it."""


def read_ablation(path: str) -> Ablation:
    """The ablation in a YAML file, see ``AblationFile``.

    Raises:
        UserError: the file has another layout, or a setting of a variant is refused; names the variant.
    """
    try:
        content = AblationFile.model_validate(read_yaml(path, "evaluate.ablation"))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"evaluate.ablation {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; write base, seeds and variants as "
            "in jobs/ablation.yaml"
        ) from None
    folder = path.rpartition("/")[0] or "."
    base = read_yaml(storage.join(folder, content.base), "evaluate.ablation base") if content.base else {}
    configs = {}
    for name, given in content.variants.items():
        settings = dict(given or {})
        start = settings.pop("extends", None)
        try:
            below = copy.deepcopy(base) if start is None else read_yaml(str(start), "extends")
            configs[name] = resolve(below, settings, Config)
        except UserError as error:
            raise UserError(f"evaluate.ablation {path}: variant {name}: {error}") from None
    complaint = _complaint(configs, content)
    if complaint:
        raise UserError(f"evaluate.ablation {path}: {complaint}")
    before = {later: earlier for earlier, later in itertools.pairwise(configs)}
    return Ablation(configs, content.seeds, before | content.compare_with)


def _complaint(configs: dict[str, Config], content: AblationFile) -> str | None:
    """Why the variants cannot be compared."""
    seeds = content.seeds
    if len(set(seeds)) < len(seeds):
        return f"seeds {', '.join(map(str, seeds))}: a seed appears twice; remove it"
    different = [key for key in CORPUS if len({str(getattr(config.data, key)) for config in configs.values()}) > 1]
    if different:
        return f"data.{different[0]} differs between variants; all need the same test studies"
    if len({run_name(name, seeds[0]) for name in configs}) < len(configs):
        return "two variants would have the same folder; give them names that differ in letters or digits"
    unknown = [name for pair in content.compare_with.items() for name in pair if name not in configs]
    if unknown:
        return f"compare_with: there is no variant {unknown[0]}; the variants are: {'; '.join(configs)}"
    return None


def over_seeds(scores: Sequence[Score], variants: dict[str, list[str]]) -> list[Score]:
    """Scores of each variant: means over its runs, resampled over test studies and seeds. ``variants`` gives the encoder names of
    each variant, in the order of the seeds: all variants draw the same seeds, so that differences are paired by seed."""
    means = []
    by_name = {(score.encoder, score.key): score for score in scores}
    for key in dict.fromkeys(score.key for score in scores):
        for variant, encoders in variants.items():
            # scores come in any order
            own = [by_name[encoder, key] for encoder in encoders if (encoder, key) in by_name]
            if own and all(score.resampled_R is not None for score in own):
                value, resampled = over_draws([score.value for score in own], [_resamples(score) for score in own])
                means.append(replace(own[0], encoder=variant, value=value, resampled_R=resampled, note=_spread(own)))
    return means


def _resamples(score: Score) -> Any:
    assert score.resampled_R is not None
    return score.resampled_R


def _spread(own: Sequence[Score]) -> str:
    values = [score.value for score in own]
    return f"{len(values)} seeds, standard deviation {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""


def gains(scores: Sequence[Score], compared_with: dict[str, str]) -> list[Difference]:
    """Difference of each variant to the one it is compared with, for each score."""
    by_name = {(score.encoder, score.key): score for score in scores}
    return [
        Difference(by_name[variant, key], by_name[other, key])
        for key in dict.fromkeys(score.key for score in scores)
        for variant, other in compared_with.items()
        if (variant, key) in by_name and (other, key) in by_name
    ]


class AblationJob(Job):
    """Pretrains all variants with all seeds, then evaluates and compares them."""

    script = "evaluate"
    resumes_from = "the last finished run"

    def __init__(self, config: EvaluateJobConfig) -> None:
        self.config, self.settings = config, config.evaluate
        assert self.settings.ablation is not None
        self.ablation, self.prompts = read_ablation(self.settings.ablation), read_prompts(self.settings)
        self.folder = find_folder(config.run, "ablation")
        refuse_other_runs(self.ablation, self.folder)
        self.first = next(iter(self.ablation.variants.values()))

    def environment(self) -> dict[str, str]:
        return worker_variables(self.first) | task_variables(self.settings)

    def needed(self) -> list[dict[str, float]]:
        pretraining = [*run_bundles(max(self.ablation.variants.values(), key=reserved_cpus)), ONE_CPU]
        # one after the other: the cluster has to hold the larger of both
        amount = lambda asked: [sum(bundle.get(kind, 0.0) for bundle in asked) for kind in ("GPU", "CPU")]
        return max(pretraining, evaluation_bundles(self.settings), key=amount)

    def check_cluster(self, cpus: float) -> None:
        for each in self.ablation.variants.values():
            check_cpus(each)
        check_workers(self.settings, self.first)

    def plan(self, cpus: float) -> dict[str, str]:
        variants, seeds = self.ablation.variants, self.ablation.seeds
        return {
            "ablation": f"{self.folder.uri}{' (resumed)' if self.folder.resumed else ''}",
            "variants": "; ".join(variants),
            "runs": f"{len(variants) * len(seeds)}: each variant with the seeds {', '.join(map(str, seeds))}",
        }

    def run(self, terminal: Console) -> dict[str, Any]:
        ablation, folder = self.ablation, self.folder
        write_config(folder, self.config)
        failures = pretrain_all(terminal, ablation, folder)
        variants = finished_runs(ablation, folder)
        evaluation = Evaluation(self.settings, encoders_of(variants, folder), [], self.prompts, failures=failures)
        if evaluation.encoders:
            open_sets(evaluation)
            with log_on(terminal):  # pretraining has redirected the log to its coordinator
                measure_all(evaluation, features_folder(self.settings, folder.uri))
        write_comparison(terminal, folder, evaluation, variants, ablation.compared_with)
        return {"status": "failed" if evaluation.failures else "finished"}

    def write_result(self, result: dict[str, Any]) -> None:
        """Does nothing: ablation.json has been written."""

    def report(self, terminal: Console, result: dict[str, Any]) -> None:
        if result["status"] == "stopped" or result.get("failure"):
            super().report(terminal, result)
        else:
            print_plan(terminal, self.summary(result))

    def summary(self, result: dict[str, Any]) -> dict[str, str]:
        return {"results": f"{self.folder.file('ablation.json')}, ablation.csv and ablation.png next to it"}


def refuse_other_runs(ablation: Ablation, folder: RunFolder) -> None:
    """Raise ``UserError`` if a run in the folder has other settings than the ablation file has now."""
    for variant in ablation.variants:
        for seed in ablation.seeds:
            run = RunFolder(storage.join(folder.uri, RUNS), run_name(variant, seed), resumed=True)
            if storage.exists(run.file("config.yaml")):
                refuse_changes(with_absolute_paths(ablation.config(folder, variant, seed)), run, FREE_TO_CHANGE)


def encoders_of(variants: dict[str, list[str]], folder: RunFolder) -> list[EncoderSpec]:
    """The encoder of each finished run."""
    runs = storage.join(folder.uri, RUNS)
    names = [name for each in variants.values() for name in each]
    return [EncoderSpec(name, open_run("evaluate.ablation", storage.join(runs, name)), "run") for name in names]


def pretrain_all(terminal: Console, ablation: Ablation, folder: RunFolder) -> list[str]:
    """Pretrain every variant with every seed, except finished runs. Returns a line for each failure.

    Raises:
        KeyboardInterrupt: the user has stopped a run, which has saved a checkpoint.
    """
    failures, pairs = [], [(variant, seed) for seed in ablation.seeds for variant in ablation.variants]
    for number, (variant, seed) in enumerate(pairs, 1):
        name = run_name(variant, seed)
        if has_finished(RunFolder(storage.join(folder.uri, RUNS), name, resumed=True)):
            continue
        line = f"run {number} of {len(pairs)}: {variant}, seed {seed}"
        terminal.print(line, style="bold", highlight=False, markup=False)
        reason = f"see {folder.uri}/{RUNS}/{name}/result.json"
        try:
            status = pretrain(ablation.config(folder, variant, seed))
        except UserError as error:  # for example, the corpus is too small
            status, reason = STATUS_FAILED, str(error)
        if status in (STATUS_INTERRUPTED, STATUS_TERMINATED):
            raise KeyboardInterrupt
        if status:
            failures.append(f"{variant}, seed {seed}: pretraining failed, {reason}")
            terminal.print(f"failed: {failures[-1]}", style="red", highlight=False, markup=False)
    return failures


def finished_runs(ablation: Ablation, folder: RunFolder) -> dict[str, list[str]]:
    """Names of the finished runs by variant."""
    runs = storage.join(folder.uri, RUNS)
    names = {variant: [run_name(variant, seed) for seed in ablation.seeds] for variant in ablation.variants}
    return {
        variant: [name for name in each if has_finished(RunFolder(runs, name, resumed=True))]
        for variant, each in names.items()
    }


def write_comparison(
    terminal: Console,
    folder: RunFolder,
    evaluation: Evaluation,
    variants: dict[str, list[str]],
    compared_with: dict[str, str],
) -> None:
    """Write all scores and print their table."""
    scores = over_seeds(evaluation.scores, variants)
    gained = gains(scores, compared_with)
    facts = {
        "sets": {},
        "tests": evaluation.tests(),
        "seed": evaluation.settings.seed,
        "left_out": evaluation.skipped,
        "failures": evaluation.failures,
    }
    write_results(folder, evaluation.scores, facts)
    folder.write_json("ablation.json", as_json(scores, gained))
    storage.write_bytes(
        folder.file("ablation.csv"), pd.DataFrame([score.row() for score in scores]).to_csv(index=False).encode()
    )
    means = [score for score in scores if OF_A_CLASS not in score.metric]
    if means:
        storage.write_bytes(folder.file("ablation.png"), bars(means))
    show(terminal, means, gained)
    print_skipped_and_failed(terminal, evaluation.skipped, evaluation.failures)


def as_json(scores: Sequence[Score], gained: Sequence[Difference]) -> dict[str, Any]:
    """Content of ablation.json."""
    rows = [score.row() for score in scores]
    steps = [
        {"key": each.first.key, "variant": each.first.encoder, "before": each.second.encoder, "gain": each.value,
         "interval": each.interval}
        for each in gained
    ]  # fmt: skip
    return without_nan({"scores": rows, "gains": steps})


def show(terminal: Console, scores: Sequence[Score], gained: Sequence[Difference]) -> None:
    """Print a row per score and variant, with its gain over the variant it is compared with; a star if it excludes 0."""
    of_variant = {(each.first.encoder, each.first.key): each for each in gained}
    table = Table(box=None, pad_edge=False)
    for name in ("task", "setting", "metric", "variant", "mean over seeds", "gain", "over"):
        table.add_column(name)
    for score in scores:
        own = of_variant.get((score.encoder, score.key))
        over = own.second.encoder if own is not None else ""
        table.add_row(score.task, score.setting, score.metric, score.encoder, cell(score), gap(own), over)
    terminal.print(table)
