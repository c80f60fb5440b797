"""ASHA over optimizer steps, for a sweep that may have been interrupted."""

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from cmcgns.sweep.job_config import SweepConfig
from cmcgns.sweep.ledger import DONE, Ledger


def scheduler_of(settings: SweepConfig, rungs: list[int], total: int, ledger: Ledger) -> TrialScheduler | None:
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
