"""Who proposes a sweep's trials: one Tune searcher, whose sampler is the search that was asked for."""

import warnings
from typing import Any, Literal

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from ray.tune.search.optuna import OptunaSearch

from cmcgns.errors import UserError
from cmcgns.sweep.space import Space

Search = Literal["random", "grid", "optuna"]
STARTS = 8
"""Trials that are drawn at random before Optuna goes by results, at most a third of all."""


def searcher(search: Search, space: Space, metric: str, trials: int, seed: int) -> Any:
    """Tune's search algorithm; the same seed proposes the same trials, with ``optuna`` after the same results."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = _sampler(search, space, trials, seed)
        return OptunaSearch(space, metric=metric, mode="max", sampler=sampler)


def grid_axes(space: Space) -> dict[str, list[Any]]:
    """The values of each setting of a grid; refuses ranges, which have no end of points."""
    axes = {}
    for key, distribution in space.items():
        if not isinstance(distribution, CategoricalDistribution):
            raise UserError(f"sweep.search grid takes no range, and {key} is one; write choice and its values")
        axes[key] = list(distribution.choices)
    return axes


def _sampler(search: Search, space: Space, trials: int, seed: int) -> BaseSampler:
    if search == "random":
        return RandomSampler(seed)
    if search == "grid":
        return GridSampler(grid_axes(space), seed)
    return TPESampler(n_startup_trials=max(min(STARTS, trials // 3), 1), multivariate=True, seed=seed)
