"""What the doctor says: one line for each thing looked at, ok, warning or failed, with the way out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape

Level = Literal["ok", "warning", "failed"]
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    level: Level
    subject: str
    """What was looked at: versions, all-reduce, ..."""
    where: str
    """A node, two nodes, or 'cluster'."""
    found: str
    way_out: str = ""
    """What to do, where it is not ok."""

    def __str__(self) -> str:
        return f"{self.level:7}  {self.subject:14}  {self.where}: {self.found}" + (
            f". {self.way_out}" if self.way_out else ""
        )


def show(console: Console, line: Line) -> None:
    """Print one line."""
    level = f"{line.level:7}"
    text = escape(str(line)[len(level) :])
    console.print(f"[{COLOURS[line.level]}]{level}[/{COLOURS[line.level]}]{text}", highlight=False)


def show_sum(console: Console, lines: Sequence[Line]) -> None:
    """Print how many there were of each level."""
    counts = [f"{sum(line.level == level for line in lines)} {level}" for level in COLOURS]
    console.print(", ".join(counts), highlight=False)


def has_failed(lines: Sequence[Line]) -> bool:
    """Whether a run would be lost."""
    return any(line.level == "failed" for line in lines)
