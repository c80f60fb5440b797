"""``parquet``: a set that `jobs/prepare.py` has made, read by row group."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cmcgns import storage
from cmcgns.data.image import Film, Frame
from cmcgns.data.manifest import Manifest, read_manifest
from cmcgns.data.order import Arrangement, study_keys
from cmcgns.data.readers.base import DEFAULT_VIEWS, filter_views, study_table
from cmcgns.data.record import StudyIndex
from cmcgns.data.reports import ParsedReport, as_parsed
from cmcgns.errors import BadRow, UserError

INDEX_COLUMNS = ("patient_id", "study_id", "group", "image_id", "view", "split", "labels")
READ_THREADS = 16


@dataclass(frozen=True)
class PreparedSource:
    """The shards under ``uri``. A film's path is ``SHARD#ROW_GROUP/ROW``."""

    in_groups: ClassVar[bool] = True

    uri: str
    views: tuple[str, ...] = DEFAULT_VIEWS
    format: str = "parquet"

    def index(self) -> StudyIndex:
        manifest = _manifest(self.uri)
        with ThreadPoolExecutor(READ_THREADS) as threads:
            parts = list(threads.map(lambda shard: _index_of(self.uri, shard.name, shard.rows), manifest.shards))
        rows = pa.concat_tables(parts) if parts else None
        if rows is None or not len(rows):
            raise UserError(f"{self.uri} is a prepared set without a row; see its bad_rows.jsonl")
        films = rows.drop_columns(["labels"]).to_pandas()
        films, filtered = filter_views(films, self.views)
        films = films.assign(report=None, report_path=films["path"])
        table = study_table(films)
        first_rows = films.index[~films["study_id"].duplicated().to_numpy()]
        labels = rows["labels"].combine_chunks().take(pa.array(first_rows))
        return StudyIndex(
            table=table.set_column(table.schema.get_field_index("labels"), "labels", labels), filtered=filtered
        )

    def arrange(self, studies: pa.Table, group_studies: int) -> tuple[pa.Table, Arrangement]:
        """As the set lies; its groups were cut when it was prepared."""
        manifest = _manifest(self.uri)
        number = {
            f"{shard.name}#{place}": group.group
            for shard in manifest.shards
            for place, group in enumerate(shard.row_groups)
        }
        first_films = pc.struct_field(pc.list_element(studies["films"].combine_chunks(), 0), "path")
        group_S = np.array([number[_row_group_of(path)] for path in first_films.to_pylist()], np.int32)
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

    waits: ClassVar[bool] = False

    groups: dict[str, pa.Table | BadRow] = field(repr=False)

    def read_film(self, path: str) -> Film:
        """The film as it was prepared."""
        grey_HW = decode_prepared(self.value(path, "image"))
        if grey_HW is None:
            raise BadRow("prepared film is broken")
        return Film(grey_HW, Frame(0, 0, grey_HW.shape[1], grey_HW.shape[0]))

    def read_sentences(self, study: dict[str, Any], path: str) -> ParsedReport:
        """The report as it was parsed when the set was prepared."""
        return as_parsed(self.value(path, "sentences"))

    def value(self, path: str, column: str) -> Any:
        """One value of the row at ``path``; ``BadRow`` where its shard could not be read."""
        group = self.groups[_row_group_of(path)]
        if isinstance(group, BadRow):
            raise group
        return group[column][int(path.rpartition("/")[2])].as_py()


def decode_prepared(image: bytes) -> NDArray[np.uint8] | None:
    """The film of a row, 8-bit grey; None where it is broken."""
    try:
        grey_HW = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # not a byte, or of an impossible size
        return None
    sound = grey_HW is not None and grey_HW.ndim == 2 and grey_HW.dtype == np.uint8
    return np.asarray(grey_HW) if sound else None


def _row_group_of(path: str) -> str:
    """``SHARD#ROW_GROUP`` of a film's path."""
    return path.rpartition("/")[0]


@functools.lru_cache(maxsize=4)
def _manifest(uri: str) -> Manifest:
    return read_manifest(uri)


@functools.lru_cache(maxsize=1024)
def _footer(uri: str, shard: str) -> pq.FileMetaData:
    return storage.read_parquet(storage.join(uri, shard), lambda file: file.metadata)


def _index_of(uri: str, shard: str, rows: int) -> pa.Table:
    """Ids and labels of a shard's rows, and their paths; ``UserError`` where they are not as many as the manifest says."""
    footer = _footer(uri, shard)
    found = storage.read_parquet(storage.join(uri, shard), lambda file: file.read(list(INDEX_COLUMNS)), footer)
    if len(found) != rows:
        raise UserError(
            f"{storage.join(uri, shard)} holds {len(found)} rows, the manifest says {rows}; prepare the set again"
        )
    paths = [
        f"{shard}#{group}/{row}"
        for group in range(footer.num_row_groups)
        for row in range(footer.row_group(group).num_rows)
    ]
    return found.append_column("path", pa.array(paths, pa.string()))


def _read_groups(uri: str, paths: Sequence[str], columns: tuple[str, ...]) -> dict[str, pa.Table | BadRow]:
    """The row groups that ``paths`` lie in; what cannot be read is a ``BadRow`` for each of its rows."""
    wanted = sorted({_row_group_of(path) for path in paths})
    with ThreadPoolExecutor(min(len(wanted), READ_THREADS) or 1) as threads:
        return dict(zip(wanted, threads.map(lambda name: _read_group(uri, name, columns), wanted), strict=True))


def _read_group(uri: str, name: str, columns: tuple[str, ...]) -> pa.Table | BadRow:
    shard, _, number = name.rpartition("#")
    try:
        footer = _footer(uri, shard)
        place = storage.join(uri, shard)
        table = storage.read_parquet(place, lambda file: file.read_row_group(int(number), list(columns)), footer)
        return table.combine_chunks()
    except storage.MissingFileError:
        return BadRow(f"shard {shard} is missing")
    except storage.ForbiddenFileError:
        return BadRow(f"shard {shard} may not be read")
    except storage.BrokenFileError:
        return BadRow(f"shard {shard} is truncated or broken")
