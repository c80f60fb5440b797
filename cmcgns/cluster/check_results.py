"""What a check found, and how it is printed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape

Level = Literal["ok", "warning", "failed"]
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@dataclass(frozen=True)
class CheckResult:
    """Result of one check."""

    level: Level
    subject: str
    """What was checked: versions, all-reduce, ..."""
    where: str
    """A node, two nodes, or 'cluster'."""
    detail: str
    fix: str = ""
    """What the user should do if the level is not ok."""

    def __str__(self) -> str:
        return f"{self.level:7}  {self.subject:14}  {self.where}: {self.detail}" + (f". {self.fix}" if self.fix else "")


def print_result(console: Console, line: CheckResult) -> None:
    """Print one result as a line."""
    level = f"{line.level:7}"
    text = escape(str(line)[len(level) :])
    console.print(f"[{COLOURS[line.level]}]{level}[/{COLOURS[line.level]}]{text}", highlight=False)


def print_summary(console: Console, lines: Sequence[CheckResult]) -> None:
    """Print the number of results at each level."""
    counts = [f"{sum(line.level == level for line in lines)} {level}" for level in COLOURS]
    console.print(", ".join(counts), highlight=False)


def any_failed(lines: Sequence[CheckResult]) -> bool:
    """Whether a run would fail."""
    return any(line.level == "failed" for line in lines)


@dataclass(frozen=True)
class Requirements:
    """What the planned run needs on a machine."""

    use_gpu: bool
    deepspeed: bool
    faiss_gpu: bool
    mebibytes: int = 64
    """To all-reduce over its GPUs."""
    timeout_s: float = 60.0
