"""The driver of `jobs/evaluate.py --evaluate.ablation=FILE`: pretrain what has not been yet, evaluate all, one table."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from cmcgns.command_line import STATUS_FAILED, STATUS_INTERRUPTED, to_yaml
from cmcgns.data import storage
from cmcgns.errors import UserError
from cmcgns.evaluate.ablation import RUNS, Ablation, increments, over_seeds, read_ablation, run_name
from cmcgns.evaluate.encoders import EncoderSpec
from cmcgns.evaluate.exported import open_run
from cmcgns.evaluate.figures import bars
from cmcgns.evaluate.job_config import EvaluateConfig, EvaluateJobConfig
from cmcgns.evaluate.report import cell, gap, tell_rest, without_nan, write_results
from cmcgns.evaluate.run import check_capacity, features_folder, measure_all, open_sets
from cmcgns.evaluate.scores import OF_A_CLASS, Difference, Score
from cmcgns.evaluate.tasks import Evaluation
from cmcgns.evaluate.zeroshot import read_prompts
from cmcgns.placement import held_bundles
from cmcgns.run_folder import RunFolder, find_folder, has_finished, refuse_changes, warn_of_passing_folder
from cmcgns.session import ONE_CPU, ray_session
from cmcgns.terminal import console, log_on, print_plan
from cmcgns.train.folder import FREE_TO_CHANGE, with_absolute_paths
from cmcgns.train.plan import check_cpus, taken_cpus
from cmcgns.train.run import pretrain, worker_variables

TASKS = ("retrieval", "classification", "clusters")
"""What variants are compared by, of the tasks that are asked for: none takes long."""


def ablate(config: EvaluateJobConfig) -> int:
    """Exit status of an ablation: 0 all was measured, 1 a run or a task failed, 130 stopped by the user."""
    terminal, settings = console(), with_tasks(config.evaluate)
    assert settings.ablation is not None
    ablation, prompts = read_ablation(settings.ablation), read_prompts(settings)
    folder = find_folder(config.run, "ablation")
    refuse_other_runs(ablation, folder)
    first = next(iter(ablation.variants.values()))
    largest = max(ablation.variants.values(), key=taken_cpus)
    with ray_session(worker_variables(first), needed=[*held_bundles(largest), ONE_CPU]) as cpus:
        for each in ablation.variants.values():
            check_cpus(each)
        check_capacity(settings, cpus, first.data.cpus_per_task)
        print_plan(terminal, describe_plan(ablation, folder))
        warn_of_passing_folder(terminal, folder)
        storage.write_bytes(folder.file("config.yaml"), to_yaml(config).encode())
        try:
            failures = pretrain_all(terminal, ablation, folder)
            variants = finished_runs(ablation, folder)
            found = Evaluation(settings, encoders_of(variants, folder), [], prompts, failures=failures)
            if found.encoders:
                open_sets(found)
                with log_on(terminal):
                    measure_all(found, features_folder(settings, folder.uri))
        except KeyboardInterrupt:
            terminal.print(
                f"stopped; go on with: python jobs/evaluate.py --run.storage={folder.storage} --run.resume={folder.name}",
                highlight=False,
            )
            return STATUS_INTERRUPTED
    return conclude(terminal, folder, found, variants)


def refuse_other_runs(ablation: Ablation, folder: RunFolder) -> None:
    """Refuse to go on beside runs that were made with other settings than the file has now."""
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


def with_tasks(settings: EvaluateConfig) -> EvaluateConfig:
    """``settings`` without the tasks that an ablation does not compare by.

    Raises:
        UserError: none is left.
    """
    tasks = tuple(task for task in settings.tasks if task in TASKS)
    if not tasks:
        raise UserError(f"evaluate.tasks {', '.join(settings.tasks)}: an ablation is compared by {', '.join(TASKS)}")
    return settings.model_copy(update={"tasks": tasks})


def pretrain_all(terminal: Console, ablation: Ablation, folder: RunFolder) -> list[str]:
    """Pretrain every variant with every seed, those that have finished not again; why some failed.

    Raises:
        KeyboardInterrupt: the user has stopped one; it has saved what it has.
    """
    failures, every = [], [(variant, seed) for seed in ablation.seeds for variant in ablation.variants]
    for place, (variant, seed) in enumerate(every, 1):
        name = run_name(variant, seed)
        if has_finished(RunFolder(storage.join(folder.uri, RUNS), name, resumed=True)):
            continue
        terminal.print(f"[bold]run {place} of {len(every)}: {variant}, seed {seed}[/bold]", highlight=False)
        reason = f"see {folder.uri}/{RUNS}/{name}/result.json"
        try:
            status = pretrain(ablation.config(folder, variant, seed))
        except UserError as error:  # what the corpus cannot carry
            status, reason = STATUS_FAILED, str(error)
        if status == STATUS_INTERRUPTED:
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


def describe_plan(ablation: Ablation, folder: RunFolder) -> dict[str, str]:
    """What is about to be run."""
    runs = len(ablation.variants) * len(ablation.seeds)
    return {
        "ablation": f"{folder.uri}{' (resumed)' if folder.resumed else ''}",
        "variants": "; ".join(ablation.variants),
        "runs": f"{runs}: each variant with the seeds {', '.join(map(str, ablation.seeds))}",
    }


def conclude(terminal: Console, folder: RunFolder, found: Evaluation, variants: dict[str, list[str]]) -> int:
    """Write everything down, show the table; the exit status."""
    scores = over_seeds(found.scores, variants)
    gains = increments(scores, list(variants))
    told = {"left_out": found.left_out, "failures": found.failures}
    write_results(folder, found.scores, {"sets": {}, "tests": found.tests(), "seed": found.settings.seed} | told)
    folder.write_json("ablation.json", as_json(scores, gains))
    storage.write_bytes(
        folder.file("ablation.csv"), pd.DataFrame([score.row() for score in scores]).to_csv(index=False).encode()
    )
    means = [score for score in scores if OF_A_CLASS not in score.metric]
    if means:
        storage.write_bytes(folder.file("ablation.png"), bars(means))
    show(terminal, means, gains)
    results = f"{folder.file('ablation.json')}, ablation.csv and ablation.png beside it"
    return tell_rest(terminal, found.left_out, found.failures, results)


def as_json(scores: Sequence[Score], gains: Sequence[Difference]) -> dict[str, Any]:
    """What ablation.json holds."""
    rows = [score.row() for score in scores]
    steps = [
        {"key": each.first.key, "variant": each.first.encoder, "before": each.second.encoder, "gain": each.value,
         "interval": each.interval}
        for each in gains
    ]  # fmt: skip
    return without_nan({"scores": rows, "gains": steps})


def show(terminal: Console, scores: Sequence[Score], gains: Sequence[Difference]) -> None:
    """A row for each number and variant, with what it adds to the variant before it; a star where the interval leaves out 0."""
    gained = {(each.first.encoder, each.first.key): each for each in gains}
    table = Table(box=None, pad_edge=False)
    for name in ("task", "setting", "metric", "variant", "mean over seeds", "more than the variant before"):
        table.add_column(name)
    for score in scores:
        own = gained.get((score.encoder, score.key))
        table.add_row(score.task, score.setting, score.metric, score.encoder, cell(score), gap(own))
    terminal.print(table)
