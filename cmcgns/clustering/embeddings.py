"""Embeddings in Parquet: files of a folder or bucket, of which each actor streams its own rows.

M rows of one batch, D dimensions. A row's ordinal is its place in the files sorted by name.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from cmcgns import storage
from cmcgns.clustering.kmeans import Array
from cmcgns.clustering.rows import RowStore, check_rows, round_to_grid
from cmcgns.errors import UserError

BATCH_ROWS = 4096
"""Rows decoded at a time."""
READ_BYTES = 8 * 2**20
"""Bytes that one request to the object store asks for."""
FOOTER_THREADS = 16


class Columns(NamedTuple):
    """Names of the columns; None where there is none."""

    id: str
    vector: str
    weight: str | None = None
    text: str | None = None


class RowGroupSlice(NamedTuple):
    """One row group, or the part [start, stop) of it."""

    uri: str
    number: int
    start: int
    stop: int
    first: int
    """Ordinal of its row ``start``."""


@dataclass(frozen=True)
class Embeddings:
    """A set of embeddings, or one actor's part of it; nothing is read before it is asked for."""

    uri: str
    columns: Columns
    dim: int
    groups: tuple[RowGroupSlice, ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(group.stop - group.start for group in self.groups)

    @property
    def ordinals_N(self) -> Array:
        """Ordinal of each row, ascending."""
        spans = [np.arange(group.first, group.first + group.stop - group.start) for group in self.groups]
        return np.concatenate(spans or [np.empty(0, np.int64)])

    def split(self, parts: int) -> list["Embeddings"]:
        """``parts`` runs of rows, equally many to within one; two may share a row group."""
        bounds = np.linspace(0, self.rows, parts + 1).round().astype(int)
        return [self.slice_rows(int(start), int(stop)) for start, stop in pairwise(bounds)]

    def slice_rows(self, start: int, stop: int) -> "Embeddings":
        """The rows in places [start, stop) of this set."""
        kept, place = [], 0
        for group in self.groups:
            skipped = max(start - place, 0)
            size = group.stop - group.start
            taken = min(stop - place, size) - skipped
            if taken > 0:
                begin = group.start + skipped
                kept.append(group._replace(start=begin, stop=begin + taken, first=group.first + skipped))
            place += size
        return replace(self, groups=tuple(kept))

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The named columns in order, ``BATCH_ROWS`` rows or fewer at a time."""
        for group in self.groups:
            with _parquet_at(group.uri):
                yield from _group_batches(group, names)

    def vectors(self, batch: pa.RecordBatch, first: int) -> Array:
        """The batch's vectors (M, D) in the precision of the file; ``first`` is the place of its first row, for errors."""
        column = batch.column(self.columns.vector)
        values = column.flatten()
        if pa.types.is_fixed_size_list(column.type):
            wrong = column.type.list_size != self.dim
        else:
            wrong = pc.any(pc.not_equal(column.value_lengths(), self.dim)).as_py()
        if wrong or column.null_count or values.null_count:
            odd = next((i for i, v in enumerate(column.to_pylist()) if v is None or None in v or len(v) != self.dim), 0)
            held = column[odd].as_py()
            raise UserError(
                f"{self.describe_row(first + odd)}: column '{self.columns.vector}' holds "
                f"{'nothing' if held is None else f'{len(held) - held.count(None)} numbers'}, where "
                f"{self.dim} were wanted; leave such rows out of the set"
            )
        return values.to_numpy(zero_copy_only=False).reshape(len(column), self.dim)

    def describe_row(self, row: int) -> str:
        """File and row in words, of the row in place ``row`` of this set."""
        for group in self.groups:
            size = group.stop - group.start
            if row < size:
                return f"{group.uri}, row group {group.number}, row {group.start + row} of it"
            row -= size
        return self.uri


@contextmanager
def _parquet_at(uri: str) -> Iterator[None]:
    """Turn what Arrow raises into one message with the URI."""
    with storage.explained(uri):
        try:
            yield
        except pa.ArrowException as error:
            what = str(error).strip().splitlines()[0]
            raise UserError(f"{uri} is no whole Parquet file, or must not change during a fit ({what})") from error


def _group_batches(group: RowGroupSlice, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    files, path = storage.filesystem(group.uri)
    # without pre_buffer memory stays at a few pages, however large the row group
    with parquet.ParquetFile(path, filesystem=files, pre_buffer=False, buffer_size=READ_BYTES) as file:
        place = 0
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group.number], columns=list(names)):
            begin, end = max(group.start - place, 0), min(group.stop - place, len(batch))
            if end > begin:
                yield batch.slice(begin, end - begin)
            place += len(batch)
            if place >= group.stop:
                return


