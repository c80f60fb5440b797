"""Files of a finished sweep: best.yaml, trials.csv, report.html, TensorBoard, and sweep.png with all results."""

import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from optuna import create_study
from optuna.distributions import CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from cmcgns import storage
from cmcgns.cli import to_yaml
from cmcgns.config import Config, PretrainRunConfig
from cmcgns.plotting import Axes, Figure, FormatStrFormatter, LogLocator, NullFormatter, colormaps
from cmcgns.run_folder import RunFolder
from cmcgns.sweep.ledger import Ledger, SeedScores, Trial
from cmcgns.sweep.search import REQUIRES_FALSE, Space, apply_drawn
from cmcgns.terminal import STYLE

COLUMNS, INCHES = 3, 4.0
MARKERS = {"finished": "o", "stopped": "x"}


def sweep_figure(space: Space, ledger: Ledger, metric: str) -> bytes:
    """sweep.png: the metric by each setting and by the two most important ones, and learning curves. A stopped trial is a cross
    at its last rung."""
    trials = [trial for trial in ledger.first_runs if trial.value is not None and trial.status in MARKERS]
    weights = importances(space, trials)
    first = next(iter(space))
    panels = len(space) + 1 + (len(space) > 1)
    rows = -(-panels // COLUMNS)
    figure = Figure(figsize=(COLUMNS * INCHES, rows * INCHES * 0.85), layout="constrained")
    axes = iter(figure.subplots(rows, COLUMNS, squeeze=False).ravel())
    for key in space:
        axis = next(axes)
        plot_setting(axis, key, space, trials, metric, weights.get(key))
        if key == first:
            axis.legend(fontsize="small")
    if len(space) > 1:
        plot_pair(next(axes), sorted(space, key=lambda key: -weights.get(key, 0.0))[:2], space, trials, metric, figure)
    plot_curves(next(axes), ledger, metric)
    for unused in axes:
        unused.axis("off")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def importances(space: Space, trials: list[Trial]) -> dict[str, float]:
    """Importance of each setting for the metric (PED-ANOVA, arXiv 2304.10255); empty if there are too few trials."""
    study = create_study(direction="maximize")
    for trial in trials:
        study.add_trial(create_trial(params=trial.drawn, distributions=space, value=trial.value))
    if len({trial.value for trial in trials}) < 2 or len(trials) < 4:
        return {}
    return dict(get_param_importances(study, evaluator=PedAnovaImportanceEvaluator()))


def axis_values(key: str, space: Space, trials: list[Trial]) -> np.ndarray:
    """Positions of the trials on the axis of ``key``: values, or indices of choices."""
    distribution = space[key]
    if isinstance(distribution, CategoricalDistribution):
        return np.array([distribution.choices.index(trial.drawn[key]) for trial in trials], float)
    return np.array([trial.drawn[key] for trial in trials], float)


def label_axis(axis: Axes, key: str, space: Space, vertical: bool = False) -> None:
    """Set label, scale and ticks of the axis of ``key``."""
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


def plot_setting(axis: Axes, key: str, space: Space, trials: list[Trial], metric: str, weight: float | None) -> None:
    """Plot the metric over one setting."""
    for status, marker in MARKERS.items():
        some = [trial for trial in trials if trial.status == status]
        axis.scatter(axis_values(key, space, some), [trial.value or 0.0 for trial in some], marker=marker, label=status)
    label_axis(axis, key, space)
    axis.set_ylabel(metric)
    axis.set_title("" if weight is None else f"importance {weight:.0%}", fontsize="medium")


def plot_pair(axis: Axes, keys: list[str], space: Space, trials: list[Trial], metric: str, figure: Figure) -> None:
    """Plot the metric as a colour over two settings."""
    values = [trial.value or 0.0 for trial in trials]
    across, up = (axis_values(key, space, trials) for key in keys)
    shown = axis.scatter(across, up, c=values, cmap="viridis", s=60)
    label_axis(axis, keys[0], space)
    label_axis(axis, keys[1], space, vertical=True)
    axis.set_title("the two most important", fontsize="medium")
    figure.colorbar(shown, ax=axis, label=metric)


def plot_curves(axis: Axes, ledger: Ledger, metric: str) -> None:
    """Plot the metric over the steps; repetitions are dotted."""
    colours = colormaps["tab20"]
    for trial in ledger.trials:
        if trial.values:
            steps, values = zip(*sorted(trial.values.items()), strict=True)
            original = trial.number if trial.repeats is None else trial.repeats
            style = "-" if trial.repeats is None else ":"
            axis.plot(steps, values, style, marker=".", color=colours(original % 20))
    axis.set_xlabel("step")
    axis.set_ylabel(metric)
    axis.set_title("learning curves; dotted: other seeds", fontsize="medium")


@dataclass(frozen=True)
class SweepResult:
    """The finalists, best mean first."""

    finalist_scores: list[SeedScores]
    tests: list[float | None]
    """Metric of each on the test split; None if the corpus has none."""

    @property
    def winner(self) -> Trial:
        """The trial in best.yaml."""
        return self.finalist_scores[0].trial

    def as_json(self, metric: str) -> dict[str, Any]:
        """Content of result.json."""
        finalists = [
            {
                "trial": found.trial.number,
                "drawn": found.trial.drawn,
                f"valid_{metric}": found.trial.value,
                "seeds": list(found.values),
                "mean": found.mean,
                "spread": found.spread,
                f"test_{metric}": test,
            }
            for found, test in zip(self.finalist_scores, self.tests, strict=True)
        ]
        return {"best": self.winner.number, "finalists": finalists}


def trial_settings(base: Config, trial: Trial) -> Config:
    """Settings of a trial, for a run outside the sweep."""
    config = apply_drawn(base, trial.drawn)
    return config.model_copy(
        update={"train": config.train.model_copy(update={"seed": trial.seed}), "run": PretrainRunConfig()}
    )


def trials_table(ledger: Ledger, base: Config, metric: str, folder: RunFolder) -> pd.DataFrame:
    """One row per trial, best first: result, drawn settings, all other settings."""
    sections = base.model_dump(mode="json", exclude={"run"}).items()
    every = {f"{section}.{key}": value for section, values in sections for key, value in values.items()}
    rungs = sorted({step for trial in ledger.trials for step in trial.values})
    rows = []
    for trial in ledger.trials:
        row: dict[str, Any] = {
            "trial": trial.number,
            "status": trial.status,
            "repeats": trial.repeats,
            metric: trial.value,
            "step": trial.step,
            **{f"{metric}@{step}": trial.values.get(step) for step in rungs},
            "seconds": round(trial.seconds, 1),
            **{f"seconds_{part}": round(seconds, 1) for part, seconds in trial.costs.items()},
            "reason": trial.reason,
            "run": storage.join(folder.uri, f"trials/{trial.folder}"),
            **trial.drawn,
        }
        # not validated: the drawn settings of a failed trial may be invalid together
        own = {"train.seed": trial.seed} | {other: False for key, other in REQUIRES_FALSE.items() if key in trial.drawn}
        rows.append(row | {key: value for key, value in (every | own).items() if key not in row})
    table = pd.DataFrame(rows)
    return table.sort_values(metric, ascending=False, na_position="last", kind="stable") if rows else table


def write_table(ledger: Ledger, base: Config, metric: str, folder: RunFolder) -> None:
    """Write trials.csv."""
    table = trials_table(ledger, base, metric, folder)
    storage.write_bytes(folder.file("trials.csv"), table.to_csv(index=False).encode())


def write_result(
    folder: RunFolder, base: Config, metric: str, space: Space, ledger: Ledger, result: SweepResult
) -> None:
    """Write best.yaml, sweep.png, report.html and tensorboard/."""
    storage.write_bytes(folder.file("best.yaml"), to_yaml(trial_settings(base, result.winner)).encode())
    picture = sweep_figure(space, ledger, metric)
    storage.write_bytes(folder.file("sweep.png"), picture)
    page = report_page(folder, base, metric, space, ledger, result, picture)
    storage.write_bytes(folder.file("report.html"), page.encode())
    with storage.scratch_folder() as scratch:
        write_hparams(scratch, ledger, metric)
        storage.upload_folder(scratch, folder.file("tensorboard"))


def report_page(
    folder: RunFolder, base: Config, metric: str, space: Space, ledger: Ledger, result: SweepResult, picture: bytes
) -> str:
    """report.html: finalists, picture, and table of trials, best first."""
    trials = trials_table(ledger, base, metric, folder)
    shown = ["trial", "status", "repeats", metric, "step", *space, "seconds", "reason"]
    finalists = pd.DataFrame(
        [
            {
                "trial": found.trial.number,
                f"{metric} (valid)": found.trial.value,
                "mean over seeds": found.mean,
                "spread": found.spread,
                "seeds": len(found.values),
                f"{metric} (test)": test,
            }
            for found, test in zip(result.finalist_scores, result.tests, strict=True)
        ]
    )
    html = {"index": False, "na_rep": "", "float_format": "{:.4g}".format, "border": 0}
    return "\n".join(
        [
            f"<!doctype html><meta charset='utf-8'><title>{escape(folder.name)}</title><style>{STYLE}</style>",
            f"<h1>{escape(folder.name)}</h1><p>best: trial {result.winner.number}; run it with</p>",
            f"<pre>python jobs/pretrain.py --config {escape(folder.file('best.yaml'))}</pre>",
            "<h2>Finalists</h2>",
            finalists.to_html(**html),
            f"<p><img src='data:image/png;base64,{base64.b64encode(picture).decode()}' style='max-width:100%'></p>",
            "<h2>Trials</h2>",
            trials[shown].to_html(**html),
        ]
    )


def write_hparams(local: Path, ledger: Ledger, metric: str) -> None:
    """Write TensorBoard files, a folder per trial: settings and metric for HParams, and the metric's curve."""
    from torch.utils.tensorboard import SummaryWriter

    for trial in ledger.trials:
        if trial.value is None:
            continue
        with SummaryWriter(str(local / trial.folder)) as writer:
            writer.add_hparams(
                trial.drawn | {"train.seed": trial.seed}, {f"hparams/{metric}": trial.value}, run_name="."
            )
            for step, value in sorted(trial.values.items()):
                writer.add_scalar(metric, value, step)
