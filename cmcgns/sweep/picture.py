"""sweep.png: the metric against each setting, the two settings that matter most, and the learning curves."""

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from optuna import create_study
from optuna.distributions import CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from cmcgns.sweep.ledger import Ledger, Trial
from cmcgns.sweep.space import Space

COLUMNS, INCHES = 3, 4.0
MARKERS = {"finished": "o", "stopped": "x"}


def draw(space: Space, ledger: Ledger, metric: str) -> bytes:
    """The picture as PNG. Stopped trials are crosses at the metric of their last rung."""
    trials = [trial for trial in ledger.first_runs if trial.value is not None and trial.status in MARKERS]
    weights = importances(space, trials)
    first = next(iter(space))
    panels = len(space) + 1 + (len(space) > 1)
    rows = -(-panels // COLUMNS)
    figure = Figure(figsize=(COLUMNS * INCHES, rows * INCHES * 0.85), layout="constrained")
    axes = iter(figure.subplots(rows, COLUMNS, squeeze=False).ravel())
    for key in space:
        axis = next(axes)
        against(axis, key, space, trials, metric, weights.get(key))
        if key == first:
            axis.legend(fontsize="small")
    if len(space) > 1:
        together(next(axes), sorted(space, key=lambda key: -weights.get(key, 0.0))[:2], space, trials, metric, figure)
    curves(next(axes), ledger, metric)
    for unused in axes:
        unused.axis("off")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def importances(space: Space, trials: list[Trial]) -> dict[str, float]:
    """Share of each setting in what parts good trials from the rest (PED-ANOVA, arXiv 2304.10255); empty for too few trials."""
    study = create_study(direction="maximize")
    for trial in trials:
        study.add_trial(create_trial(params=trial.drawn, distributions=space, value=trial.value))
    if len({trial.value for trial in trials}) < 2 or len(trials) < 4:
        return {}
    return dict(get_param_importances(study, evaluator=PedAnovaImportanceEvaluator()))


def places(key: str, space: Space, trials: list[Trial]) -> np.ndarray:
    """Where the trials lie on the axis of ``key``: their values, or the number of the choice."""
    distribution = space[key]
    if isinstance(distribution, CategoricalDistribution):
        return np.array([distribution.choices.index(trial.drawn[key]) for trial in trials], float)
    return np.array([trial.drawn[key] for trial in trials], float)


def label(axis: Axes, key: str, space: Space, vertical: bool = False) -> None:
    """Scale and ticks of the axis of ``key``."""
    distribution: Any = space[key]
    name = key.split(".", 1)[1]
    if vertical:
        axis.set_ylabel(name)
    else:
        axis.set_xlabel(name)
    if isinstance(distribution, CategoricalDistribution):
        (axis.set_yticks if vertical else axis.set_xticks)(
            range(len(distribution.choices)), [str(choice) for choice in distribution.choices]
        )
        return
    (axis.set_ylim if vertical else axis.set_xlim)(distribution.low, distribution.high)
    if distribution.log:
        (axis.set_yscale if vertical else axis.set_xscale)("log")
        ticks = axis.yaxis if vertical else axis.xaxis
        ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ticks.set_major_formatter(FormatStrFormatter("%g"))
        ticks.set_minor_formatter(NullFormatter())


def against(axis: Axes, key: str, space: Space, trials: list[Trial], metric: str, weight: float | None) -> None:
    """The metric over one setting."""
    for status, marker in MARKERS.items():
        some = [trial for trial in trials if trial.status == status]
        axis.scatter(places(key, space, some), [trial.value or 0.0 for trial in some], marker=marker, label=status)
    label(axis, key, space)
    axis.set_ylabel(metric)
    axis.set_title("" if weight is None else f"importance {weight:.0%}", fontsize="medium")


def together(axis: Axes, keys: list[str], space: Space, trials: list[Trial], metric: str, figure: Figure) -> None:
    """The metric as a colour over two settings."""
    values = [trial.value or 0.0 for trial in trials]
    across, up = (places(key, space, trials) for key in keys)
    shown = axis.scatter(across, up, c=values, cmap="viridis", s=60)
    label(axis, keys[0], space)
    label(axis, keys[1], space, vertical=True)
    axis.set_title("the two most important", fontsize="medium")
    figure.colorbar(shown, ax=axis, label=metric)


def curves(axis: Axes, ledger: Ledger, metric: str) -> None:
    """The metric over the steps, repetitions dotted."""
    colours = matplotlib.colormaps["tab20"]
    for trial in ledger.trials:
        if trial.values:
            steps, values = zip(*sorted(trial.values.items()), strict=True)
            same = trial.number if trial.repeats is None else trial.repeats
            style = "-" if trial.repeats is None else ":"
            axis.plot(steps, values, style, marker=".", color=colours(same % 20))
    axis.set_xlabel("step")
    axis.set_ylabel(metric)
    axis.set_title("learning curves; dotted: other seeds", fontsize="medium")
