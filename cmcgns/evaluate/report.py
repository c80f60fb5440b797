"""Results of an evaluation: evaluation.json, evaluation.csv, scores.parquet, report.html and the table in the terminal."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from cmcgns import storage
from cmcgns.errors import UserError
from cmcgns.evaluate.figures import Figure
from cmcgns.evaluate.scores import OF_A_CLASS, Difference, Score, differences
from cmcgns.run_folder import RunFolder
from cmcgns.storage import parquet
from cmcgns.terminal import STYLE

SCORES_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("task", "images", "setting", "metric", "encoder")]
    + [(name, pa.float64()) for name in ("value", "low", "high")]
    + [("number", pa.int64()), ("note", pa.string()), ("resampled", pa.list_(pa.float64()))]
)
"""Columns of scores.parquet: ``Score.row`` and its resamples."""


def write_results(folder: RunFolder, scores: Sequence[Score], facts: dict[str, Any]) -> None:
    """Write all scores with their intervals; scores.parquet also has their resamples, for paired comparisons."""
    rows = [score.row() for score in scores]
    against = [
        {
            "task": each.first.task,
            "images": each.first.images,
            "setting": each.first.setting,
            "metric": each.first.metric,
            "encoder": each.first.encoder,
            "against": each.second.encoder,
            "difference": each.value,
            "interval": each.interval,
        }
        for encoder in dict.fromkeys(score.encoder for score in scores)
        for each in differences(scores, encoder)
    ]
    folder.write_json("evaluation.json", without_nan(facts | {"scores": rows, "differences": against}))
    storage.write_bytes(folder.file("evaluation.csv"), pd.DataFrame(rows).to_csv(index=False).encode())
    resamples = [score.resampled_R.tolist() if score.resampled_R is not None else None for score in scores]
    table = pa.Table.from_pylist(
        [row | {"resampled": each} for row, each in zip(rows, resamples, strict=True)], schema=SCORES_SCHEMA
    )
    with storage.writing(folder.file("scores.parquet")) as file:
        pq.write_table(table, file)


def without_nan(value: dict[str, Any]) -> dict[str, Any]:
    """``value`` with NaN replaced by null, since JSON has no NaN."""
    converted: dict[str, Any] = json.loads(pd.Series([value]).to_json(orient="values"))[0]
    return converted


def print_skipped_and_failed(terminal: Console, skipped: Sequence[str], failures: Sequence[str]) -> None:
    """Print skipped and failed tasks with the reasons."""
    for line in skipped:
        terminal.print(f"skipped: {line}", highlight=False, markup=False)
    for line in failures:
        terminal.print(f"failed: {line}", style="red", highlight=False, markup=False)


@dataclass(frozen=True)
class Results:
    """Results of an earlier evaluation."""

    scores: list[Score]
    tests: dict[str, str]
    """Digest of each set's test images, and of the corpus's test studies."""
    seed: int
    """Seed of its resamples."""


def read_results(key: str, uri: str) -> Results:
    """The evaluation in the folder ``uri``, the value of setting ``key``.

    Raises:
        UserError: the folder contains no evaluation.
    """
    uri = storage.absolute(key, uri)
    try:
        facts = json.loads(storage.read_bytes(storage.join(uri, "evaluation.json")))
        rows = parquet.read(storage.join(uri, "scores.parquet"), pq.ParquetFile.read, SCORES_SCHEMA).to_pylist()
    except storage.MissingFileError:
        raise UserError(
            f"{key} {uri} contains no evaluation; give <run.storage>/<run.name> of a finished one"
        ) from None
    names = ("task", "images", "setting", "metric", "encoder", "value", "number", "note")
    scores = [
        Score(
            **{name: row[name] for name in names},
            resampled_R=None if row["resampled"] is None else np.array(row["resampled"], np.float64),
        )
        for row in rows
    ]
    return Results(scores, facts["tests"], facts["seed"])


def show(terminal: Console, scores: Sequence[Score], first: str) -> None:
    """Print a row per score (without those of single classes), a column per encoder, and the lead of ``first`` over each other
    encoder; a star if its interval excludes 0."""
    scores = [score for score in scores if OF_A_CLASS not in score.metric]
    encoders = list(dict.fromkeys([first, *(score.encoder for score in scores)]))
    ahead = {(each.first.key, each.second.encoder): each for each in differences(scores, first)}
    table = Table(box=None, pad_edge=False)
    for name in ("task", "set", "setting", "metric", *encoders, *(f"{first} - {other}" for other in encoders[1:])):
        table.add_column(name)
    for key in dict.fromkeys(score.key for score in scores):
        cells = [cell(next((s for s in scores if s.key == key and s.encoder == name), None)) for name in encoders]
        gaps = [gap(ahead.get((key, other))) for other in encoders[1:]]
        table.add_row(*key, *cells, *gaps)
    terminal.print(table)


def report_page(name: str, scores: Sequence[Score], shown: Sequence[Figure], facts: dict[str, Any]) -> str:
    """report.html: sets, skipped and failed tasks, table of all scores, figures."""
    html = {"index": False, "na_rep": "", "float_format": "{:.4g}".format, "border": 0}
    pictures = [
        f"<h3>{escape(figure.title)}</h3><img src='data:image/png;base64,{base64.b64encode(figure.png).decode()}' "
        "style='max-width:100%'>"
        for figure in shown
    ]
    sets = pd.DataFrame(
        [
            {"set": set_name, "rule": each["rule"], "split": split, **part}
            for set_name, each in facts["sets"].items()
            for split, part in each["splits"].items()
        ]
    )
    notes = [f"<li>{escape(line)}</li>" for line in [*facts["failures"], *facts["left_out"]]]
    return "\n".join(
        [
            f"<!doctype html><meta charset='utf-8'><title>{escape(name)}</title><style>{STYLE}</style>",
            f"<h1>{escape(name)}</h1>",
            sets.to_html(**html),
            f"<ul>{''.join(notes)}</ul>",
            "<h2>Scores</h2>",
            pd.DataFrame([score.row() for score in scores]).to_html(**html),
            "<h2>Pictures</h2>",
            *pictures,
        ]
    )


def cell(score: Score | None) -> str:
    """A score with its interval, as text."""
    if score is None:
        return ""
    low, high = score.interval or (None, None)
    return f"{score.value:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def gap(difference: Difference | None) -> str:
    """A difference with its interval, as text, and a star if that excludes 0."""
    if difference is None:
        return ""
    interval = difference.interval
    if interval is None:
        return f"{difference.value:+.3f}"
    beyond = " *" if interval[0] > 0 or interval[1] < 0 else ""
    return f"{difference.value:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f}){beyond}"
