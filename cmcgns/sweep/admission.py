"""How many trials a cluster has capacity for at the same time, each with its workers, its pool, and CPUs for its data."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from cmcgns.cluster.placement import list_nodes, run_bundles
from cmcgns.config import Config
from cmcgns.data.stream import DEALING_CPUS
from cmcgns.errors import UserError
from cmcgns.sweep.config import SweepConfig
from cmcgns.sweep.ledger import DONE, Ledger
from cmcgns.train.run import Share, taken_cpus

TRIAL_CPUS = 0.01
"""CPUs of the process by which Tune holds a trial: it waits."""


@dataclass(frozen=True)
class Capacity:
    """Trials that fit beside each other, and what each one may count on."""

    trials: int
    share: Share


def nodes_of_cluster() -> list[dict[str, float]]:
    """CPUs and GPUs of each living node."""
    return [{"CPU": node.cpus, "GPU": node.gpus} for node in list_nodes()]


def trial_bundles(config: Config) -> list[dict[str, float]]:
    """What one trial holds, piece by piece: each piece has to fit on one node."""
    reading = {"CPU": config.data.cpus_per_task, "GPU": 0.0}
    rest = {"CPU": TRIAL_CPUS + DEALING_CPUS * (config.train.num_workers > 1), "GPU": 0.0}
    return [*run_bundles(config), reading, rest]


def capacity_for(config: Config, nodes: list[dict[str, float]], most: int) -> Capacity:
    """How many of at most ``most`` trials fit on ``nodes`` as a whole: so that, while the nodes stay, none waits for another.

    Raises:
        UserError: not even one fits.
    """
    bundles = sorted(trial_bundles(config), key=lambda bundle: (-bundle["GPU"], -bundle["CPU"]))
    free, trials = [dict(node) for node in nodes], 0
    while trials < most and _fit_on_nodes(bundles, free):
        trials += 1
    cpus = sum(node["CPU"] for node in nodes)
    if not trials:
        needed = {name: sum(bundle[name] for bundle in bundles) for name in ("CPU", "GPU")}
        machines = ", ".join(f"{node['CPU']:g} CPUs and {node['GPU']:g} GPUs" for node in nodes)
        raise UserError(
            f"not one trial fits: its {config.train.num_workers} workers, {config.clustering.actors} clustering actors and "
            f"data tasks need {needed['CPU']:g} CPUs and {needed['GPU']:g} GPUs; the cluster has {machines}. Lower "
            "train.num_workers, train.cpus_per_worker, clustering.cpus_per_actor or data.cpus_per_task"
        )
    return Capacity(trials, Share(cpus, cpus / trials - taken_cpus(config) - TRIAL_CPUS, beside_others=True))


def _fit_on_nodes(bundles: list[dict[str, float]], free: list[dict[str, float]]) -> bool:
    """Take all of ``bundles`` out of what is ``free``, each from the first node that has it."""
    for bundle in bundles:
        node = next((node for node in free if all(node[k] + 1e-9 >= bundle[k] for k in bundle)), None)
        if node is None:
            return False
        for name, amount in bundle.items():
            node[name] -= amount
    return True


RECHECK_S = 1.0


class Admission:
    """Who is inside, and who may be. A cluster that has lost a node may hold pieces of more trials than it can finish: all
    of them would wait for what the others hold. So those that came last go back to the admission, with all that they hold.

    ``count`` gives the cluster's capacity now, and raises ``UserError`` where not one trial fits.
    """

    def __init__(self, count: Callable[[], Capacity]) -> None:
        self._count, self._capacity, self._counted_at = count, count(), time.monotonic()
        self._inside: list[int] = []
        self._excused: set[int] = set()
        self.refusal: str | None = None
        """Why nobody may enter, where not one trial fits."""

    def enter(self, number: int) -> Share | None:
        """What trial ``number`` may count on; None where it has to wait. One that comes again has left by that."""
        self.leave(number)
        if len(self._inside) >= self._trials():
            return None
        self._inside.append(number)
        return self._capacity.share

    def leave(self, number: int) -> None:
        """Trial ``number`` holds nothing any more."""
        if number in self._inside:
            self._inside.remove(number)

    def empty(self) -> None:
        """Nobody is inside any more: Tune has ended all trials, some of them perhaps before they could say so."""
        self._inside.clear()

    def excuse(self, number: int) -> None:
        """The next loss of trial ``number`` is no fault of its own: it was sent away and could not end in peace."""
        self._excused.add(number)

    def is_excused(self, number: int) -> bool:
        """Whether the loss of trial ``number`` is excused; once."""
        excused = number in self._excused
        self._excused.discard(number)
        return excused

    def must_leave(self, number: int) -> bool:
        """Whether the cluster has become too small for trial ``number`` beside those that came before it."""
        return number in self._inside[self._trials() :]

    def _trials(self) -> int:
        if time.monotonic() - self._counted_at > RECHECK_S:
            self._counted_at = time.monotonic()
            try:
                self._capacity, self.refusal = self._count(), None
            except UserError as error:
                self.refusal = str(error)
        return 0 if self.refusal else self._capacity.trials


def build_scheduler(settings: SweepConfig, rungs: list[int], total: int, ledger: Ledger) -> TrialScheduler | None:
    """ASHA over optimizer steps, which knows what trials of the ledger have reached at its rungs."""
    if settings.scheduler == "none":
        return None
    scheduler = LedgerAsha(
        ledger,
        time_attr="step",
        metric=settings.metric,
        mode="max",
        grace_period=rungs[0],
        reduction_factor=settings.reduction_factor,
        max_t=total,
        stop_last_trials=False,  # a trial ends by itself, with an export
    )
    for trial in ledger.first_runs:
        if trial.status in DONE:
            scheduler.on_trial_add(
                None, SimpleNamespace(trial_id=f"before-{trial.number}", config={"number": trial.number})
            )
    return scheduler


class LedgerAsha(AsyncHyperBandScheduler):
    """ASHA that gives each trial the values which the ledger has for it already: of an earlier driver's time."""

    def __init__(self, ledger: Ledger, **settings: Any) -> None:
        super().__init__(**settings)
        self.ledger = ledger

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial begins or goes on."""
        super().on_trial_add(tune_controller, trial)
        for step, value in sorted(self.ledger.trials[trial.config["number"]].values.items()):
            self.on_trial_result(tune_controller, trial, {"step": step, self.metric: value})
