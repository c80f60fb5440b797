"""Leaks between the splits of a prepared set: patients, groups, films and reports that are in two of them.

What is compared of each row is in files on the local disk, and a few million rows at a time are in memory.
"""

# N rows of the set, n rows in memory, U hashes, y hashes of the later of two splits, P pairs of hashes

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cmcgns import storage
from cmcgns.data.manifest import SPLITS
from cmcgns.data.order import study_key
from cmcgns.data.record import PREPARED_SCHEMA
from cmcgns.data.reports import as_parsed
from cmcgns.errors import UserError

MAX_BITS = 3
"""Bits by which the perceptual hashes of two copies of an image may differ, as after another encoding."""
MAX_LEVELS = 4.0
"""Mean difference in grey levels between thumbnails of two copies of an image."""
BANDS = np.arange(0, 65, 16)
"""Bits of four bands: two hashes that differ in at most three bits agree in at least one band."""
NO_REPORT = as_parsed([]).report_hash
THUMBNAIL = 16
"""Side in pixels of the thumbnail of each film."""
BYTES_A_FILM = 400
"""On disk: the thumbnail, hashes and ids of some 100 letters."""
ROWS_AT_ONCE = 2**22
"""Rows whose hashes are in memory at the same time, some 200 MB."""
PAIRS_AT_ONCE = 2**22
NAMES = (*SPLITS, "no split")
"""Of splits; the last one is that of rows whose split was changed to another word."""
IDS = ("study_id", "image_id", "patient_id", "group")
FACT_SCHEMA = pa.schema(
    [
        *(PREPARED_SCHEMA.field(name) for name in (*IDS, "split")),
        pa.field("report_hash", pa.int64()),
        pa.field("picture_hash", pa.uint64()),
        pa.field("thumbnail", pa.binary(THUMBNAIL**2)),
    ]
)
"""What the search for leaks needs of each row."""


@dataclass(frozen=True)
class Finding:
    """A problem of a prepared set."""

    kind: str
    ids: list[str]
    """Ids of the affected files, or study/film of the affected rows."""
    what: str

    @property
    def is_fault(self) -> bool:
        """Whether it fails the check; equal reports do not, because many reports of normal films are equal, nor do names and
        dates, which a set may keep on purpose."""
        return self.kind not in ("report in two splits", "identifier in report", "identifier in export")


def thumbnail(grey_HW: NDArray[np.uint8]) -> bytes:
    """The film in ``THUMBNAIL`` x ``THUMBNAIL`` pixels."""
    return cv2.resize(grey_HW, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).tobytes()


