"""Search space of a sweep, and the search algorithm that draws from it."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from cmcgns.cli import resolve
from cmcgns.config import Config
from cmcgns.errors import UserError
from cmcgns.sweep.ledger import Ledger, Trial

Space = dict[str, BaseDistribution]
"""Distribution of each drawn ``section.key``."""
FORMS = ("uniform", "log_uniform", "integer", "log_integer", "choice")
FIXED = (
    "train.num_workers", "train.min_workers", "train.cpus_per_worker", "train.use_gpu", "train.seed", "clustering.actors",
    "clustering.cpus_per_actor", "clustering.gpus_per_actor", "data.cpus_per_task", "data.seed",
    "train.validate_every",
)  # fmt: skip
"""Settings that are equal for all trials: resources, the random splits, the rungs, and the seed, which repetitions change."""
REQUIRES_FALSE = {"objective.temperature": "objective.learn_temperature"}
"""Settings that only have an effect if another one is false."""


def read_space(written: dict[str, Any], base: Config) -> Space:
    """Search space of ``{section.key: {form: values}}``; checks that ``base`` accepts the values.

    Raises:
        UserError: an unknown key or form, an empty range, a value that the setting does not accept.
    """
    if not written:
        raise UserError("sweep.space is empty; name a setting, such as objective.mask_ratio: {uniform: [0.25, 0.85]}")
    space = {}
    for key, form in written.items():
        if key in FIXED or key.startswith("run."):
            raise UserError(f"sweep.space {key}: it is the same for all trials; set it outside the space")
        if not isinstance(form, dict) or len(form) != 1 or next(iter(form)) not in FORMS:
            raise UserError(
                f"sweep.space {key}: {form!r} is not a range; give one of {', '.join(FORMS)} and its values, such as "
                "{uniform: [0.25, 0.85]} or {choice: [16, 32]}"
            )
        ((name, values),) = form.items()
        space[key] = _distribution(key, name, values)
        for value in _test_values(space[key]):
            apply_drawn(base, {key: value})
    return space


def apply_drawn(base: Config, drawn: dict[str, Any]) -> Config:
    """``base`` with the drawn settings of a trial."""
    fixed = {other: False for key, other in REQUIRES_FALSE.items() if key in drawn}
    return resolve(base.model_dump(mode="json"), fixed | drawn, Config)


def _distribution(key: str, form: str, values: Any) -> BaseDistribution:
    if not isinstance(values, list) or not values:
        raise UserError(f"sweep.space {key}: {form} needs a list of values, not {values!r}")
    if form == "choice":
        if not all(isinstance(value, (str, int, float)) for value in values):
            raise UserError(f"sweep.space {key}: choice takes numbers, strings, true and false, not {values!r}")
        return CategoricalDistribution(values)
    kind = int if form.endswith("integer") else (int, float)
    if len(values) != 2 or not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
        raise UserError(f"sweep.space {key}: {form} needs two {'whole ' * (kind is int)}numbers, not {values!r}")
    low, high = values
    if low >= high:
        raise UserError(f"sweep.space {key}: {form} from {low} to {high} is empty; give the smaller number first")
    log = form.startswith("log_")
    if log and low <= 0:
        raise UserError(f"sweep.space {key}: {form} from {low} has no logarithm; start above 0")
    return IntDistribution(low, high, log) if kind is int else FloatDistribution(low, high, log)


def _test_values(distribution: BaseDistribution) -> Iterator[Any]:
    """Values to check a setting with: all choices, or both ends of a range and, for floats, a value that is not an integer."""
    if isinstance(distribution, CategoricalDistribution):
        yield from distribution.choices
    elif isinstance(distribution, (IntDistribution, FloatDistribution)):
        yield from (distribution.low, distribution.high)
        if isinstance(distribution, FloatDistribution):
            yield distribution.low + (distribution.high - distribution.low) / math.e


SearchName = Literal["random", "grid", "optuna"]
RANDOM_TRIALS = 8
"""Random trials before Optuna uses results; at most a third of all."""


def build_search(search: SearchName, space: Space, metric: str, trials: int, seed: int) -> Any:
    """Tune's search algorithm; the same seed proposes the same trials, with ``optuna`` given the same results."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = _sampler(search, space, trials, seed)
        return OptunaSearch(space, metric=metric, mode="max", sampler=sampler)


def grid_axes(space: Space) -> dict[str, list[Any]]:
    """Values of each setting of a grid; raises on a range."""
    axes = {}
    for key, distribution in space.items():
        if not isinstance(distribution, CategoricalDistribution):
            raise UserError(f"sweep.search grid accepts no ranges, and {key} is one; give choice and its values")
        axes[key] = list(distribution.choices)
    return axes


def _sampler(search: SearchName, space: Space, trials: int, seed: int) -> BaseSampler:
    if search == "random":
        return RandomSampler(seed)
    if search == "grid":
        return GridSampler(grid_axes(space), seed)
    return TPESampler(n_startup_trials=max(min(RANDOM_TRIALS, trials // 3), 1), multivariate=True, seed=seed)


LOST_TOO_OFTEN = "its processes were lost too often"


class LedgerSearch(Searcher):
    """Tune searcher that runs the waiting trials of the ledger, then those that ``inner`` proposes (None: no others), and
    records results in the ledger. Calls ``on_lost`` with the number of a trial whose processes were lost too often."""

    def __init__(
        self,
        ledger: Ledger,
        waiting: list[Trial],
        inner: Any,
        trials: int,
        metric: str,
        seed: int,
        on_lost: Callable[[int], Any],
    ) -> None:
        super().__init__(metric=metric, mode="max")
        self.on_lost = on_lost
        self.ledger, self.inner, self.trials, self.seed = ledger, inner, trials, seed
        self._running: dict[str, Trial] = {}
        self._waiting = list(waiting)
        self._proposed: set[str] = set()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Ignore Tune's metric and space: both are already set."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Specification of the next trial: number, drawn settings, seed, and seconds of its earlier attempts."""
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
        """Record the value at a rung."""
        self._record(self._running[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the end of a trial, and report it to ``inner``."""
        trial, found = self._running.pop(trial_id), result or {}
        self._record(trial, found)
        trial.status = "finished" if found.get("ended") and not trial.reason else "stopped"
        if error:
            self.on_lost(trial.number)
            trial.reason = trial.reason or LOST_TOO_OFTEN
        if trial.reason:
            trial.status = "failed"
        self.ledger.save()
        if trial_id in self._proposed:
            self.inner.on_trial_complete(trial_id, found, error=trial.status == "failed")
        elif self.inner is not None and trial.value is not None and trial.status != "failed":
            self.inner.add_evaluated_point(trial.drawn, trial.value)  # an earlier driver's search proposed it

    def _record(self, trial: Trial, result: dict[str, Any]) -> None:
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
        """Not needed: the ledger has the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Not needed, see ``save``."""
