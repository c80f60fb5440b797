"""Setup of a sweep: settings, search space and corpus, validated together, and the ledger."""

import math
from dataclasses import dataclass
from typing import Any

from cmcgns import storage
from cmcgns.config import Config, PretrainRunConfig
from cmcgns.errors import UserError
from cmcgns.faiss_install import check_faiss
from cmcgns.measures import needs_parts, not_reported
from cmcgns.run_folder import RunFolder, find_folder, has_finished, refuse_changes, write_config
from cmcgns.sweep.config import SweepConfig, SweepJobConfig
from cmcgns.sweep.ledger import Ledger, Trial
from cmcgns.sweep.search import Space, build_search, grid_axes, read_space
from cmcgns.sweep.trial import finished_result
from cmcgns.train.schedule import build_schedule
from cmcgns.train.setup import (
    FREE_TO_CHANGE,
    PreparedCorpus,
    check_corpus,
    prepare_corpus,
    with_absolute_paths,
    write_corpus,
)

FREE_IN_SWEEPS = FREE_TO_CHANGE | {
    "sweep": {"trials", "max_concurrent", "finalists", "repeats", "resume", "retry_failed"}
}


@dataclass(frozen=True)
class Sweep:
    """A sweep that is ready to start or resume."""

    config: SweepJobConfig
    base: Config
    """Settings shared by all trials, with validations at the rungs."""
    folder: RunFolder
    prepared: PreparedCorpus
    written: dict[str, Any]
    """The space in the form that users write."""
    space: Space
    total: int
    """Steps of a trial."""
    rungs: list[int]
    ledger: Ledger
    search: Any

    @property
    def settings(self) -> SweepConfig:
        """The section `sweep`."""
        return self.config.sweep

    @property
    def runs(self) -> str:
        """URI of the folder with the trials' run folders."""
        return storage.join(self.folder.uri, "trials")


def setup_sweep(config: SweepJobConfig) -> Sweep:
    """Setup of a new or resumed sweep.

    Raises:
        UserError: settings, space and corpus do not work together.
    """
    settings = config.sweep
    run = config.run.model_copy(update={"name": None, "resume": settings.resume}) if settings.resume else config.run
    folder, config = find_folder(run, "sweep", "sweep.resume"), with_absolute_paths(config)
    if folder.resumed:
        refuse_changes(config, folder, FREE_IN_SWEEPS)
    base = config.pretraining().model_copy(update={"run": PretrainRunConfig()})
    if base.banks:
        check_faiss(base.clustering.device)
    check_metric(settings.metric, base)
    if base.train.min_workers is not None:
        raise UserError("train.min_workers: trials of a sweep have train.num_workers each; leave it out")
    if settings.space is not None:
        read_space(settings.space, base)  # fails before the corpus is read
    prepared = prepare_corpus(without_cluster_limit(base, settings))
    if folder.resumed:
        check_corpus(folder, base, prepared.corpus, "sweep.resume")
    written = settings.space or base.objective.sweep_space(min(prepared.sentences, base.clustering.bank_size))
    space = read_space(written, base)
    total = build_schedule(base.train, len(prepared.corpus.train)).total
    base, rungs = with_rungs(base, settings, total)
    ledger = Ledger(folder)
    if len(ledger.first_runs) > settings.trials:
        raise UserError(
            f"sweep.trials {settings.trials}: sweep {folder.name} already has {len(ledger.first_runs)} trials; give at "
            "least that many"
        )
    if settings.retry_failed:
        ledger.retry_failed()
    record_finished(ledger, storage.join(folder.uri, "trials"), settings.metric)
    search = prepare_search(ledger, settings, space, base.train.seed)
    more = search is not None and len(ledger.first_runs) < settings.trials
    to_do = ledger.unfinished or more or ledger.missing_repeats(settings.finalists, settings.repeats)
    if folder.resumed and has_finished(folder) and not to_do:
        raise UserError(
            f"sweep.resume {folder.name}: the sweep has finished; its result is in {folder.uri}. To extend it, raise "
            "sweep.trials or set --sweep.retry_failed=true"
        )
    return Sweep(config, base, folder, prepared, written, space, total, rungs, ledger, search)


def check_metric(metric: str, base: Config) -> None:
    """Raise ``UserError`` if the method of ``base`` does not report ``metric``, or there are no reports."""
    if not base.data.reports:
        raise UserError(
            f"sweep.metric {metric} compares films with reports, and data.reports is false; set data.reports=true, or compare "
            "runs with jobs/evaluate.py"
        )
    if needs_parts(metric):
        from cmcgns.methods.base import ComparesParts, load_method  # lazy: imports torch

        if not isinstance(load_method(base), ComparesParts):
            raise UserError(f"sweep.metric {not_reported(metric)}")


def without_cluster_limit(base: Config, settings: SweepConfig) -> Config:
    """``base`` for reading the corpus: with 2 clusters where their number is drawn, so that no corpus is refused for it."""
    drawn = [bank.setting for bank in base.banks if settings.space is None or bank.setting in settings.space]
    fewest = dict.fromkeys((key.removeprefix("objective.") for key in drawn), 2)
    return base.model_copy(update={"objective": base.objective.model_copy(update=fewest)})


def with_rungs(base: Config, settings: SweepConfig, total: int) -> tuple[Config, list[int]]:
    """``base`` with validations at the rungs, and the steps of the rungs."""
    if settings.scheduler == "none":
        return base, []
    first = max(round(settings.first_rung * total), 1)
    every = base.train.validate_every
    if every is None or first % every:
        base = base.model_copy(update={"train": base.train.model_copy(update={"validate_every": first})})
    rungs = [first]
    while rungs[-1] * settings.reduction_factor < total:
        rungs.append(rungs[-1] * settings.reduction_factor)
    return base, rungs


def prepare_search(ledger: Ledger, settings: SweepConfig, space: Space, seed: int) -> Any:
    """Optuna's search. Random and grid trials do not depend on results: all go to the ledger at once, and this returns None."""
    known = len(ledger.first_runs)
    if settings.search == "optuna":
        # the original seed would propose the sweep's first trials again
        search = build_search("optuna", space, settings.metric, settings.trials, settings.seed + known)
        for trial in ledger.first_runs:
            if trial.value is not None and trial.status in ("finished", "stopped"):
                search.add_evaluated_point(trial.drawn, trial.value)
        return search
    search = build_search(settings.search, space, settings.metric, settings.trials, settings.seed)
    points = math.prod(map(len, grid_axes(space).values())) if settings.search == "grid" else settings.trials
    for number in range(min(settings.trials, points)):
        drawn = search.suggest(str(number))
        if number >= known:
            ledger.trials.append(Trial(len(ledger.trials), drawn, seed))
    return None


def record_finished(ledger: Ledger, runs: str, metric: str) -> None:
    """Mark trials as finished whose run finished when no driver was there to record it."""
    for trial in ledger.unfinished:
        result = finished_result(runs, trial.folder, metric)
        if result is not None:
            trial.status, trial.step = "finished", result["step"]
            trial.values[trial.step] = result[metric]


def write_start(setup: Sweep) -> None:
    """Write what a resumed sweep needs."""
    if not setup.folder.resumed:
        write_corpus(setup.folder, setup.prepared.corpus)
    settings = setup.settings.model_copy(update={"resume": None, "retry_failed": False})
    config = setup.config.model_copy(update={"sweep": settings})
    write_config(setup.folder, config, "sweep.resume")
    setup.ledger.save()
