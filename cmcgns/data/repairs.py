"""Notes of what was read by a rule and not as it stands, for the summary of a prepared set."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_NOTES: ContextVar[Counter[str] | None] = ContextVar("notes", default=None)


@contextmanager
def noted() -> Iterator[Counter[str]]:
    """How often each rule was noted inside, by this thread."""
    notes: Counter[str] = Counter()
    token = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(token)


def note(rule: str, times: int = 1) -> None:
    """Count ``rule``, if anyone asked for notes; nothing of the input may be in it."""
    notes = _NOTES.get()
    if notes is not None and times:
        notes[rule] += times
