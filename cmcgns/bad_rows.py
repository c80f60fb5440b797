"""Studies that cannot be used: too many of them end a run, and bad_rows.jsonl lists them."""

import json
from collections import Counter
from collections.abc import Iterable

from cmcgns import storage

SHOWN_REASONS = 5


def too_many_bad(bad: int, studies: int, most: float, reasons: Iterable[str]) -> str | None:
    """What to tell the user when ``bad``, more than the share ``most`` of ``studies``, cannot be used; else None.

    Which ones they are is left to bad_rows.jsonl: the name of a film may be a person's.
    """
    if bad <= most * studies:
        return None
    commonest = "; ".join(f"{count} x {reason}" for reason, count in Counter(reasons).most_common(SHOWN_REASONS))
    return (
        f"{bad} of {studies} studies cannot be used, more than data.max_bad_fraction {most} allows. "
        f"Commonest reasons: {commonest}"
    )


BAD_ROWS = "bad_rows.jsonl"


def read_bad_rows(folder: str) -> dict[str, str]:
    """Reason by study out of the bad_rows.jsonl of a run's folder; nothing where there is none yet."""
    uri = storage.join(folder, BAD_ROWS)
    lines = storage.read_bytes(uri).decode().splitlines() if storage.exists(uri) else []
    return {row["source"]: row["reason"] for row in map(json.loads, lines)}


def write_bad_rows(folder: str, bad_rows: dict[str, str]) -> None:
    """bad_rows.jsonl in a run's folder: every study that could not be used."""
    lines = [json.dumps({"source": source, "reason": reason}) + "\n" for source, reason in sorted(bad_rows.items())]
    storage.write_bytes(storage.join(folder, BAD_ROWS), "".join(lines).encode())
