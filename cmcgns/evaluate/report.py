"""What an evaluation leaves behind: evaluation.json, evaluation.csv, scores.parquet, and a table in the terminal."""

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
from cmcgns.terminal import STYLE


def write_results(folder: RunFolder, scores: Sequence[Score], facts: dict[str, Any]) -> None:
    """All numbers with their intervals; scores.parquet holds their resamples too, for comparisons in pairs."""
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
    table = pa.Table.from_pylist(rows).append_column("resampled", pa.array(resamples, pa.list_(pa.float64())))
    with storage.writing(folder.file("scores.parquet")) as file:
        pq.write_table(table, file)


def without_nan(value: dict[str, Any]) -> dict[str, Any]:
    """``value`` with null for NaN, which is no JSON."""
    found: dict[str, Any] = json.loads(pd.Series([value]).to_json(orient="values"))[0]
    return found


def tell_rest(terminal: Console, left_out: Sequence[str], failures: Sequence[str]) -> None:
    """Print what was left out and what failed."""
    for line in left_out:
        terminal.print(f"left out: {line}", highlight=False, markup=False)
    for line in failures:
        terminal.print(f"failed: {line}", style="red", highlight=False, markup=False)


@dataclass(frozen=True)
class Results:
    """Another evaluation, read back."""

    scores: list[Score]
    tests: dict[str, str]
    """Digest of each set's test images, and of the corpus's test studies."""
    seed: int
    """Of its resamples."""


def read_results(key: str, uri: str) -> Results:
    """The evaluation in the folder ``uri``, which the setting ``key`` names.

    Raises:
        UserError: it holds none.
    """
    uri = storage.absolute(key, uri)
    try:
        facts = json.loads(storage.read_bytes(storage.join(uri, "evaluation.json")))
        rows = storage.read_parquet(storage.join(uri, "scores.parquet"), lambda file: file.read()).to_pylist()
    except storage.MissingFileError:
        raise UserError(
            f"{key} {uri} holds no evaluation; name <run.storage>/<run.name> of one that has ended"
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
    """A row for each number but those of single classes, a column for each encoder, and how far the ``first`` is before each
    other one; a star where the interval of that leaves out 0."""
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
    """report.html: the sets, the table of all numbers, the figures, what was left out."""
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
    told = [f"<li>{escape(line)}</li>" for line in [*facts["failures"], *facts["left_out"]]]
    return "\n".join(
        [
            f"<!doctype html><meta charset='utf-8'><title>{escape(name)}</title><style>{STYLE}</style>",
            f"<h1>{escape(name)}</h1>",
            sets.to_html(**html),
            f"<ul>{''.join(told)}</ul>",
            "<h2>Scores</h2>",
            pd.DataFrame([score.row() for score in scores]).to_html(**html),
            "<h2>Pictures</h2>",
            *pictures,
        ]
    )


def cell(score: Score | None) -> str:
    """A number with its interval."""
    if score is None:
        return ""
    low, high = score.interval or (None, None)
    return f"{score.value:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def gap(difference: Difference | None) -> str:
    """A difference with its interval, and a star where that leaves out 0."""
    if difference is None:
        return ""
    interval = difference.interval
    if interval is None:
        return f"{difference.value:+.3f}"
    beyond = " *" if interval[0] > 0 or interval[1] < 0 else ""
    return f"{difference.value:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f}){beyond}"
