"""What a run folder says of its run, finished or not."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cmcgns import storage
from cmcgns.config.sections import is_generated
from cmcgns.errors import UserError

if TYPE_CHECKING:
    from cmcgns.report.samples import Samples  # torch is slow to import

Row = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """The files of one pretraining run."""

    name: str
    uri: str
    settings: dict[str, dict[str, Any]]
    """By section and key."""
    rows: list[Row]
    """metrics.jsonl."""
    result: dict[str, Any]
    """result.json; empty while the run goes on."""
    bad_rows: dict[str, int]
    """Unusable studies by reason."""
    pictures: dict[str, bytes]
    """PNG files of the folder by name."""
    samples: "Samples | None" = None
    """What the model makes of validation studies."""
    left_out: list[str] = field(default_factory=list)
    """What the report does not show, and why."""

    def split(self, name: str) -> list[Row]:
        """The rows of ``train`` or ``val``, one for each step."""
        return [row for row in self.rows if row.get("split") == name]

    @property
    def status(self) -> str:
        """How the run ended."""
        return str(self.result.get("status", "running, or was killed"))

    @property
    def failure(self) -> str:
        """Why it failed; empty if it did not."""
        return str(self.result.get("failure") or "")

    @property
    def is_generated(self) -> bool:
        """Whether its films are drawings of no patient."""
        data = self.settings.get("data", {})
        return is_generated(str(data.get("uri")), str(data.get("format", "auto")))

    @property
    def shows_films(self) -> bool:
        """Whether there are films or sentences to show."""
        return bool(self.pictures or (self.samples and self.samples.studies))

    @property
    def versions(self) -> dict[str, str]:
        """Versions of packages."""
        return dict(self.result.get("versions", {}))

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time of the steps went; without the start of the run, its checkpoints and its export."""
        train = self.split("train")
        total = lambda key, rows: sum(float(row.get(key) or 0) for row in rows)
        waits = {"waiting for data": total("data_wait_s", train), "waiting for clustering": total("pool_wait_s", train)}
        steps = max(total("step_s", train) - sum(waits.values()), 0.0)
        return {"computing steps": steps} | waits | {"validation": total("step_s", self.split("val"))}


def read_record(uri: str) -> RunRecord:
    """The run in the folder ``uri``.

    Raises:
        UserError: there is no pretraining run.
    """
    uri = storage.absolute("report", uri.rstrip("/"))
    config, metrics = _text(uri, "config.yaml"), _text(uri, "metrics.jsonl")
    rows = _rows(metrics or "")
    if config is None or (metrics is not None and rows and "split" not in rows[0]):
        raise UserError(f"report: {uri} is not the folder of a pretraining run; give <run.storage>/<run.name>")
    if not rows:
        raise UserError(f"report: {uri} has no step in metrics.jsonl yet; try again later")
    return RunRecord(
        name=Path(uri).name,
        uri=uri,
        settings=yaml.safe_load(config),
        rows=rows,
        result=json.loads(_text(uri, "result.json") or "{}"),
        bad_rows=dict(Counter(row["reason"] for row in _rows(_text(uri, "bad_rows.jsonl") or "")).most_common()),
        pictures={
            name: storage.read_bytes(storage.join(uri, name))
            for name in storage.list_files(uri, recursive=False)
            if name.endswith(".png")
        },
    )


def _text(uri: str, name: str) -> str | None:
    try:
        return storage.read_bytes(storage.join(uri, name)).decode()
    except storage.MissingFileError:
        return None


def _rows(text: str) -> list[Row]:
    """The JSON lines of ``text``; the last one may be incomplete while a run goes on."""
    lines = text.splitlines()
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        return [json.loads(line) for line in lines[:-1]]
