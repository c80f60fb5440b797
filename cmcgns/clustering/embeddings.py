"""Embeddings in Parquet files of a folder or bucket; each actor reads its own rows.

M rows of one batch, D dimensions. A row's ordinal is its position in the files sorted by name.
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

from cmcgns import storage
from cmcgns.clustering.kmeans import Array
from cmcgns.clustering.rows import RowStore, check_rows, round_to_grid
from cmcgns.errors import UserError
from cmcgns.storage import parquet

BATCH_ROWS = 4096
"""Rows decoded at a time."""
READ_BYTES = 8 * 2**20
"""Size of one request to the object store."""
FOOTER_THREADS = 16


class Columns(NamedTuple):
    """Column names; None if there is no such column."""

    id: str
    vector: str
    weight: str | None = None
    text: str | None = None


class RowGroupSlice(NamedTuple):
    """A row group, or the part [start, stop) of it."""

    uri: str
    number: int
    start: int
    stop: int
    first: int
    """Ordinal of its row ``start``."""


@dataclass(frozen=True)
class Embeddings:
    """A set of embeddings, or one actor's part of it. Rows are read on demand."""

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
        """``parts`` consecutive parts whose sizes differ by at most one row; two may share a row group."""
        bounds = np.linspace(0, self.rows, parts + 1).round().astype(int)
        return [self.slice_rows(int(start), int(stop)) for start, stop in pairwise(bounds)]

    def slice_rows(self, start: int, stop: int) -> "Embeddings":
        """Rows [start, stop) of this set."""
        kept, position = [], 0
        for group in self.groups:
            skipped = max(start - position, 0)
            size = group.stop - group.start
            taken = min(stop - position, size) - skipped
            if taken > 0:
                begin = group.start + skipped
                kept.append(group._replace(start=begin, stop=begin + taken, first=group.first + skipped))
            position += size
        return replace(self, groups=tuple(kept))

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The named columns in order, in batches of at most ``BATCH_ROWS`` rows."""
        for group in self.groups:
            with _named_errors(group.uri):
                yield from _group_batches(group, names)

    def vectors(self, batch: pa.RecordBatch, first: int) -> Array:
        """Vectors (M, D) of the batch in the file's precision; ``first`` is the position of its first row, for errors."""
        column = batch.column(self.columns.vector)
        values = column.flatten()
        if pa.types.is_fixed_size_list(column.type):
            wrong = column.type.list_size != self.dim
        else:
            wrong = pc.any(pc.not_equal(column.value_lengths(), self.dim)).as_py()
        if wrong or column.null_count or values.null_count:
            odd = next((i for i, v in enumerate(column.to_pylist()) if v is None or None in v or len(v) != self.dim), 0)
            value = column[odd].as_py()
            raise UserError(
                f"{self.describe_row(first + odd)}: column '{self.columns.vector}' has "
                f"{'no value' if value is None else f'{len(value) - value.count(None)} numbers'} instead of "
                f"{self.dim}; remove such rows from the set"
            )
        return values.to_numpy(zero_copy_only=False).reshape(len(column), self.dim)

    def describe_row(self, row: int) -> str:
        """File, row group and row of row number ``row`` of this set, as text."""
        for group in self.groups:
            size = group.stop - group.start
            if row < size:
                return f"{group.uri}, row group {group.number}, row {group.start + row}"
            row -= size
        return self.uri


@contextmanager
def _named_errors(uri: str) -> Iterator[None]:
    """Turn Arrow's errors into one message with the URI."""
    with storage.explained(uri):
        try:
            yield
        except pa.ArrowException as error:
            what = str(error).strip().splitlines()[0]
            raise UserError(f"{uri} is not a valid Parquet file, or changed during the fit ({what})") from error


def _group_batches(group: RowGroupSlice, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with parquet.open_file(group.uri, READ_BYTES) as file:
        position = 0
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group.number], columns=list(names)):
            begin, end = max(group.start - position, 0), min(group.stop - position, len(batch))
            if end > begin:
                yield batch.slice(begin, end - begin)
            position += len(batch)
            if position >= group.stop:
                return


def open_embeddings(uri: str, columns: Columns) -> Embeddings:
    """The Parquet files at or below ``uri`` as one set, with its columns checked. Reads only footers and one row."""
    files = [uri]
    if not uri.endswith(".parquet") or storage.is_folder(uri):
        files = [storage.join(uri, path) for path in storage.list_files(uri) if path.endswith(".parquet")]
    if not files:
        raise UserError(f"data.uri {uri}: there are no .parquet files; give a folder of them, or one file")
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
        raise UserError(f"data.uri {uri}: its {len(files)} .parquet files have no rows")
    return replace(found, dim=_vector_dim(found))


def _footer(uri: str) -> tuple[pa.Schema, list[int]]:
    """Schema of a file and the sizes of its row groups."""
    with _named_errors(uri), parquet.open_file(uri, READ_BYTES) as file:
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
        return file.schema_arrow, sizes


def _check_schema(uri: str, schema: pa.Schema, columns: Columns) -> None:
    for role, name in columns._asdict().items():
        if name is not None and name not in schema.names:
            raise UserError(f"data.{role}_column {name}: {uri} has no such column; it has {', '.join(schema.names)}")
    for role, name, fits, expected in (
        ("id", columns.id, _is_id, "strings or integers"),
        ("weight", columns.weight, _is_number, "numbers"),
    ):
        if name is not None and not fits(schema.field(name).type):
            raise UserError(f"data.{role}_column {name} is {schema.field(name).type} in {uri}; it must hold {expected}")
    kind = schema.field(columns.vector).type
    if not (hasattr(kind, "value_type") and pa.types.is_floating(kind.value_type)):
        raise UserError(
            f"data.vector_column {columns.vector} is {kind} in {uri}; it must hold lists of float32, 64 or 16"
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
            f"{found.describe_row(0)}: column '{found.columns.vector}' is empty; remove such rows from the set"
        )
    return len(first)


