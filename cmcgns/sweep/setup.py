"""A sweep before it begins: its settings, its space and its corpus found to go plot_pair, its ledger read."""

import math
from dataclasses import dataclass
from typing import Any

from cmcgns import storage
from cmcgns.cli import to_yaml
from cmcgns.config import Config, RunConfig
from cmcgns.errors import UserError
from cmcgns.faiss_install import check_faiss
from cmcgns.run_folder import RunFolder, find_folder, has_finished, refuse_changes
from cmcgns.sweep.config import SweepConfig, SweepJobConfig
from cmcgns.sweep.ledger import Ledger, Trial
from cmcgns.sweep.search import Space, build_search, default_space, grid_axes, read_space
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
    """A sweep that may begin or go on."""

    config: SweepJobConfig
    base: Config
    """What all trials share, with validations at the rungs."""
    folder: RunFolder
    materials: PreparedCorpus
    written: dict[str, Any]
    """The space as a user writes it."""
    space: Space
    total: int
    """Steps of a trial of ``base``."""
    rungs: list[int]
    ledger: Ledger
    search: Any

    @property
    def settings(self) -> SweepConfig:
        """The section `sweep`."""
        return self.config.sweep

    @property
    def runs(self) -> str:
        """URI of the folder of the trials' run folders."""
        return storage.join(self.folder.uri, "trials")


def setup_sweep(config: SweepJobConfig) -> Sweep:
    """The sweep of ``config``, new or resumed.

    Raises:
        UserError: a setting, a space or a corpus that trials cannot run on.
    """
    settings = config.sweep
    run = config.run.model_copy(update={"name": None, "resume": settings.resume}) if settings.resume else config.run
    folder, config = find_folder(run, "sweep", "sweep.resume"), with_absolute_paths(config)
    if folder.resumed:
        refuse_changes(config, folder, FREE_IN_SWEEPS)
    base = config.pretraining().model_copy(update={"run": RunConfig()})
    check_faiss(base.clustering.device)
    if settings.space is not None:
        read_space(settings.space, base)  # before the corpus is read
    materials = prepare_corpus(without_cluster_limit(base, settings))
    if folder.resumed:
        check_corpus(folder, base, materials.corpus.digest, "sweep.resume")
    written = settings.space or default_space(min(materials.sentences, base.clustering.bank_size))
    space = read_space(written, base)
    total = build_schedule(base.train, len(materials.corpus.train)).total
    base, rungs = with_rungs(base, settings, total)
    ledger = Ledger(folder)
    if len(ledger.first_runs) > settings.trials:
        raise UserError(
            f"sweep.trials {settings.trials}: sweep {folder.name} has {len(ledger.first_runs)} trials already; give at "
            "least as many"
        )
    if settings.retry_failed:
        ledger.retry_failed()
    record_finished(ledger, storage.join(folder.uri, "trials"), settings.metric)
    search = propose(ledger, settings, space, base.train.seed)
    more = search is not None and len(ledger.first_runs) < settings.trials
    to_do = ledger.unfinished or more or ledger.missing_repeats(settings.finalists, settings.repeats)
    if folder.resumed and has_finished(folder) and not to_do:
        raise UserError(
            f"sweep.resume {folder.name}: that sweep has finished; its result is in {folder.uri}. More of it with a larger "
            "sweep.trials, or --sweep.retry_failed=true"
        )
    return Sweep(config, base, folder, materials, written, space, total, rungs, ledger, search)


def without_cluster_limit(base: Config, settings: SweepConfig) -> Config:
    """``base`` for a look at the corpus: where clusters are drawn, no trial has its own number of them."""
    if settings.space is not None and "objective.num_clusters" not in settings.space:
        return base
    return base.model_copy(update={"objective": base.objective.model_copy(update={"num_clusters": 2})})


def with_rungs(base: Config, settings: SweepConfig, total: int) -> tuple[Config, list[int]]:
    """``base`` with validations at the rungs, and the steps of those."""
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


def propose(ledger: Ledger, settings: SweepConfig, space: Space, seed: int) -> Any:
    """The search that goes by results; what needs none is drawn into the ledger at once, and nobody searches on."""
    known = len(ledger.first_runs)
    if settings.search == "optuna":
        # with the seed it began with, a search that goes on would propose again what it began with
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
    """Note what ended while nobody was there to write it down."""
    for trial in ledger.unfinished:
        before = finished_result(runs, trial.folder, metric)
        if before is not None:
            trial.status, trial.step = "finished", before["step"]
            trial.values[trial.step] = before[metric]


def write_start(setup: Sweep) -> None:
    """Write down what a resumed sweep needs."""
    if not setup.folder.resumed:
        write_corpus(setup.folder, setup.materials.corpus.digest)
    lasting = setup.settings.model_copy(update={"resume": None, "retry_failed": False})
    config = setup.config.model_copy(update={"sweep": lasting})
    storage.write_bytes(setup.folder.file("config.yaml"), to_yaml(config).encode())
    setup.ledger.save()
