"""What every corpus of files shares: safe paths, views, splits, and the table they are gathered in."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa

from cmcgns import storage
from cmcgns.data.decode import decode_scan
from cmcgns.data.image import Film, Target, whole, without_borders
from cmcgns.data.order import Arrangement, arranged
from cmcgns.data.record import INDEX_SCHEMA, StudyIndex
from cmcgns.data.reports import ParsedReport, parse_report
from cmcgns.errors import BadRow, UserError

log = logging.getLogger(__name__)
DEFAULT_VIEWS = ("PA", "AP")
UNKNOWN_VIEWS = frozenset({"", "?", "UNKNOWN", "NAN", "NONE", "NA", "N/A"})
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "valid": "valid", "val": "valid", "validate": "valid", "validation": "valid",
    "test": "test", "testing": "test",
}  # fmt: skip

LONGEST_PATH = 1024
"""Bytes of a key of S3."""
NAMED_VIEWS = frozenset({
    "AP", "AXIAL", "COSTAL", "DECUB", "DECUBITUS", "ERECT", "EXCLUDE", "FRONTAL", "HORIZONTAL", "L", "LAO", "LAT", "LATERAL",
    "LEFT", "LL", "LLD", "LPO", "OBLIQUE", "PA", "PEDIATRIC", "PORTABLE", "R", "RAO", "RIGHT", "RL", "RLD", "RPO", "SUPINE",
    "SWIMMERS", "UPRIGHT", "XTABLE",
})  # fmt: skip
"""Words of views that are told on the terminal; any other may be a report's, where a table's columns have slipped."""
SPLIT_SHARES = (("train", 0.8), ("valid", 0.9), ("test", 1.0))  # upper ends


class Reader(Protocol):
    """Reads the films and reports of some studies, one at a time."""

    waits: ClassVar[bool]
    """Whether each read waits for storage, so that several at a time are faster."""

    def read_film(self, path: str) -> Film:
        """The film without its black borders; ``BadRow`` with the reason where it cannot be used."""
        ...

    def read_sentences(self, study: dict[str, Any], path: str) -> ParsedReport:
        """The report, as the model reads it, of a row of the index that shows the film at ``path``; ``BadRow`` where it is
        too short."""
        ...


class Source(Protocol):
    """A corpus. Picklable: it travels into Ray tasks and opens its files there."""

    in_groups: ClassVar[bool]
    """Whether it is read fastest by whole groups of its arrangement."""

    @property
    def uri(self) -> str: ...

    @property
    def format(self) -> str: ...

    def index(self) -> StudyIndex:
        """Every study of the corpus, in its own fixed order."""
        ...

    def arrange(self, studies: pa.Table, group_studies: int) -> tuple[pa.Table, Arrangement]:
        """The studies of a split in the order in which they lie for training, and their groups."""
        ...

    def reader(self, paths: Sequence[str], films: bool = True) -> Reader:
        """What reads the films at ``paths`` and the reports of their studies; the reports alone without ``films``."""
        ...

    def read_report(self, study: dict[str, Any]) -> str:
        """The report's text of a row of the index."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A corpus of films and texts under one folder."""

    in_groups: ClassVar[bool] = False
    waits: ClassVar[bool] = True

    uri: str
    format: str
    views: tuple[str, ...] = DEFAULT_VIEWS
    seed: int = 0
    target: Target | None = None
    """What films will be shrunk to."""
    crop_borders: bool = True

    def arrange(self, studies: pa.Table, group_studies: int) -> tuple[pa.Table, Arrangement]:
        return arranged(studies, group_studies)

    def reader(self, paths: Sequence[str], films: bool = True) -> Reader:
        return self

    def read_film(self, path: str) -> Film:
        scan = decode_scan(self._read(path, "film"), path, self.target)
        return without_borders(scan) if self.crop_borders else whole(scan)

    def read_sentences(self, study: dict[str, Any], path: str) -> ParsedReport:
        return parse_report(self.read_report(study))

    def read_report(self, study: dict[str, Any]) -> str:
        if study.get("report") is not None:
            return str(study["report"])
        if not study.get("report_path"):
            raise BadRow("study has no report")
        return decode_text(self._read(study["report_path"], "report"))

    def _read(self, path: str, what: str) -> bytes:
        if escapes(path):
            raise BadRow(f"{what} path leaves the corpus's folder")
        if len(path.encode()) > LONGEST_PATH:
            raise BadRow(f"{what} path is longer than any file's name")
        try:
            return storage.read_bytes(storage.join(self.uri, path))
        except storage.MissingFileError:
            raise BadRow(f"{what} file is missing") from None
        except storage.ForbiddenFileError:
            raise BadRow(f"{what} file may not be read") from None
        except storage.BrokenFileError:
            raise BadRow(f"{what} file is a symbolic link that leads in a circle") from None


