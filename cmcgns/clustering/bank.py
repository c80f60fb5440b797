"""A bank of recent sentence features, and the rule that says which actor keeps which rows.

Every row has an ordinal: its place in the run's stream of sentences, ordered by (step, rank, row). The bank at the end
of a step is the last ``bank_size`` ordinals, however many actors hold it and however many ranks fill it.
"""

from dataclasses import dataclass, field

import numpy as np

from cmcgns.clustering.kmeans import Array


def serving_actor(step: int, rank: int, ranks: int, actors: int) -> int:
    """The actor that keeps what ``rank`` pushes at ``step``: rank mod actors, and where actors outnumber the ranks each
    rank takes turns among its own, so that none stays empty."""
    if actors <= ranks:
        return rank % actors
    own = range(rank, actors, ranks)
    return own[step % len(own)]


@dataclass
class BankShard:
    """The part of the bank that one actor holds: chunks of rows with their ordinals."""

    chunks: dict[tuple[int, int], tuple[Array, Array]] = field(default_factory=dict)
    """(step, rank) -> float16 rows (n, D) and their int64 ordinals (n,)."""

    def push(self, step: int, rank: int, first_ordinal: int, rows_nD: Array) -> None:
        """Keep the rows that ``rank`` saw at ``step``."""
        ordinals_n = np.arange(first_ordinal, first_ordinal + len(rows_nD))
        self.chunks[step, rank] = (rows_nD.astype(np.float16), ordinals_n)

    def restore(self, step: int, rows_ND: Array, ordinals_N: Array) -> None:
        """Keep rows out of a checkpoint, as of ``step``; a lost actor may have left gaps between their ordinals."""
        self.chunks[step, 0] = (rows_ND.astype(np.float16), ordinals_N.copy())

    def rows_between(self, first: int, stop: int) -> tuple[Array, Array]:
        """Float16 rows and ordinals in [first, stop), in the order of their ordinals."""
        held = sorted(self.chunks.values(), key=lambda chunk: int(chunk[1][0]) if len(chunk[1]) else 0)
        held = [chunk for chunk in held if len(chunk[1])]
        if not held:
            return np.empty((0, 0), np.float16), np.empty(0, np.int64)
        rows_ND = np.concatenate([rows for rows, _ in held])
        ordinals_N = np.concatenate([ordinals for _, ordinals in held])
        inside_N = (ordinals_N >= first) & (ordinals_N < stop)
        return rows_ND[inside_N], ordinals_N[inside_N]

    def forget_before(self, first: int) -> None:
        """Drop chunks that lie wholly before ordinal ``first``; no later re-clustering asks for them."""
        self.chunks = {key: chunk for key, chunk in self.chunks.items() if len(chunk[1]) and chunk[1][-1] >= first}
