"""The driver's terminal: tables, log lines, and a filter for Ray messages that a user cannot act on."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

STYLE = (
    "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:right}"
)
"""CSS of report.html."""
NOISE = ("PYTHON worker processes have been started",)
"""Ray's warning about the number of actors and data tasks; a run starts many of both on purpose."""


def console() -> Console:
    """Console of the driver; 200 columns wide if the output is a file, enough for a line of progress.

    Characters that the encoding of the output lacks are written as question marks.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    return _PrintableConsole(width=None if sys.stdout.isatty() else 200, soft_wrap=True)


class _PrintableConsole(Console):
    """Shows control characters as text: ids and file names of a corpus could otherwise move the cursor or set the title."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def printable(text: str) -> str:
    """``text`` with escapes in place of control characters, and of bytes of a file name that are not UTF-8."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def print_plan(console: Console, facts: dict[str, str]) -> None:
    """Print ``facts`` as a table of two columns."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        table.add_row(f"[bold]{key}[/bold]", escape(value))
    console.print(table)


@contextmanager
def log_on(console: Console) -> Iterator[None]:
    """Show this package's log on ``console``, warnings in yellow."""
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
    """A stream that drops writes containing ``NOISE``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._after_noise = False

    def write(self, text: str) -> int:
        noise = any(words in text for words in NOISE)
        # print() writes the line end separately
        if not noise and not (self._after_noise and not text.strip()):
            self._stream.write(text)
        self._after_noise = noise
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet_terminal() -> Iterator[None]:
    """Filter ``NOISE`` from standard output and error."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Filtered(before[0]), _Filtered(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
