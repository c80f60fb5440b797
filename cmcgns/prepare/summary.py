"""What a prepared set holds, in numbers: rows, views, lengths, sizes, and what was dropped and why."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from cmcgns.data.manifest import SPLITS, Manifest
from cmcgns.prepare.shard import MadeShard

QUANTILES = (0.05, 0.5, 0.95)
COUNTED = ("views", "sentences", "words", "sides")


def summarise(made: Sequence[MadeShard], bad_rows: Mapping[str, str]) -> dict[str, Any]:
    """Counts of each split and of the whole set; reasons of bad rows by how often they occur."""
    return {
        "splits": {split: _of([shard for shard in made if shard.plan.split == split]) for split in SPLITS},
        "dropped": dict(Counter(bad_rows.values()).most_common()),
    }


def _of(made: Sequence[MadeShard]) -> dict[str, Any]:
    counters: dict[str, Counter[Any]] = {name: Counter() for name in COUNTED}
    for shard in made:
        for name, counter in counters.items():
            counter.update(getattr(shard.account, name))
    lengths = {name: _quantiles(counters[name]) for name in ("sentences", "words", "sides")}
    return {
        "rows": sum(shard.account.rows for shard in made),
        "studies": sum(shard.entry().studies for shard in made),
        "bytes": sum(shard.bytes for shard in made),
        "views": {view or "unknown": count for view, count in sorted(counters["views"].items())},
        **lengths,
    }


def _quantiles(counts: Counter[int]) -> list[int]:
    """5 %, median and 95 % of values given by how often each occurs."""
    if not counts:
        return []
    values = np.array(sorted(counts))
    shares = np.cumsum([counts[int(value)] for value in values]) / counts.total()
    return [int(values[np.searchsorted(shares, quantile)]) for quantile in QUANTILES]


def summary_table(manifest: Manifest) -> Table:
    """The summary for the terminal; lengths as 5 % / median / 95 %."""
    table = Table(box=None, pad_edge=False)
    for heading in ("split", "studies", "films", "MB", "views", "sentences", "words", "longer side"):
        table.add_column(heading, justify="left" if heading in ("split", "views") else "right")
    for split, facts in manifest.summary["splits"].items():
        table.add_row(
            split,
            str(facts["studies"]),
            str(facts["rows"]),
            f"{facts['bytes'] / 1e6:.1f}",
            ", ".join(f"{count} {view}" for view, count in facts["views"].items()),
            *(" / ".join(map(str, facts[name])) for name in ("sentences", "words", "sides")),
        )
    for kind, reasons in (("left out", manifest.filtered), ("bad", manifest.summary["dropped"])):
        for reason, count in reasons.items():
            table.add_row(kind, "", str(count), "", reason)
    return table
