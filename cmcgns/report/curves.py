"""Curves of runs: a panel for each metric with a line for each run."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmcgns.plotting import Figure, FormatStrFormatter, NullFormatter
from cmcgns.report.record import Row, RunRecord

# N points of a line

Floats = NDArray[np.float64]
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
NO_CURVE = ("step", "stage", "epoch", "studies", "distinct_reports", "step_s", "data_wait_s", "pool_wait_s")
"""Numbers of a row that have no panel; waits are shown as shares of a step."""
WAYS = {"i2t": "film to report", "t2i": "report to film"}
RECALL = "Recall on the validation split"
MOST_POINTS = 500
"""Points of a line; more are replaced by means of neighbours."""
COLUMNS = 3


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    step_N: Floats
    value_N: Floats
    """NaN where the run logged nothing."""
    colour: str
    style: str = "-"
    marker: str = ""


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes."""

    title: str
    lines: list[Line]
    logarithmic: bool = False


def panels(runs: Sequence[RunRecord]) -> dict[str, list[Panel]]:
    """The panels of all runs by heading; what no run logged has none."""
    keys = list(dict.fromkeys(key for run in runs for row in run.rows for key in row if _is_curve(key, row)))
    losses = [key for key in keys if key.split("_")[0] == "loss"]
    speed, optimizer = ["studies_per_s"], ["learning_rate", *(key for key in keys if key.startswith("gradient_"))]
    recalls = [key for key in keys if "recall" in key]
    others = [key for key in keys if key not in {*losses, *speed, *optimizer, *recalls}]
    found = {
        "Losses": [_panel(runs, key) for key in losses],
        RECALL: _recall_panels(runs, recalls),
        "Speed": [*(_panel(runs, key, ("train",)) for key in speed), *_wait_panels(runs)],
        "Optimizer": [_panel(runs, key, ("train",), key == "gradient_norm") for key in optimizer],
        "Features and clustering": [_panel(runs, key) for key in others],
    }
    drawn = {heading: [panel for panel in some if panel.lines] for heading, some in found.items()}
    return {heading: some for heading, some in drawn.items() if some}


def _is_curve(key: str, row: Row) -> bool:
    return key not in NO_CURVE and isinstance(row[key], int | float) and not isinstance(row[key], bool)


def _panel(
    runs: Sequence[RunRecord], key: str, splits: Sequence[str] = ("train", "val"), logarithmic: bool = False
) -> Panel:
    """Training as a line, validations as points."""
    lines = []
    for run, colour in zip(runs, _colours(runs), strict=True):
        for split in splits:
            label = run.name if split == "train" else f"{run.name}, validation"
            line = _line(label, run.split(split), key, colour, "-" if split == "train" else ":", "o" * (split == "val"))
            lines += [line] if line else []
    return Panel(key, lines, logarithmic)


def _recall_panels(runs: Sequence[RunRecord], keys: Iterable[str]) -> list[Panel]:
    """A panel for each kind and depth: both directions, and chance."""
    made = []
    for kind in dict.fromkeys(key.partition("_")[2] for key in keys if key.partition("_")[0] in WAYS):
        lines = []
        for run, colour in zip(runs, _colours(runs), strict=True):
            for way, style in zip(WAYS, ("-", "--"), strict=True):
                line = _line(f"{run.name}, {WAYS[way]}", run.split("val"), f"{way}_{kind}", colour, style, "o")
                lines += [line] if line else []
            chance = _line(f"{run.name}, chance", run.split("val"), f"chance_{kind}", "0.6", ":")
            lines += [chance] if chance else []
        made.append(Panel(kind, lines))
    return made


def _wait_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Waits as shares of their step."""
    made = []
    for key, title in (
        ("data_wait_s", "share of a step waiting for data"),
        ("pool_wait_s", "share waiting for clustering"),
    ):
        lines = []
        for run, colour in zip(runs, _colours(runs), strict=True):
            rows = [
                {"step": row["step"], key: row[key] / row["step_s"]} for row in run.split("train") if row.get("step_s")
            ]
            line = _line(run.name, rows, key, colour)
            lines += [line] if line else []
        made.append(Panel(title, lines))
    return made


def _line(label: str, rows: Sequence[Row], key: str, colour: str, style: str = "-", marker: str = "") -> Line | None:
    own = [row for row in rows if key in row]
    if not own:
        return None
    step_N = np.array([row["step"] for row in own], np.float64)
    value_N = np.array([np.nan if row[key] is None else row[key] for row in own], np.float64)
    return Line(label, means(step_N), means(value_N), colour, style, marker)


def means(value_N: Floats, most: int = MOST_POINTS) -> Floats:
    """At most ``most`` values: means of as many neighbours each as that takes, without NaN."""
    size = -(-len(value_N) // most)
    parts = [value_N[start : start + size] for start in range(0, len(value_N), size)]
    return np.array([np.nan if np.isnan(part).all() else np.nanmean(part) for part in parts])


def _colours(runs: Sequence[RunRecord]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(runs))]


def draw(some: Sequence[Panel], boundaries: Sequence[float] = ()) -> Figure:
    """The panels in rows of ``COLUMNS``; a dotted vertical line at the start of each further stage in ``boundaries``."""
    rows = -(-len(some) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis, panel in zip(axes, some, strict=False):
        for line in panel.lines:
            axis.plot(
                line.step_N,
                line.value_N,
                line.style,
                label=line.label,
                color=line.colour,
                marker=line.marker,
                lw=1.2,
                ms=3,
            )
        for step in boundaries:
            axis.axvline(step, color="0.7", lw=0.8, ls=":")
        axis.set_title(panel.title, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if panel.logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.yaxis.set_minor_formatter(NullFormatter())
    for unused in axes[len(some) :]:
        unused.axis("off")
    axes[0].legend(fontsize=6)
    figure.supxlabel("step", fontsize=8)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
