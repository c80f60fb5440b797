"""The gate of a sweep: lets as many trials in as the cluster has room for at the time."""

import time
from collections.abc import Callable

from cmcgns.errors import UserError
from cmcgns.sweep.resources import Room
from cmcgns.train.plan import Share

LOOK_AGAIN_S = 1.0


class Gate:
    """Who is inside, and who may be. A cluster that has lost a node may hold pieces of more trials than it can finish: all
    of them would wait for what the others hold. So those that came last go back to the gate, with all that they hold.

    ``count`` gives the cluster's room now, and raises ``UserError`` where not one trial fits.
    """

    def __init__(self, count: Callable[[], Room]) -> None:
        self._count, self._room, self._counted_at = count, count(), time.monotonic()
        self._inside: list[int] = []
        self._excused: set[int] = set()
        self.complaint: str | None = None
        """Why nobody may enter, where not one trial fits."""

    def enter(self, number: int) -> Share | None:
        """What trial ``number`` may count on; None where it has to wait. One that comes again has left by that."""
        self.leave(number)
        if len(self._inside) >= self._trials():
            return None
        self._inside.append(number)
        return self._room.share

    def leave(self, number: int) -> None:
        """Trial ``number`` holds nothing any more."""
        if number in self._inside:
            self._inside.remove(number)

    def empty(self) -> None:
        """Nobody is inside any more: Tune has ended all trials, some of them perhaps before they could say so."""
        self._inside.clear()

    def excuse(self, number: int) -> None:
        """The next loss of trial ``number`` is no fault of its own: it was sent away and could not end in peace."""
        self._excused.add(number)

    def is_excused(self, number: int) -> bool:
        """Whether the loss of trial ``number`` is excused; once."""
        excused = number in self._excused
        self._excused.discard(number)
        return excused

    def must_leave(self, number: int) -> bool:
        """Whether the cluster has become too small for trial ``number`` beside those that came before it."""
        return number in self._inside[self._trials() :]

    def _trials(self) -> int:
        if time.monotonic() - self._counted_at > LOOK_AGAIN_S:
            self._counted_at = time.monotonic()
            try:
                self._room, self.complaint = self._count(), None
            except UserError as error:
                self.complaint = str(error)
        return 0 if self.complaint else self._room.trials
