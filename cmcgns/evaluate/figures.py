"""Figures of report.html: curves, masks and boxes on films, sentence attention, nearest reports.

N images, K classes, R pixels of a square, P patches.
"""

import io
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from cmcgns.evaluate.scores import Score
from cmcgns.plotting import Figure as Canvas
from cmcgns.plotting import Rectangle

Array = NDArray[Any]
SAMPLES = 6
"""Films per figure."""
TRUTH, ANSWER = "#2ca02c", "#d62728"
MIN_SCORE, MAX_BOXES = 0.2, 5
"""Detections that are drawn: minimum score, and maximum number per film."""


class Figure(NamedTuple):
    """A picture with its title."""

    title: str
    png: bytes


def curves(title: str, score_NK: Array, label_NK: Array, classes: Sequence[str]) -> Figure:
    """ROC and precision-recall curves of each class that has positives and negatives."""
    canvas = Canvas(figsize=(10, 4.2), layout="constrained")
    roc, recall = canvas.subplots(1, 2)
    for k, name in enumerate(classes):
        known = np.isfinite(label_NK[:, k])
        truth, score = label_NK[known, k] > 0.5, score_NK[known, k]
        if truth.any() and not truth.all():
            false, true, _ = roc_curve(truth, score)
            roc.plot(false, true, label=name, lw=1)
            precision, recalled, _ = precision_recall_curve(truth, score)
            recall.plot(recalled, precision, label=f"{name} ({truth.mean():.0%} positive)", lw=1)
    roc.plot([0, 1], [0, 1], color="0.7", lw=0.8, ls="--")
    roc.set(xlabel="false positive rate", ylabel="true positive rate")
    recall.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02))
    recall.legend(fontsize=7, loc="upper right")
    return Figure(title, _png(canvas))


def masks(title: str, film_NRR: Array, truth_NRR: Array, answer_NRR: Array) -> Figure:
    """Outlines of true masks (green) and predicted masks (red), over all classes."""
    canvas, axes = _films(film_NRR)
    for axis, truth_RR, answer_RR in zip(axes, truth_NRR, answer_NRR, strict=False):
        for mask_RR, colour in ((truth_RR, TRUTH), (answer_RR, ANSWER)):
            if mask_RR.any():
                axis.contour(mask_RR, levels=[0.5], colors=[colour], linewidths=1)
    return Figure(f"{title}: green true, red predicted", _png(canvas))


def boxes(title: str, film_NRR: Array, truths: Sequence[Array], answers: Sequence[Any], names: Sequence[str]) -> Figure:
    """True boxes (green) and the predicted boxes with the highest scores (red, with class and score)."""
    canvas, axes = _films(film_NRR)
    for axis, truth_n4, answer in zip(axes, truths, answers, strict=False):
        for box in truth_n4:
            _draw(axis, box, TRUTH)
        sure = np.flatnonzero(answer.score_n >= MIN_SCORE)[:MAX_BOXES]
        for n in sure:
            _draw(axis, answer.box_n4[n], ANSWER, f"{names[answer.kind_n[n]]} {answer.score_n[n]:.2f}")
    return Figure(f"{title}: green true, red predicted", _png(canvas))


def attention(title: str, film_NHW: Array, weight_NP: Array, truth_NP: Array, texts: Sequence[str]) -> Figure:
    """Attention of each sentence (brighter is higher), with outlines of the patches that its finding touches."""
    canvas, axes = _films(film_NHW)
    grid, side = int(weight_NP.shape[1] ** 0.5), film_NHW.shape[-1]
    for axis, weight_P, truth_P, text in zip(axes, weight_NP, truth_NP, texts, strict=False):
        axis.imshow(weight_P.reshape(grid, grid), extent=(0, side, side, 0), cmap="magma", alpha=0.45)
        for patch in np.flatnonzero(truth_P > 0):
            row, column = divmod(int(patch), grid)
            cell = side / grid
            _draw(axis, (column * cell, row * cell, (column + 1) * cell, (row + 1) * cell), TRUTH)
        axis.set_title(textwrap.fill(text, 34), fontsize=7)
    return Figure(f"{title}: green the patches that the finding touches", _png(canvas))


def nearest(title: str, film_NHW: Array, reports: Sequence[Sequence[str]], own: Sequence[str]) -> Figure:
    """Films, each with its own report and its nearest reports."""
    canvas = Canvas(figsize=(11, 1.9 * len(film_NHW)), layout="constrained")
    for row, (film_HW, retrieved, report) in enumerate(zip(film_NHW, reports, own, strict=True)):
        picture = canvas.add_subplot(len(film_NHW), 2, 2 * row + 1)
        picture.imshow(film_HW, cmap="gray")
        words = canvas.add_subplot(len(film_NHW), 2, 2 * row + 2)
        lines = [f"own: {textwrap.shorten(report, 150)}"]
        lines += [f"{rank}. {textwrap.shorten(text, 150)}" for rank, text in enumerate(retrieved, 1)]
        words.text(0, 1, "\n".join(textwrap.fill(line, 78) for line in lines), fontsize=7, va="top")
        picture.axis("off")
        words.axis("off")
    return Figure(title, _png(canvas))


def bars(scores: Sequence[Score]) -> bytes:
    """A panel per score with a point and interval per encoder, as a PNG."""
    keys = list(dict.fromkeys(score.key for score in scores))
    columns = min(len(keys), 4)
    rows = -(-len(keys) // columns)
    variants = len({score.encoder for score in scores})
    canvas = Canvas(figsize=(3.6 * columns, (0.7 + 0.28 * variants) * rows), layout="constrained")
    panels = canvas.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel, key in zip(panels, keys, strict=False):
        own = [score for score in scores if score.key == key]
        for row, score in enumerate(own):
            low, high = score.interval or (score.value, score.value)
            panel.plot([low, high], [row, row], color="0.6")
            panel.plot(score.value, row, "o", color=TRUTH)
        panel.set_yticks(range(len(own)), [score.encoder for score in own], fontsize=8)
        panel.set_title(f"{key[3]}, {key[2]}", fontsize=8)
    for panel in panels[len(keys) :]:
        panel.axis("off")
    panels[0].invert_yaxis()
    return _png(canvas)


def _films(film_NRR: Array) -> tuple[Canvas, list[Any]]:
    """A row of films."""
    number = max(len(film_NRR), 1)
    canvas = Canvas(figsize=(2.4 * number, 2.9), layout="constrained")
    axes = list(canvas.subplots(1, number, squeeze=False)[0])
    for axis, film_RR in zip(axes, film_NRR, strict=False):
        axis.imshow(film_RR, cmap="gray")
        axis.axis("off")
    return canvas, axes


def _draw(axis: Any, box: Sequence[float] | Array, colour: str, words: str = "") -> None:
    x0, y0, x1, y1 = (float(edge) for edge in box)
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=1))
    if words:
        axis.text(x0, y0 - 1, words, color=colour, fontsize=5)


def _png(canvas: Canvas) -> bytes:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
