"""report.html: one page without any remote part, from the records of one or more runs."""

import base64
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cmcgns import storage
from cmcgns.report.curves import draw, panels, to_png
from cmcgns.report.record import RunRecord, read_record

REPORT = "report.html"
BEYOND_THE_RUN = ("run.name", "run.resume", "run.storage")
"""Settings that always differ."""


def write_report(uris: Sequence[str], out: str | None = None) -> str:
    """Write the report of the runs in the folders ``uris``. Returns its URI.

    By default `report.html` in the folder of a single run; of several, a file with their names in the folder of the first.
    """
    runs = [read_record(uri) for uri in uris]
    if out is None:
        name = REPORT if len(runs) == 1 else f"report-{'-'.join(run.name for run in runs)}.html"
        out = storage.join(runs[0].uri, name)
    storage.write_bytes(out, report_page(runs).encode())
    return out


def report_page(runs: Sequence[RunRecord]) -> str:
    """The page. All texts are escaped, and a policy in the page forbids scripts and requests."""
    template = PackageLoader("cmcgns.report", ".")
    environment = Environment(
        loader=template, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"png": _inline, "number": _number}
    starts = stage_starts(runs[0])
    return environment.get_template("report.html.jinja").render(
        runs=runs,
        curves={heading: to_png(draw(some, starts)) for heading, some in panels(runs).items()},
        different=different_settings(runs),
        settings=setting_rows(runs),
        metrics=metric_rows(runs),
    )


def stage_starts(run: RunRecord) -> list[float]:
    """The first step of each stage after the first."""
    train = run.split("train")
    return [after["step"] for before, after in pairwise(train) if after["stage"] != before["stage"]]


def setting_rows(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The value of each setting in each run, '' where a run has none."""
    keys = dict.fromkeys(
        f"{section}.{key}" for run in runs for section, values in run.settings.items() for key in values
    )
    value = lambda run, key: run.settings.get(key.partition(".")[0], {}).get(key.partition(".")[2], "")
    return {key: [value(run, key) for run in runs] for key in keys}


def different_settings(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs."""
    rows = setting_rows(runs)
    return {
        key: values for key, values in rows.items() if key not in BEYOND_THE_RUN and any(v != values[0] for v in values)
    }


def metric_rows(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The numbers of each run's last validation."""
    last = [(run.split("val") or [{}])[-1] for run in runs]
    keys = dict.fromkeys(key for row in last for key, value in row.items() if isinstance(value, int | float))
    return {key: [row.get(key, "") for row in last] for key in keys}


def _inline(data: bytes) -> str:
    """A PNG as the source of an image."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