def decode_text(data: bytes) -> str:
    """``data`` as text: UTF-8, with or without byte order mark, else Latin-1."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def escapes(path: str) -> bool:
    """Whether ``path`` is absolute, climbs out of the folder it is relative to, or can be no path."""
    parts = path.replace("\\", "/").split("/")
    return (
        ".." in parts
        or "\0" in path
        or path.startswith(("/", "\\", "~"))
        or re.match(r"[A-Za-z][\w+.-]*:", path) is not None
    )


def canonical_view(view: str) -> str:
    """PA, AP (with 'AP Supine', 'AP Erect', ...), '' when unknown, else the name in capitals."""
    name = " ".join(view.upper().replace("_", " ").split())
    if name in UNKNOWN_VIEWS:
        return ""
    if re.match(r"POSTERO ?-?ANTERIOR\b", name):
        return "PA"
    if re.match(r"ANTERO ?-?POSTERIOR\b", name):
        return "AP"
    first = re.split(r"[ -]", name)[0]
    return first if first in ("PA", "AP") else name


def filter_views(
    films: pd.DataFrame, views: Sequence[str], keep_unknown: bool = True
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The films of ``views`` (and those of unknown view), and how many were left out by reason."""
    spellings = {view: canonical_view(view) for view in films["view"].unique()}
    view = films["view"].map(spellings)
    wanted = {canonical_view(name) for name in views} - {""}
    if wanted & {"PA", "AP"}:
        wanted.add("FRONTAL")
    if keep_unknown:
        wanted.add("")
    kept = view.isin(list(wanted))
    filtered: Counter[str] = Counter()
    for name, count in view[~kept].value_counts().items():
        filtered[_named(str(name))] += count
    return films.assign(view=view)[kept], dict(sorted(filtered.items()))


def _named(view: str) -> str:
    """What is said of a view that is left out."""
    if not view:
        return "view unknown"
    return f"view {view}" if NAMED_VIEWS.issuperset(re.split(r"[ -]+", view)) else "view of another name"


def read_table(uri: str) -> pd.DataFrame:
    """A CSV (or .csv.gz) as strings, blanks as ''; what cannot be read is a ``UserError`` with the way out."""
    import gzip
    import io

    data = storage.read_bytes(uri)
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise UserError(f"{uri} is a broken gzip file ({error}); fetch it again") from None
    if b"\0" in data[:65536]:
        raise UserError(f"{uri} is not text (it holds zero bytes); save it as CSV in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        log.warning("%s is not UTF-8; it is read as Latin-1", uri.rsplit("/", 1)[-1])
        text = data.decode("latin-1")
    try:
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, skipinitialspace=True, index_col=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        raise UserError(f"{uri} is no readable CSV: {str(error).strip()}") from None
    table.columns = [str(name).strip() for name in table.columns]
    return table


def place_of(seed: int, group: str) -> float:
    """Where ``group`` lies between 0 and 1 when splits are drawn: a function of seed and group alone."""
    digest = hashlib.blake2b(f"split|{seed}|{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def draw_split(seed: int, group: str) -> str:
    """train, valid or test (80/10/10), a function of seed and group alone."""
    place = place_of(seed, group)
    return next(name for name, end in SPLIT_SHARES if place < end or end == 1.0)


def draw_splits(seed: int, groups: pd.Series) -> pd.Series:
    """The drawn split of each row's group."""
    return groups.map({group: draw_split(seed, group) for group in groups.unique()})


def study_table(films: pd.DataFrame, labels: pd.DataFrame | None = None) -> pa.Table:
    """``INDEX_SCHEMA`` of a frame with one row a film, in the order in which studies first appear.

    Columns: study_id, patient_id, group, split, image_id, path, view, report, report_path. What belongs to the
    study is taken from its first film, and so are its rows of ``labels`` (same index as ``films``, NaN for blank).
    """
    code, _ = pd.factorize(films["study_id"])
    order = np.argsort(code, kind="stable")
    films = films.iloc[order]
    counts = np.bincount(code) if len(code) else np.zeros(0, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    first = films.iloc[offsets[:-1]]
    columns: dict[str, pa.Array] = {
        name: _strings(first[name]) for name in ("study_id", "patient_id", "group", "split", "report", "report_path")
    }
    film_fields = [_strings(films[name]) for name in ("image_id", "path", "view")]
    film_type = INDEX_SCHEMA.field("films").type.value_type
    structs = pa.StructArray.from_arrays(film_fields, fields=list(film_type))
    columns["films"] = pa.ListArray.from_arrays(pa.array(offsets), structs, type=INDEX_SCHEMA.field("films").type)
    columns["labels"] = _label_maps(None if labels is None else labels.loc[first.index], len(first))
    return pa.Table.from_arrays([columns[name] for name in INDEX_SCHEMA.names], schema=INDEX_SCHEMA)


def _strings(values: pd.Series) -> pa.Array:
    """One Arrow array, whatever pandas keeps its strings in."""
    return pa.array(values.to_numpy(dtype=object), type=pa.string(), from_pandas=True)


def _label_maps(labels: pd.DataFrame | None, studies: int) -> pa.Array:
    """One map a study: the labels that are not blank."""
    if labels is None or labels.empty:
        empty = pa.array(np.zeros(studies + 1, dtype=np.int32))
        return pa.MapArray.from_arrays(empty, pa.array([], pa.string()), pa.array([], pa.float32()))
    values = labels.to_numpy(dtype=np.float32)
    given = ~np.isnan(values)
    offsets = np.concatenate([[0], np.cumsum(given.sum(axis=1))]).astype(np.int32)
    names = np.tile(np.array(labels.columns, dtype=object), (len(labels), 1))[given]
    return pa.MapArray.from_arrays(
        pa.array(offsets), pa.array(names, pa.string()), pa.array(values[given], pa.float32())
    )
