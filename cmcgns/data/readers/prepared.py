"""``parquet``: a set made by `jobs/prepare.py`, read by row group."""

import functools
import logging
from collections.abc import Mapping, Sequence
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

    @property
    def studies(self) -> int:
        """Studies of the set, of all views."""
        return _manifest(self.uri).studies

    def open_manifest(self) -> Manifest:
        """The manifest; ``UserError`` if the set has no reports and some are needed."""
        manifest = _manifest(self.uri)
        if manifest.version == 1:
            logger.warning(
                "%s was prepared by an earlier version: its films and reports are not verified as they are read. Check it "
                "with python jobs/prepare.py --prepare.out=%s --prepare.check=true, or prepare it again",
                self.uri, self.uri,
            )  # fmt: skip
        if self.reports and not manifest.has_reports:
            raise UserError(f"{self.uri} was prepared without reports; for films alone set data.reports=false")
        if not manifest.studies:
            raise UserError(f"{self.uri} is a prepared set without rows; see its bad_rows.jsonl and prepare again")
        return manifest

    def index(self) -> StudyIndex:
        manifest = self.open_manifest()
        with ThreadPoolExecutor(READ_THREADS) as threads:
            parts = list(threads.map(lambda shard: _index_rows(self.uri, shard), manifest.shards))
        rows = pa.concat_tables(parts)
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


def changed_column(rows: pa.Table, hashes: Mapping[str, str]) -> str | None:
    """The first column of a row group whose hash is not the one in ``hashes``."""
    return next(
        (name for name in rows.column_names if name in hashes and column_hash(rows[name]) != hashes[name]), None
    )


def _index_rows(uri: str, entry: Shard) -> pa.Table:
    """``PREPARED_INDEX`` and the path of each row of a shard; ``UserError`` unless it is what the manifest says."""
    shard = entry.name
    check_sizes(uri, shard, [group.rows for group in entry.row_groups])
    footer = _footer(uri, shard)
    table = parquet.read(storage.join(uri, shard), lambda file: file.read(list(PREPARED_INDEX)), footer=footer)
    first, paths = 0, list[str]()
    for number, group in enumerate(entry.row_groups):
        name = f"{shard}#{number}"
        check_index(uri, name, table.slice(first, group.rows), _column_hashes(uri)[name])
        paths += paths_in(name, group.rows)
        first += group.rows
    return table.append_column("path", pa.array(paths, pa.string()))


def paths_in(row_group: str, rows: int) -> list[str]:
    """The path of each film of ``row_group``, which is ``SHARD#ROW_GROUP``."""
    return [f"{row_group}/{row}" for row in range(rows)]


def check_sizes(uri: str, shard: str, expected: Sequence[int]) -> None:
    """Raise ``UserError`` unless the row groups of ``shard`` have the rows ``expected``."""
    footer = _footer(uri, shard)
    sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    if sizes != list(expected):
        raise UserError(
            f"{storage.join(uri, shard)} has {sum(sizes)} rows in {len(sizes)} row groups, the manifest says {sum(expected)} in "
            f"{len(expected)}; prepare the set again"
        )


def check_index(uri: str, row_group: str, rows: pa.Table, hashes: Mapping[str, str]) -> None:
    """Raise ``UserError`` unless the index columns ``rows`` are what the manifest says."""
    changed, (shard, _, number) = changed_column(rows, hashes), row_group.rpartition("#")
    if changed:
        raise UserError(
            f"{storage.join(uri, shard)}: column {changed} of row group {number} is not what the manifest says; restore the "
            "shard, or prepare the set again"
        )


def _read_groups(uri: str, paths: Sequence[str], columns: tuple[str, ...]) -> dict[str, pa.Table | BadRow]:
    """The row groups of ``paths`` by name; a ``BadRow`` in place of one that cannot be read."""
    names = sorted({_row_group_of(path) for path in paths})

    def read(name: str) -> pa.Table | BadRow:
        table = read_columns(uri, name, columns)
        return table if isinstance(table, BadRow) else checked_content(name, table, _column_hashes(uri)[name])

    with ThreadPoolExecutor(min(len(names), READ_THREADS) or 1) as threads:
        return dict(zip(names, threads.map(read, names), strict=True))


def read_columns(uri: str, row_group: str, columns: tuple[str, ...]) -> pa.Table | BadRow:
    """These columns of ``row_group``, not verified yet; a ``BadRow`` if they cannot be read."""
    shard, _, number = row_group.rpartition("#")
    try:
        footer = _footer(uri, shard)
        path = storage.join(uri, shard)
        return parquet.read(path, lambda file: file.read_row_group(int(number), list(columns)), footer=footer)
    except storage.MissingFileError:
        return BadRow(f"shard {shard} is missing")
    except storage.ForbiddenFileError:
        return BadRow(f"access to shard {shard} is denied")
    except storage.BrokenFileError:
        return BadRow(f"shard {shard} is truncated or broken")


def checked_content(row_group: str, rows: pa.Table, hashes: Mapping[str, str]) -> pa.Table | BadRow:
    """``rows`` in one piece; a ``BadRow`` if they are not what was prepared."""
    changed, shard = changed_column(rows, hashes), row_group.rpartition("#")[0]
    return BadRow(f"column {changed} of shard {shard} is not what was prepared") if changed else rows.combine_chunks()


def open_corpus(options: CorpusOptions) -> PreparedSource:
    """The reader of ``parquet``, a prepared set."""
    return PreparedSource(options.uri, options.views, reports=options.reports)
