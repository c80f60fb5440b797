"""The summary of a prepared set: counts by split, and what was excluded, bad or repaired."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from cmcgns.data.manifest import SPLITS, Manifest, Shard
from cmcgns.data.prepare.shard import MadeShard

QUANTILES = (0.05, 0.5, 0.95)
COUNTED = ("views", "sentences", "words", "sides")


class Summary:
    """Counts of the shards that were added, by split."""

    def __init__(self) -> None:
        self.hashes: list[str] = []
        """Content hash of each row group."""
        self.sums = {split: Counter[str]() for split in SPLITS}
        self.counters = {split: {name: Counter[Any]() for name in COUNTED} for split in SPLITS}
        self.repaired = Counter[str]()

    def add(self, shard: MadeShard) -> Shard:
        """Count ``shard``; its entry in the manifest."""
        entry, split = shard.entry(), shard.plan.split
        self.hashes += [group.content_hash for group in entry.row_groups]
        self.sums[split].update(rows=entry.rows, studies=entry.studies, bytes=entry.bytes)
        for name, counter in self.counters[split].items():
            counter.update(getattr(shard.account, name))
        self.repaired.update(shard.account.repaired)
        return entry

    def total(self, name: str) -> int:
        """Rows, studies or bytes of all splits."""
        return sum(counts[name] for counts in self.sums.values())

    def as_json(self, bad_rows: Mapping[str, str], of_tables: Mapping[str, int]) -> dict[str, Any]:
        """Counts of each split; reasons of bad rows, and rows by the rule that repaired them or their tables, by frequency."""
        return {
            "splits": {split: self._of_split(split) for split in SPLITS},
            "dropped": dict(Counter(bad_rows.values()).most_common()),
            "repaired": dict((Counter(of_tables) + self.repaired).most_common()),
        }

    def _of_split(self, split: str) -> dict[str, Any]:
        counters = self.counters[split]
        return {
            **{name: self.sums[split][name] for name in ("rows", "studies", "bytes")},
            "views": {view or "unknown": count for view, count in sorted(counters["views"].items())},
            **{name: _quantiles(counters[name]) for name in ("sentences", "words", "sides")},
        }


def _quantiles(counts: Counter[int]) -> list[int]:
    """5 %, median and 95 % quantile of values with their counts."""
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
    for split, counts in manifest.summary["splits"].items():
        table.add_row(
            split,
            str(counts["studies"]),
            str(counts["rows"]),
            f"{counts['bytes'] / 1e6:.1f}",
            ", ".join(f"{count} {view}" for view, count in counts["views"].items()),
            *(" / ".join(map(str, counts[name])) for name in ("sentences", "words", "sides")),
        )
    kinds = {
        "excluded": manifest.filtered,
        "bad": manifest.summary["dropped"],
        "read by rule": manifest.summary.get("repaired", {}),
    }
    for kind, reasons in kinds.items():
        for reason, count in reasons.items():
            table.add_row(kind, "", str(count), "", reason)
    return table
