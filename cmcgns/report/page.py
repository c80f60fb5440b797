"""report.html: one page without any remote part, from the records of one or more runs.

It holds films and sentences of a corpus only if it was generated, or if the caller asks for them: a page is easily sent on.
"""

import base64
import io
import shlex
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from cmcgns import storage
from cmcgns.errors import UserError
from cmcgns.report.curves import RECALL, draw, panels, to_png
from cmcgns.report.record import RunRecord, read_record

REPORT = "report.html"
BEYOND_THE_RUN = ("run.name", "run.resume", "run.storage")
"""Settings that always differ."""
SAMPLES = 128
"""Validation studies of a generated corpus that a report shows by default."""
FEW_STUDIES = 50
"""Recall among fewer studies gets a warning."""


def write_report(
    uris: Sequence[str], out: str | None = None, samples: int | None = None, trusted: Collection[str] = ()
) -> str:
    """Write the report of the runs in the folders ``uris``. Returns its URI.

    By default `report.html` in the folder of a single run; of several, a file with their names in the folder of the first.
    ``samples``, ``trusted``: see ``with_samples``.
    """
    if samples is not None and samples < 0:
        raise UserError(f"report: --samples {samples} is below 0; give a number of validation studies, or 0 for none")
    runs = [with_samples(read_record(uri), samples, trusted) for uri in uris]
    if out is None:
        name = REPORT if len(runs) == 1 else f"report-{'-'.join(run.name for run in runs)}.html"
        out = storage.join(runs[0].uri, name)
    storage.write_bytes(out, report_page(runs).encode())
    return out


def with_samples(run: RunRecord, samples: int | None = None, trusted: Collection[str] = ()) -> RunRecord:
    """``run`` with what its model makes of the first ``samples`` validation studies; with 0 without any film or sentence.

    By default ``SAMPLES`` of a generated corpus and none of any other, which may be of patients. ``trusted``: modules that the
    run's settings name, besides ours, and that may be executed.
    """
    number = samples if samples is not None else SAMPLES if run.is_generated else 0
    if not number:
        command = f"cmcgns report {shlex.quote(run.uri)} --samples={SAMPLES}"
        why = "--samples=0" if samples == 0 else f"the corpus may be of patients; {command} shows them"
        return replace(run, pictures={}, left_out=[f"all films and sentences: {why}"])
    try:
        from cmcgns.report.samples import read_samples  # torch is slow to import, and the core cannot read every corpus

        found = read_samples(run.uri, number, trusted)
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed: pip install 'cmcgns[cpu]', or 'cmcgns[gpu]' with CUDA"
        return replace(run, left_out=[f"retrieval, heat maps and clusters: {reason}"])
    return replace(run, samples=found, left_out=found.left_out)


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
        recall=RECALL,
        few_studies={run.name: count for run in runs if 0 < (count := recall_studies(run)) < FEW_STUDIES},
        shows_patients=any(not run.is_generated and run.shows_films for run in runs),
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


def recall_studies(run: RunRecord) -> int:
    """Studies among which the last validation measured recall; 0 if it did not."""
    last = (run.split("val") or [{}])[-1]
    return int(last.get("studies", 0)) if any("recall" in key for key in last) else 0


def _inline(picture: bytes | Image.Image) -> str:
    """A PNG or a picture as the source of an image."""
    if isinstance(picture, Image.Image):
        stored = io.BytesIO()
        picture.save(stored, "PNG")
        picture = stored.getvalue()
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
