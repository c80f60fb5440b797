"""The driver's terminal: tables of facts, and nothing of what Ray prints there that no user can act on."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

STYLE = (
    "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:right}"
)
"""Of report.html."""
NOISE = ("PYTHON worker processes have been started",)
"""Ray counts every actor and data task; a run has many of both on purpose."""


def console() -> Console:
    """The driver's terminal; wide enough for one line of progress where the output is a file."""
    return Console(width=None if sys.stdout.isatty() else 200, soft_wrap=True)


def print_plan(console: Console, facts: dict[str, str]) -> None:
    """A table of what is about to run, where, and on how much."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        table.add_row(f"[bold]{key}[/bold]", value)
    console.print(table)


@contextmanager
def log_on(console: Console) -> Iterator[None]:
    """What this package logs, on ``console``: warnings in yellow."""
    handler, logger = _ConsoleHandler(console), logging.getLogger("cmcgns")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else ""
        self.console.print(record.getMessage(), style=style, highlight=False, markup=False)


class _Filtered:
    """A stream that drops whole writes that hold ``NOISE``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._after_noise = False

    def write(self, text: str) -> int:
        noise = any(words in text for words in NOISE)
        # print() writes its line end apart
        if not noise and not (self._after_noise and not text.strip()):
            self._stream.write(text)
        self._after_noise = noise
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet_terminal() -> Iterator[None]:
    """Standard output and error without ``NOISE``."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Filtered(before[0]), _Filtered(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
