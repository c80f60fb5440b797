"""How many trials fit on the cluster at the same time, which of them may run, and ASHA with the ledger's values."""

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
from cmcgns.train.run import CpuShare, reserved_cpus

TRIAL_CPUS = 0.01
"""CPUs of Tune's own process for a trial, which only waits."""


@dataclass(frozen=True)
class Capacity:
    """Number of trials that fit on the cluster at the same time, and the CPUs of each."""

    trials: int
    share: CpuShare


def node_resources() -> list[dict[str, float]]:
    """CPUs and GPUs of each node that is alive."""
    return [{"CPU": node.cpus, "GPU": node.gpus} for node in list_nodes()]


def trial_bundles(config: Config) -> list[dict[str, float]]:
    """Resource bundles of one trial; each has to fit on one node."""
    reading = {"CPU": config.data.cpus_per_task, "GPU": 0.0}
    rest = {"CPU": TRIAL_CPUS + DEALING_CPUS * (config.train.num_workers > 1), "GPU": 0.0}
    return [*run_bundles(config), reading, rest]


def capacity_for(config: Config, nodes: list[dict[str, float]], most: int) -> Capacity:
    """How many trials, up to ``most``, fit on ``nodes`` completely, so that none waits for another while the nodes last.

    Raises:
        UserError: not one trial fits.
    """
    bundles = sorted(trial_bundles(config), key=lambda bundle: (-bundle["GPU"], -bundle["CPU"]))
    free, trials = [dict(node) for node in nodes], 0
    while trials < most and _fit_on_nodes(bundles, free):
        trials += 1
    cpus = sum(node["CPU"] for node in nodes)
    if not trials:
        needed = {name: sum(bundle[name] for bundle in bundles) for name in ("CPU", "GPU")}
        available = ", ".join(f"{node['CPU']:g} CPUs and {node['GPU']:g} GPUs" for node in nodes)
        raise UserError(
            f"not one trial fits: its {config.train.num_workers} workers, {config.pool_actors} clustering actors and "
            f"data tasks need {needed['CPU']:g} CPUs and {needed['GPU']:g} GPUs; the cluster has {available}. Lower "
            "train.num_workers, train.cpus_per_worker, clustering.cpus_per_actor or data.cpus_per_task"
        )
    return Capacity(trials, CpuShare(cpus, cpus / trials - reserved_cpus(config) - TRIAL_CPUS, shared_cluster=True))


def _fit_on_nodes(bundles: list[dict[str, float]], free: list[dict[str, float]]) -> bool:
    """Subtract all ``bundles`` from ``free``, each from the first node where it fits. Returns whether all fitted."""
    for bundle in bundles:
        node = next((node for node in free if all(node[k] + 1e-9 >= bundle[k] for k in bundle)), None)
        if node is None:
            return False
        for name, amount in bundle.items():
            node[name] -= amount
    return True


RECHECK_S = 1.0


class Admission:
    """Admits as many trials as fit on the cluster, and evicts the last ones when it shrinks.

    After the loss of a node, trials may hold parts of more than fits: all would wait for what the others hold. So the trials
    that were admitted last release everything and wait for admission again.

    ``get_capacity`` returns the current capacity, or raises ``UserError`` if not one trial fits.
    """

    def __init__(self, get_capacity: Callable[[], Capacity]) -> None:
        self._get_capacity, self._capacity, self._checked_at = get_capacity, get_capacity(), time.monotonic()
        self._admitted: list[int] = []
        self._excused: set[int] = set()
        self.refusal: str | None = None
        """Why no trial is admitted, if not one fits."""

    def enter(self, number: int) -> CpuShare | None:
        """CPUs of trial ``number``; None if it has to wait. Releases its earlier admission."""
        self.leave(number)
        if len(self._admitted) >= self._trials():
            return None
        self._admitted.append(number)
        return self._capacity.share

    def leave(self, number: int) -> None:
        """Trial ``number`` has released its resources."""
        if number in self._admitted:
            self._admitted.remove(number)

    def clear(self) -> None:
        """All trials have ended; some may not have left."""
        self._admitted.clear()

    def excuse(self, number: int) -> None:
        """Do not count the next loss of trial ``number``: it was evicted, and killed before a clean shutdown."""
        self._excused.add(number)

    def is_excused(self, number: int) -> bool:
        """Whether this loss of trial ``number`` is excused; resets it."""
        excused = number in self._excused
        self._excused.discard(number)
        return excused

    def must_leave(self, number: int) -> bool:
        """Whether the cluster has become too small for trial ``number`` and those admitted before it."""
        return number in self._admitted[self._trials() :]

    def _trials(self) -> int:
        if time.monotonic() - self._checked_at > RECHECK_S:
            self._checked_at = time.monotonic()
            try:
                self._capacity, self.refusal = self._get_capacity(), None
            except UserError as error:
                self.refusal = str(error)
        return 0 if self.refusal else self._capacity.trials


def build_scheduler(settings: SweepConfig, rungs: list[int], total: int, ledger: Ledger) -> TrialScheduler | None:
    """ASHA over optimizer steps, initialised with the results of the finished trials in the ledger."""
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
        stop_last_trials=False,  # a trial that reaches its last step ends itself, with an export
    )
    for trial in ledger.first_runs:
        if trial.status in DONE:
            scheduler.on_trial_add(
                None, SimpleNamespace(trial_id=f"before-{trial.number}", config={"number": trial.number})
            )
    return scheduler


class LedgerAsha(AsyncHyperBandScheduler):
    """ASHA that adds to each trial its values in the ledger, which an earlier driver measured."""

    def __init__(self, ledger: Ledger, **settings: Any) -> None:
        super().__init__(**settings)
        self.ledger = ledger

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial that starts or resumes."""
        super().on_trial_add(tune_controller, trial)
        for step, value in sorted(self.ledger.trials[trial.config["number"]].values.items()):
            self.on_trial_result(tune_controller, trial, {"step": step, self.metric: value})
