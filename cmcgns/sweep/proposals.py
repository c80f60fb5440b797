"""What Tune runs next: trials of the ledger that are not done, then new ones that a search proposes."""

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from cmcgns.sweep.ledger import Ledger, Trial

LOST_TOO_OFTEN = "its processes were lost too often"


class Proposals(Searcher):
    """A Tune searcher that goes by the ledger, and keeps it. ``inner`` may be None: then only what is in the ledger runs.
    ``lost`` is told the number of each trial whose own process was lost for good."""

    def __init__(
        self,
        ledger: Ledger,
        waiting: list[Trial],
        inner: Any,
        trials: int,
        metric: str,
        seed: int,
        lost: Callable[[int], Any],
    ) -> None:
        super().__init__(metric=metric, mode="max")
        self.lost = lost
        self.ledger, self.inner, self.trials, self.seed = ledger, inner, trials, seed
        self._running: dict[str, Trial] = {}
        self._waiting = list(waiting)
        self._proposed: set[str] = set()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Tune's question whether it may choose metric and space: both are known already."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """What the next trial is told: number, drawn settings, seed, and the seconds that it has taken already."""
        trial = self._waiting.pop(0) if self._waiting else self._new(trial_id)
        if trial is None:
            return str(Searcher.FINISHED)
        self._running[trial_id], trial.status = trial, "running"
        self.ledger.save()
        return {
            "number": trial.number,
            "folder": trial.folder,
            "drawn": trial.drawn,
            "seed": trial.seed,
            "seconds": trial.seconds,
        }

    def _new(self, trial_id: str) -> Trial | None:
        if self.inner is None or len(self.ledger.first_runs) >= self.trials:
            return None
        drawn = self.inner.suggest(trial_id)
        if drawn is None or drawn == Searcher.FINISHED:
            return None
        self._proposed.add(trial_id)
        return self.ledger.add(drawn, self.seed)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Write a rung's value down."""
        self._note(self._running[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Write the end down, and tell the search."""
        trial, found = self._running.pop(trial_id), result or {}
        self._note(trial, found)
        trial.status = "finished" if found.get("ended") and not trial.reason else "stopped"
        if error:
            self.lost(trial.number)
            trial.reason = trial.reason or LOST_TOO_OFTEN
        if trial.reason:
            trial.status = "failed"
        self.ledger.save()
        if trial_id in self._proposed:
            self.inner.on_trial_complete(trial_id, found, error=trial.status == "failed")
        elif self.inner is not None and trial.value is not None and trial.status != "failed":
            self.inner.add_evaluated_point(trial.drawn, trial.value)  # of an earlier driver's search

    def _note(self, trial: Trial, result: dict[str, Any]) -> None:
        if not result:
            return
        trial.step = result.get("step", trial.step)
        if self.metric in result:
            trial.values[trial.step] = result[self.metric]
        trial.reason = result.get("failure")
        costs = {key.removeprefix("costs/"): value for key, value in result.items() if key.startswith("costs/")}
        trial.costs = costs or trial.costs
        trial.seconds = result.get("seconds", trial.seconds)
        self.ledger.save()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger holds everything."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see ``save``."""