def load_rows(part: Embeddings, memory_bytes: float, scratch: str | None) -> tuple[RowStore, Array | None]:
    """Checked rows of ``part``, and their weights. In memory up to ``memory_bytes``, else in an unnamed file in the folder
    ``scratch`` (by default the system's temporary folder), which disappears with the process."""
    fits = part.rows * part.dim * 4 <= memory_bytes
    store = MemoryRows(part.rows, part.dim) if fits else RowFile(part.rows, part.dim, scratch)
    weights_N = None if part.columns.weight is None else np.empty(part.rows)
    loaded = 0
    for first, rows_MD, weights_M in checked_batches(part):
        store.append(rows_MD)
        loaded = first + len(rows_MD)
        if weights_N is not None and weights_M is not None:
            weights_N[first : first + len(rows_MD)] = weights_M
    if loaded != part.rows:
        raise UserError(f"{part.uri} had {part.rows} rows and now has {loaded}; it must not change during a fit")
    return store, weights_N


def checked_batches(part: Embeddings) -> Iterator[tuple[int, Array, Array | None]]:
    """Position of the first row, rows (M, D) and weights (M,) of each batch. Raises on an invalid row or weight."""
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
            "weights must be finite and above 0"
        )
    return weights_M


class MemoryRows:
    """Rows in memory, already on the grid."""

    def __init__(self, rows: int, dim: int) -> None:
        self.shape = (rows, dim)
        self._rows_ND, self._filled = np.empty(self.shape, np.float32), 0

    def append(self, rows_MD: Array) -> None:
        """Append rows."""
        self._rows_ND[self._filled : self._filled + len(rows_MD)] = rows_MD
        self._filled += len(rows_MD)

    def __getitem__(self, index: Any) -> Array:
        return self._rows_ND[index]


class RowFile:
    """Rows in a file on the local disk; only the requested slice is in memory."""

    def __init__(self, rows: int, dim: int, scratch: str | None) -> None:
        folder = scratch or tempfile.gettempdir()
        needed, free = rows * dim * 4, shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"clustering.scratch {folder} has {free / 2**30:.1f} GiB free; {rows} rows of {dim} need "
                f"{needed / 2**30:.1f}. Choose another folder, use more actors, or raise clustering.memory_gib"
            )
        self.shape = (rows, dim)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long as this object exists

    def append(self, rows_MD: Array) -> None:
        """Append rows."""
        left = rows_MD.data.cast("B")
        while left:  # a nearly full disk writes only a part
            left = left[self._file.write(left) :]

    def __getitem__(self, index: Any) -> Array:
        start, stop, _ = index.indices(self.shape[0]) if isinstance(index, slice) else (index, index + 1, 1)
        rows_MD = np.empty((max(stop - start, 0), self.shape[1]), np.float32)
        view, done = rows_MD.reshape(-1).view(np.uint8).data, 0
        while done < len(view):  # one read returns at most 2 GiB
            read = os.preadv(self._file.fileno(), [view[done:]], start * self.shape[1] * 4 + done)
            if not read:
                raise RuntimeError(f"the row file ends before row {stop} of {self.shape[0]}")
            done += read
        return rows_MD if isinstance(index, slice) else rows_MD[0]


class StreamedRows:
    """Rows read from their Parquet files on every access; fast for ascending slices, which is how passes and draws read."""

    def __init__(self, part: Embeddings) -> None:
        self.part = part
        self.shape = (part.rows, part.dim)
        self._batches: Iterator[tuple[int, Array, Array | None]] = iter(())
        self._begun, self._first, self._batch_MD = 0, 0, np.empty((0, part.dim), np.float32)

    def __getitem__(self, index: Any) -> Array:
        start, stop, _ = index.indices(self.shape[0]) if isinstance(index, slice) else (index, index + 1, 1)
        rows_MD = np.empty((max(stop - start, 0), self.shape[1]), np.float32)
        row = start
        while row < stop:
            self._seek(row)
            taken = min(stop, self._first + len(self._batch_MD)) - row
            rows_MD[row - start : row - start + taken] = self._batch_MD[row - self._first :][:taken]
            row += taken
        return rows_MD if isinstance(index, slice) else rows_MD[0]

    def _seek(self, row: int) -> None:
        """Load the batch with row number ``row``."""
        end = self._first + len(self._batch_MD)
        if self._first <= row < end:
            return
        group_start = self._group_start(row)
        if row < end or group_start >= end:  # before the current batch, or in a later row group: restart at its group
            self._begun = group_start
            self._batches = checked_batches(self.part.slice_rows(group_start, self.part.rows))
        for first, rows_MD, _ in self._batches:
            self._first, self._batch_MD = self._begun + first, rows_MD
            if row < self._first + len(rows_MD):
                return
        raise UserError(f"{self.part.uri} has fewer rows than before; it must not change during a fit")

    def _group_start(self, row: int) -> int:
        """Number of the first row of the row group with row number ``row``."""
        start = 0
        for group in self.part.groups:
            size = group.stop - group.start
            if row < start + size:
                return start
            start += size
        return start
