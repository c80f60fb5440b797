"""Where an actor keeps the rows of its part of a set: in memory, in a file on its node's disk, or nowhere at all.

All three are read alike, by slices of normalised float32 rows on the grid. N rows, M rows of one batch, D dimensions.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from cmcgns.clustering.embeddings import Embeddings
from cmcgns.clustering.kmeans import Array
from cmcgns.clustering.rows import RowStore, check_rows, on_grid
from cmcgns.errors import UserError


def load_rows(part: Embeddings, memory_bytes: float, scratch: str | None) -> tuple[RowStore, Array | None]:
    """The rows of ``part``, each checked, and their weights: in memory up to ``memory_bytes``, else in a file without a
    name in the folder ``scratch`` (by default the system's for temporary files), which goes with the process."""
    fits = part.rows * part.dim * 4 <= memory_bytes
    store = MemoryRows(part.rows, part.dim) if fits else RowFile(part.rows, part.dim, scratch)
    weights_N = None if part.columns.weight is None else np.empty(part.rows)
    got = 0
    for first, rows_MD, weights_M in checked_batches(part):
        store.append(rows_MD)
        got = first + len(rows_MD)
        if weights_N is not None and weights_M is not None:
            weights_N[first : first + len(rows_MD)] = weights_M
    if got != part.rows:
        raise UserError(f"{part.uri} gave {got} rows, and {part.rows} before; it must not change during a fit")
    return store, weights_N


def checked_batches(part: Embeddings) -> Iterator[tuple[int, Array, Array | None]]:
    """Place of the first row, rows (M, D) and weights (M,), batch by batch; a row or weight that cannot be is refused."""
    weight, first = part.columns.weight, 0
    for batch in part.batches([part.columns.vector, *([weight] if weight else [])]):
        raw_MD = part.vectors(batch, first)
        check_rows(raw_MD, part.place, first)
        yield first, on_grid(raw_MD), None if weight is None else _weights(part, batch, first)
        first += len(batch)


def _weights(part: Embeddings, batch: pa.RecordBatch, first: int) -> Array:
    weights_M = batch.column(part.columns.weight).to_numpy(zero_copy_only=False).astype(np.float64)
    wrong = np.flatnonzero(~(weights_M > 0) | ~np.isfinite(weights_M))
    if len(wrong):
        raise UserError(
            f"{part.place(first + int(wrong[0]))}: weight {weights_M[wrong[0]]} in column '{part.columns.weight}'; "
            "weights are finite and above 0"
        )
    return weights_M


class MemoryRows:
    """Rows in memory, which are on the grid already."""

    def __init__(self, rows: int, dim: int) -> None:
        self.shape = (rows, dim)
        self._rows_ND, self._filled = np.empty(self.shape, np.float32), 0

    def append(self, rows_MD: Array) -> None:
        """Add rows behind those that are there."""
        self._rows_ND[self._filled : self._filled + len(rows_MD)] = rows_MD
        self._filled += len(rows_MD)

    def __getitem__(self, index: Any) -> Array:
        return self._rows_ND[index]


class RowFile:
    """Rows in a file on the local disk, read by the slice: memory holds none of them."""

    def __init__(self, rows: int, dim: int, scratch: str | None) -> None:
        folder = scratch or tempfile.gettempdir()
        needed, free = rows * dim * 4, shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"clustering.scratch {folder} has {free / 2**30:.1f} GiB left and {needed / 2**30:.1f} are needed for "
                f"{rows} rows of {dim}; name another folder, use more actors, or raise clustering.memory_gib"
            )
        self.shape = (rows, dim)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long as the rows are

    def append(self, rows_MD: Array) -> None:
        """Add rows behind those that are there."""
        left = rows_MD.data.cast("B")
        while left:  # a disk that fills takes a part
            left = left[self._file.write(left) :]

    def __getitem__(self, index: Any) -> Array:
        start, stop, _ = index.indices(self.shape[0]) if isinstance(index, slice) else (index, index + 1, 1)
        rows_MD = np.empty((max(stop - start, 0), self.shape[1]), np.float32)
        view, done = rows_MD.reshape(-1).view(np.uint8).data, 0
        while done < len(view):  # one read gives at most 2 GiB
            read = os.preadv(self._file.fileno(), [view[done:]], start * self.shape[1] * 4 + done)
            if not read:
                raise RuntimeError(f"the file of rows ends before row {stop} of {self.shape[0]}")
            done += read
        return rows_MD if isinstance(index, slice) else rows_MD[0]


class StreamedRows:
    """Rows read from their Parquet files each time; quick for slices that ascend, as passes and draws ask for them."""

    def __init__(self, part: Embeddings) -> None:
        self.part = part
        self.shape = (part.rows, part.dim)
        self._batches: Iterator[tuple[int, Array, Array | None]] = iter(())
        self._begun, self._first, self._held_MD = 0, 0, np.empty((0, part.dim), np.float32)

    def __getitem__(self, index: Any) -> Array:
        start, stop, _ = index.indices(self.shape[0]) if isinstance(index, slice) else (index, index + 1, 1)
        rows_MD = np.empty((max(stop - start, 0), self.shape[1]), np.float32)
        place = start
        while place < stop:
            self._turn_to(place)
            taken = min(stop, self._first + len(self._held_MD)) - place
            rows_MD[place - start : place - start + taken] = self._held_MD[place - self._first :][:taken]
            place += taken
        return rows_MD if isinstance(index, slice) else rows_MD[0]

    def _turn_to(self, place: int) -> None:
        """Hold the batch with the row in ``place``."""
        end = self._first + len(self._held_MD)
        if self._first <= place < end:
            return
        group_start = self._group_start(place)
        if place < end or group_start >= end:  # behind us, or in a later row group: begin with that one
            self._begun = group_start
            self._batches = checked_batches(self.part.between(group_start, self.part.rows))
        for first, rows_MD, _ in self._batches:
            self._first, self._held_MD = self._begun + first, rows_MD
            if place < self._first + len(rows_MD):
                return
        raise UserError(f"{self.part.uri} holds fewer rows than before; it must not change during a fit")

    def _group_start(self, place: int) -> int:
        """Place of the first row of the row group that holds the row in ``place``."""
        start = 0
        for group in self.part.groups:
            size = group.stop - group.start
            if place < start + size:
                return start
            start += size
        return start
