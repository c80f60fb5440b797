"""``parquet``: a set made by `jobs/prepare.py`, read by row group."""

import functools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cmcgns import storage
from cmcgns.data.image import CroppedImage, Frame
from cmcgns.data.manifest import Manifest, Shard, column_hash, read_manifest
from cmcgns.data.order import Arrangement, study_keys
from cmcgns.data.readers.base import DEFAULT_VIEWS, CorpusOptions, filter_views
from cmcgns.data.record import PREPARED_INDEX, PREPARED_SCHEMA, StudyIndex, first_films, index_of_prepared
from cmcgns.data.reports import ParsedReport, as_parsed
from cmcgns.errors import BadRow, UserError
from cmcgns.storage import parquet

logger = logging.getLogger(__name__)
READ_THREADS = 16


@dataclass(frozen=True)
class PreparedSource:
    """The shards in the folder ``uri``. The path of a film is ``SHARD#ROW_GROUP/ROW``."""

    in_groups: ClassVar[bool] = True

    uri: str
    views: tuple[str, ...] = DEFAULT_VIEWS
    format: str = "parquet"
    reports: bool = True
    """Studies have reports, which a set may lack."""

    @property
    def content_hash(self) -> str:
        """Hash of the set's content, which a run records."""
        return _manifest(self.uri).content_hash

    def index(self) -> StudyIndex:
        manifest = _manifest(self.uri)
        if manifest.version == 1:
            logger.warning(
                "%s was prepared by an earlier version: its films and reports are not verified as they are read. Check it "
                "with python jobs/prepare.py --prepare.out=%s --prepare.check=true, or prepare it again",
                self.uri, self.uri,
            )  # fmt: skip
        if self.reports and not manifest.has_reports:
            raise UserError(f"{self.uri} was prepared without reports; for films alone set data.reports=false")
        with ThreadPoolExecutor(READ_THREADS) as threads:
            parts = list(threads.map(lambda shard: _index_rows(self.uri, shard), manifest.shards))
        rows = pa.concat_tables(parts) if parts else None
        if rows is None or not len(rows):
            raise UserError(f"{self.uri} is a prepared set without rows; see its bad_rows.jsonl and prepare again")
        films, filtered = filter_views(rows.drop_columns(["labels"]).to_pandas(), self.views)
        return StudyIndex(table=index_of_prepared(films, rows["labels"]), filtered=filtered)

    def arrange(self, studies: pa.Table, group_studies: int) -> tuple[pa.Table, Arrangement]:
        """The order and the groups of the set, fixed when it was prepared."""
        manifest = _manifest(self.uri)
        number = {
            f"{shard.name}#{i}": row_group.group
            for shard in manifest.shards
            for i, row_group in enumerate(shard.row_groups)
        }
        paths = first_films(studies)["path"].to_pylist()
        group_S = np.array([number[_row_group_of(path)] for path in paths], np.int32)
        splits = set(studies["split"].unique().to_pylist())
        groups = manifest.groups[splits.pop()] if len(splits) == 1 else 0
        return studies, Arrangement(study_keys(studies), group_S, groups)

    def reader(self, paths: Sequence[str], films: bool = True) -> "RowGroups":
        return RowGroups(_read_groups(self.uri, paths, ("image", "sentences") if films else ("sentences",)))

    def read_report(self, study: dict[str, Any]) -> str:
        path = study["report_path"]
        return str(RowGroups(_read_groups(self.uri, [path], ("report",))).value(path, "report"))


@dataclass(frozen=True)
class RowGroups:
    """Row groups of a prepared set in memory."""

    io_bound: ClassVar[bool] = False

    groups: dict[str, pa.Table | BadRow] = field(repr=False)

    def read_image(self, path: str) -> CroppedImage:
        """The prepared film."""
        grey_HW = decode_prepared(self.value(path, "image"))
        if grey_HW is None:
            raise BadRow("prepared film is broken")
        return CroppedImage(grey_HW, Frame(0, 0, grey_HW.shape[1], grey_HW.shape[0]))

    def read_sentences(self, study: dict[str, Any], path: str) -> ParsedReport:
        """The report, parsed when the set was prepared."""
        return as_parsed(self.value(path, "sentences"))

    def value(self, path: str, column: str) -> Any:
        """One value of the row at ``path``; ``BadRow`` if its shard cannot be read."""
        group = self.groups[_row_group_of(path)]
        if isinstance(group, BadRow):
            raise group
        return group[column][int(path.rpartition("/")[2])].as_py()