class Facts:
    """Facts of all rows in a folder, in files by column; ids are in one file for each table that was added."""

    _KINDS = {"split": "u1", "study": "<u8", "patient": "<u8", "group": "<u8", "report": "<u8", "picture": "<u8"}

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts = [0]
        """First row of each table, and the number of all rows."""
        self._files = {name: (folder / name).open("wb") for name in (*self._KINDS, "thumbnail")}

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def __len__(self) -> int:
        return self.starts[-1]

    def add(self, table: pa.Table) -> None:
        """Add rows of ``FACT_SCHEMA``."""
        keys = {
            name: [study_key(value) for value in table[name].to_pylist()]
            for name in ("study_id", "patient_id", "group")
        }
        alone = [group == patient for group, patient in zip(keys["group"], keys["patient_id"], strict=True)]
        reports = table["report_hash"].to_numpy()
        columns = {
            "split": np.array([_number(split) for split in table["split"].to_pylist()], np.uint8),
            "study": np.array(keys["study_id"], np.int64),
            "patient": np.array(keys["patient_id"], np.int64),
            # 0: nothing to compare
            "group": np.where(alone, 0, np.array(keys["group"], np.int64)),
            "report": np.where(reports == NO_REPORT, 0, reports),
            "picture": table["picture_hash"].to_numpy(),
            "thumbnail": np.frombuffer(b"".join(table["thumbnail"].to_pylist()), np.uint8),
        }
        for name, values in columns.items():
            self._files[name].write(values.tobytes())
            self._files[name].flush()
        with pa.ipc.new_file(str(self._ids(len(self.starts) - 1)), table.select(IDS).schema) as out:
            out.write_table(table.select(IDS))
        self.starts.append(len(self) + len(table))

    def column(self, name: str) -> NDArray[Any]:
        """A column of all rows, on disk."""
        return np.memmap(self.folder / name, self._KINDS[name], "r") if len(self) else np.zeros(0, self._KINDS[name])

    def thumbnails(self, row_n: NDArray[np.int64]) -> NDArray[np.float32]:
        """The thumbnails of some rows."""
        every = np.memmap(self.folder / "thumbnail", np.uint8, "r").reshape(-1, THUMBNAIL**2)
        return every[row_n].astype(np.float32)

    def ids(self, row: int, name: str) -> str:
        """The id ``name`` of a row."""
        number = int(np.searchsorted(self.starts, row, "right")) - 1
        with pa.memory_map(str(self._ids(number))) as source:
            return str(pa.ipc.open_file(source).read_all()[name][row - self.starts[number]].as_py())

    def place(self, row: int) -> str:
        """Study and film of a row."""
        return f"{self.ids(row, 'study_id')}/{self.ids(row, 'image_id')}"

    def distinct(self, name: str) -> int:
        """Number of different values of a column."""
        return sum(len(np.unique(self.column(name)[row_n])) for row_n in self.parts(name, 0, 64))

    def parts(self, name: str, low: int, high: int) -> Iterator[NDArray[np.int64]]:
        """All rows by parts, ascending; those that agree in the bits ``low`` to ``high`` of a column are in the same part."""
        count = -(-len(self) // ROWS_AT_ONCE)
        for part in range(count):
            found = [np.zeros(0, np.int64)]
            for first in range(0, len(self), ROWS_AT_ONCE):
                values = bits(self.column(name)[first : first + ROWS_AT_ONCE], low, high)
                # mixed: the bands of pictures are not spread evenly
                found.append(
                    first + np.flatnonzero((values * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) % count == part)
                )
            yield np.concatenate(found)

    def _ids(self, number: int) -> Path:
        return self.folder / f"ids-{number}.arrow"


def _number(split: str) -> int:
    return NAMES.index(split) if split in SPLITS else len(SPLITS)


@contextmanager
def facts_on_disk(rows: int) -> Iterator[Facts]:
    """Room for the facts of ``rows`` films, in a temporary folder.

    Raises:
        UserError: the disk has less.
    """
    needed, free = rows * BYTES_A_FILM, shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise UserError(
            f"--check of {rows:,} films needs {needed / 2**30:.1f} GiB in {tempfile.gettempdir()}, and {free / 2**30:.1f} GiB "
            "are free; set TMPDIR to a folder with more"
        )
    with storage.scratch_folder() as folder:
        facts = Facts(folder)
        try:
            yield facts
        finally:
            facts.close()


def bits(values: NDArray[Any], low: int, high: int) -> NDArray[np.uint64]:
    """The bits ``low`` to ``high`` of each value."""
    return (values.view(np.uint64) >> np.uint64(low)) & np.uint64(2 ** int(high - low) - 1)


def leaks(facts: Facts) -> list[Finding]:
    """Every patient, group, film and report that is in two splits."""
    return [
        *_shared(facts, "patient", "patient_id"),
        *_shared(facts, "group", "group"),
        *_shared_films(facts),
        *_shared(facts, "report", ""),
    ]


def _shared(facts: Facts, column: str, named_by: str) -> list[Finding]:
    """A finding for each value of ``column`` that is in several splits, with the first row of each, by row."""
    split_N, found = facts.column("split"), list[tuple[int, Finding]]()
    for row_n in facts.parts(column, 0, 64):
        key_n = facts.column(column)[row_n]
        row_n, key_n = row_n[key_n != 0], key_n[key_n != 0]
        for run_n in _runs_in_two_splits(row_n, key_n, split_N[row_n]):
            first = np.unique(split_N[run_n], return_index=True)[1]
            rows = sorted(int(run_n[index]) for index in first)
            if named_by and len({facts.ids(row, named_by) for row in rows}) > 1:
                continue  # two ids with the same hash
            name = f"{column} {facts.ids(rows[0], named_by)} " if named_by else ""
            where = " and ".join(NAMES[split_N[row]] for row in rows)
            what = f"{name}in {where} ({len(run_n)} films)"
            found.append((rows[0], Finding(f"{column} in two splits", [facts.place(row) for row in rows], what)))
    return [finding for _, finding in sorted(found, key=lambda each: each[0])]


def _runs_in_two_splits(
    row_n: NDArray[np.int64], key_n: NDArray[np.uint64], split_n: NDArray[np.uint8]
) -> Iterator[NDArray[np.int64]]:
    """The rows of each key that is in more than one split."""
    if not len(row_n):
        return
    order = np.argsort(key_n, kind="stable")
    row_n, split_n = row_n[order], split_n[order]
    starts = np.flatnonzero(np.concatenate([[True], np.diff(key_n[order]) != 0]))
    several = np.minimum.reduceat(split_n, starts) != np.maximum.reduceat(split_n, starts)
    ends = np.append(starts[1:], len(row_n))
    for run in np.flatnonzero(several):
        yield row_n[starts[run] : ends[run]]


def _shared_films(facts: Facts) -> list[Finding]:
    """A finding for each film and the first one of another split that shows the same image, by row."""
    split_N, first = facts.column("split"), dict[tuple[int, int], int]()
    for band in pairwise(BANDS.tolist()):
        for row_n in facts.parts("picture", *band):
            for one, other in _same_films(facts, row_n, band):
                key = int(split_N[one]), other
                first[key] = min(one, first.get(key, one))
    pairs = sorted((one, other) for (_, other), one in first.items())
    return [
        Finding(
            "film in two splits",
            [facts.place(one), facts.place(other)],
            f"are the same image, in {SPLITS[split_N[one]]} and {SPLITS[split_N[other]]}",
        )
        for one, other in pairs
    ]


def _same_films(facts: Facts, row_n: NDArray[np.int64], band: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Of rows that may agree in a band: those that show the image of one of an earlier split, each with the first such."""
    split_n, hash_n = facts.column("split")[row_n], facts.column("picture")[row_n]
    by_split = [Hashes.of(row_n[split_n == split], hash_n[split_n == split], band) for split in range(len(SPLITS))]
    for before, after in combinations(by_split, 2):
        for x, y in _near(before, after, band):
            yield from _same_thumbnails(facts, before.rows(x), after.rows(y))


@dataclass(frozen=True)
class Hashes:
    """The different hashes U of the pictures in some rows, by their bits in a band."""

    hash_U: NDArray[np.uint64]
    band_U: NDArray[np.uint64]
    starts: NDArray[np.int64]
    row_n: NDArray[np.int64]
    """The rows of each hash from its start on, ascending."""

    @classmethod
    def of(cls, row_n: NDArray[np.int64], hash_n: NDArray[np.uint64], band: tuple[int, int]) -> "Hashes":
        """The hashes ``hash_n`` of the rows ``row_n``."""
        order = np.lexsort((hash_n, bits(hash_n, *band)))
        hash_n = hash_n[order]
        first = np.flatnonzero(np.concatenate([[True], np.diff(hash_n) != 0])) if len(hash_n) else np.zeros(0, np.int64)
        return cls(hash_n[first], bits(hash_n[first], *band), np.append(first, len(hash_n)), row_n[order])

    def rows(self, number: int) -> NDArray[np.int64]:
        """The rows with a hash."""
        return self.row_n[self.starts[number] : self.starts[number + 1]]


def _near(before: Hashes, after: Hashes, band: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Pairs of hashes that differ in at most ``MAX_BITS`` bits; not those that an earlier band than ``band`` has found."""
    low_y, end_y = (before.band_U.searchsorted(after.band_U, side) for side in ("left", "right"))
    total_y = np.cumsum(end_y - low_y)
    start = 0
    while start < len(total_y):
        done = total_y[start - 1] if start else 0
        stop = max(int(total_y.searchsorted(done + PAIRS_AT_ONCE, "right")), start + 1)
        count_y = (end_y - low_y)[start:stop]
        y_P = np.repeat(np.arange(start, stop), count_y)
        x_P = np.arange(len(y_P)) + np.repeat(low_y[start:stop] - (np.cumsum(count_y) - count_y), count_y)
        differs_P = before.hash_U[x_P] ^ after.hash_U[y_P]
        is_near_P = np.bitwise_count(differs_P) <= MAX_BITS
        for edges in pairwise(BANDS.tolist()):
            if edges < band:
                is_near_P &= bits(differs_P, *edges) != 0
        yield from zip(x_P[is_near_P].tolist(), y_P[is_near_P].tolist(), strict=True)
        start = stop


def _same_thumbnails(facts: Facts, row_x: NDArray[np.int64], row_y: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Each of ``row_y`` that looks like one of ``row_x``, with the first such."""
    levels_y = facts.thumbnails(row_y)
    for one in row_x.tolist():
        same = np.abs(facts.thumbnails(np.array([one])) - levels_y).mean(axis=1) <= MAX_LEVELS
        yield from ((one, other) for other in row_y[same].tolist())
        row_y, levels_y = row_y[~same], levels_y[~same]
        if not len(row_y):
            return
