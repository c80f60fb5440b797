"""Studies that cannot be used: listed in bad_rows.jsonl, and too many of them fail the run."""

import json
from collections import Counter
from collections.abc import Iterable

from cmcgns import storage

SHOWN_REASONS = 5


def too_many_bad(bad: int, studies: int, most: float, reasons: Iterable[str]) -> str | None:
    """The error message if ``bad`` is more than the share ``most`` of ``studies``; otherwise None.

    It gives counts and no file names, because a film may be named after a person.
    """
    if bad <= most * studies:
        return None
    most_common = "; ".join(f"{count} x {reason}" for reason, count in Counter(reasons).most_common(SHOWN_REASONS))
    return (
        f"{bad} of {studies} studies cannot be used, more than data.max_bad_fraction {most} allows. "
        f"Most common reasons: {most_common}"
    )


BAD_ROWS = "bad_rows.jsonl"


def read_bad_rows(folder: str) -> dict[str, str]:
    """Reason by study, from bad_rows.jsonl in a run folder; empty if there is no such file."""
    uri = storage.join(folder, BAD_ROWS)
    lines = storage.read_bytes(uri).decode().splitlines() if storage.exists(uri) else []
    return {row["source"]: row["reason"] for row in map(json.loads, lines)}


def write_bad_rows(folder: str, bad_rows: dict[str, str]) -> None:
    """Write bad_rows.jsonl in a run folder: every study that could not be used."""
    lines = [json.dumps({"source": source, "reason": reason}) + "\n" for source, reason in sorted(bad_rows.items())]
    storage.write_bytes(storage.join(folder, BAD_ROWS), "".join(lines).encode())