def decode_prepared(image: bytes) -> NDArray[np.uint8] | None:
    """The film of a row, 8-bit grey; None if it is broken."""
    try:
        grey_HW = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # empty, or an impossible size
        return None
    valid = grey_HW is not None and grey_HW.ndim == 2 and grey_HW.dtype == np.uint8
    return np.asarray(grey_HW) if valid else None


def _row_group_of(path: str) -> str:
    """``SHARD#ROW_GROUP`` of the path of a film."""
    return path.rpartition("/")[0]


@functools.lru_cache(maxsize=4)
def _manifest(uri: str) -> Manifest:
    return read_manifest(uri)


@functools.lru_cache(maxsize=1024)
def _footer(uri: str, shard: str) -> pq.FileMetaData:
    return parquet.read(storage.join(uri, shard), lambda file: file.metadata, PREPARED_SCHEMA)


@functools.lru_cache(maxsize=4)
def _column_hashes(uri: str) -> dict[str, dict[str, str]]:
    """The manifest's hashes of columns of each ``SHARD#ROW_GROUP``."""
    shards = _manifest(uri).shards
    return {f"{shard.name}#{i}": group.columns for shard in shards for i, group in enumerate(shard.row_groups)}


def changed_column(uri: str, row_group: str, rows: pa.Table) -> str | None:
    """The first column of ``rows``, which were read from ``row_group``, that is not what the manifest says."""
    hashes = _column_hashes(uri)[row_group]
    return next(
        (name for name in rows.column_names if name in hashes and column_hash(rows[name]) != hashes[name]), None
    )


def _index_rows(uri: str, entry: Shard) -> pa.Table:
    """``PREPARED_INDEX`` and the path of each row of a shard; ``UserError`` unless it is what the manifest says."""
    shard, rows = entry.name, entry.rows
    footer = _footer(uri, shard)
    table = parquet.read(storage.join(uri, shard), lambda file: file.read(list(PREPARED_INDEX)), footer=footer)
    sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    if sizes != [group.rows for group in entry.row_groups]:
        raise UserError(
            f"{storage.join(uri, shard)} has {len(table)} rows in {len(sizes)} row groups, the manifest says {rows} in "
            f"{len(entry.row_groups)}; prepare the set again"
        )
    first = 0
    for number, group in enumerate(entry.row_groups):
        changed = changed_column(uri, f"{shard}#{number}", table.slice(first, group.rows))
        if changed:
            raise UserError(
                f"{storage.join(uri, shard)}: column {changed} of row group {number} is not what the manifest says; restore the "
                "shard, or prepare the set again"
            )
        first += group.rows
    paths = [f"{shard}#{group}/{row}" for group, size in enumerate(sizes) for row in range(size)]
    return table.append_column("path", pa.array(paths, pa.string()))


def _read_groups(uri: str, paths: Sequence[str], columns: tuple[str, ...]) -> dict[str, pa.Table | BadRow]:
    """The row groups of ``paths`` by name; a ``BadRow`` in place of one that cannot be read."""
    names = sorted({_row_group_of(path) for path in paths})
    with ThreadPoolExecutor(min(len(names), READ_THREADS) or 1) as threads:
        return dict(zip(names, threads.map(lambda name: _read_group(uri, name, columns), names), strict=True))


def _read_group(uri: str, name: str, columns: tuple[str, ...]) -> pa.Table | BadRow:
    shard, _, number = name.rpartition("#")
    try:
        footer = _footer(uri, shard)
        path = storage.join(uri, shard)
        table = parquet.read(path, lambda file: file.read_row_group(int(number), list(columns)), footer=footer)
    except storage.MissingFileError:
        return BadRow(f"shard {shard} is missing")
    except storage.ForbiddenFileError:
        return BadRow(f"access to shard {shard} is denied")
    except storage.BrokenFileError:
        return BadRow(f"shard {shard} is truncated or broken")
    changed = changed_column(uri, name, table)
    return BadRow(f"column {changed} of shard {shard} is not what was prepared") if changed else table.combine_chunks()


def open_corpus(options: CorpusOptions) -> PreparedSource:
    """The reader of ``parquet``, a prepared set."""
    return PreparedSource(options.uri, options.views, reports=options.reports)