def open_embeddings(uri: str, columns: Columns) -> Embeddings:
    """The set in the Parquet files at or below ``uri``, its columns checked; only footers and one row are read."""
    files = [uri]
    if not uri.endswith(".parquet") or storage.is_folder(uri):
        files = [storage.join(uri, path) for path in storage.list_files(uri) if path.endswith(".parquet")]
    if not files:
        raise UserError(f"data.uri {uri}: no .parquet files lie there; give their folder, or one file")
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        footers = list(threads.map(_footer, files))
    for file, (schema, _) in zip(files, footers, strict=True):
        _check_schema(file, schema, columns)
    groups, first = [], 0
    for file, (_, sizes) in zip(files, footers, strict=True):
        for index, size in enumerate(sizes):
            groups.append(RowGroupSlice(file, index, 0, size, first))
            first += size
    found = Embeddings(uri, columns, 0, tuple(group for group in groups if group.stop))
    if not found.groups:
        raise UserError(f"data.uri {uri}: its {len(files)} .parquet files hold no rows")
    return replace(found, dim=_vector_dim(found))


def _footer(uri: str) -> tuple[pa.Schema, list[int]]:
    """Schema of a file and the rows of its row groups."""
    files, path = storage.filesystem(uri)
    with _parquet_at(uri), parquet.ParquetFile(path, filesystem=files) as file:
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
        return file.schema_arrow, sizes


def _check_schema(uri: str, schema: pa.Schema, columns: Columns) -> None:
    for role, name in columns._asdict().items():
        if name is not None and name not in schema.names:
            raise UserError(f"data.{role}_column {name}: {uri} has no such column; it has {', '.join(schema.names)}")
    for role, name, fits, wanted in (
        ("id", columns.id, _is_id, "strings or integers"),
        ("weight", columns.weight, _is_number, "numbers"),
    ):
        if name is not None and not fits(schema.field(name).type):
            raise UserError(f"data.{role}_column {name} is {schema.field(name).type} in {uri}; {wanted} are wanted")
    kind = schema.field(columns.vector).type
    if not (hasattr(kind, "value_type") and pa.types.is_floating(kind.value_type)):
        raise UserError(
            f"data.vector_column {columns.vector} is {kind} in {uri}; lists of float32, 64 or 16 are wanted"
        )


def _is_id(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _vector_dim(found: Embeddings) -> int:
    """Length of the first vector."""
    first = next(found.slice_rows(0, 1).batches([found.columns.vector])).column(0)[0]
    if not first.is_valid or not len(first):
        raise UserError(
            f"{found.describe_row(0)}: column '{found.columns.vector}' is empty; leave such rows out of the set"
        )
    return len(first)


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
        check_rows(raw_MD, part.describe_row, first)
        yield first, round_to_grid(raw_MD), None if weight is None else _weights(part, batch, first)
        first += len(batch)


def _weights(part: Embeddings, batch: pa.RecordBatch, first: int) -> Array:
    weights_M = batch.column(part.columns.weight).to_numpy(zero_copy_only=False).astype(np.float64)
    wrong = np.flatnonzero(~(weights_M > 0) | ~np.isfinite(weights_M))
    if len(wrong):
        raise UserError(
            f"{part.describe_row(first + int(wrong[0]))}: weight {weights_M[wrong[0]]} in column '{part.columns.weight}'; "
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
            self._seek(place)
            taken = min(stop, self._first + len(self._held_MD)) - place
            rows_MD[place - start : place - start + taken] = self._held_MD[place - self._first :][:taken]
            place += taken
        return rows_MD if isinstance(index, slice) else rows_MD[0]

    def _seek(self, place: int) -> None:
        """Hold the batch with the row in ``place``."""
        end = self._first + len(self._held_MD)
        if self._first <= place < end:
            return
        group_start = self._group_start(place)
        if place < end or group_start >= end:  # behind us, or in a later row group: begin with that one
            self._begun = group_start
            self._batches = checked_batches(self.part.slice_rows(group_start, self.part.rows))
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
