"""Keeps off the terminal what Ray prints there and no user can act on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOISE = ("PYTHON worker processes have been started",)
"""Ray counts every actor and data task; a run has many of both on purpose."""


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
