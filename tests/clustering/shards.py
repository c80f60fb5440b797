"""A pool in one process: the merging without the actors."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from cmcgns.clustering.kmeans import Array, faiss_assign
from cmcgns.clustering.pool import PooledRows
from cmcgns.clustering.rows import RowArray


class Shards(PooledRows):
    """Row arrays that together hold the rows."""

    def __init__(self, parts: Sequence[RowArray]) -> None:
        super().__init__([], [len(part) for part in parts])
        self.parts = parts

    def _call_and_merge(self, merge: Callable[..., Any], method: str, *arguments: Any) -> Any:
        return merge(*[getattr(part, method)(*arguments) for part in self.parts if len(part)])


def shards_of(rows_ND: Array, bounds: Sequence[int]) -> list[RowArray]:
    """One array with FAISS for each run of rows between consecutive ``bounds``."""
    return [RowArray(rows_ND[a:b], np.arange(a, b), faiss_assign("cpu", 1)) for a, b in pairwise(bounds)]
