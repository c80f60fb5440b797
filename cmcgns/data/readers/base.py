"""Shared by the readers: protocols, safe paths, views and splits."""

import hashlib
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import pandas as pd
import pyarrow as pa

from cmcgns import storage
from cmcgns.data.decode import decode_image
from cmcgns.data.image import CroppedImage, Target, check_looks_like_film, uncropped, without_borders
from cmcgns.data.order import Arrangement, arranged
from cmcgns.data.record import StudyIndex
from cmcgns.data.repairs import note
from cmcgns.data.reports import ParsedReport, parse_report
from cmcgns.data.text import decode_text, unescaped
from cmcgns.errors import BadRow

DEFAULT_VIEWS = ("PA", "AP")
UNKNOWN_VIEWS = frozenset({"", "?", "UNKNOWN", "NAN", "NONE", "NA", "N/A"})
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "valid": "valid", "val": "valid", "validate": "valid", "validation": "valid",
    "test": "test", "testing": "test",
}  # fmt: skip

PROBED = 20
"""Films by which it is found out, before anything starts, where the films of a table lie."""
LONGEST_PATH = 1024
"""Bytes of the longest key on S3."""
NAMED_VIEWS = frozenset({
    "AP", "AXIAL", "COSTAL", "DECUB", "DECUBITUS", "ERECT", "EXCLUDE", "FRONTAL", "HORIZONTAL", "L", "LAO", "LAT", "LATERAL",
    "LEFT", "LL", "LLD", "LPO", "OBLIQUE", "PA", "PEDIATRIC", "PORTABLE", "R", "RAO", "RIGHT", "RL", "RLD", "RPO", "SUPINE",
    "SWIMMERS", "UPRIGHT", "XTABLE",
})  # fmt: skip
"""Words of views that may be printed; other words may come from a report if the columns of a table are shifted."""
SPLIT_SHARES = (("train", 0.8), ("valid", 0.9), ("test", 1.0))  # upper ends


class Reader(Protocol):
    """Reads films and reports, one at a time."""

    io_bound: ClassVar[bool]
    """Whether each read waits for storage, so that concurrent reads are faster."""

    def read_image(self, path: str) -> CroppedImage:
        """The film without its black borders; ``BadRow`` if it cannot be used."""
        ...

    def read_sentences(self, study: dict[str, Any], path: str) -> ParsedReport:
        """The parsed report of an index row, of which ``path`` is one film; ``BadRow`` if it is too short."""
        ...


class Source(Protocol):
    """A corpus. Picklable: it is sent to Ray tasks and opens its files there."""

    in_groups: ClassVar[bool]
    """Whether reading whole groups of its arrangement is fastest."""

    @property
    def uri(self) -> str: ...

    @property
    def format(self) -> str: ...

    def index(self) -> StudyIndex:
        """Every study of the corpus, in a fixed order."""
        ...

    def arrange(self, studies: pa.Table, group_studies: int) -> tuple[pa.Table, Arrangement]:
        """The studies of a split in their order for training, and their groups."""
        ...

    def reader(self, paths: Sequence[str], films: bool = True) -> Reader:
        """A reader of the films at ``paths`` and their reports, or of the reports only if not ``films``."""
        ...

    def read_report(self, study: dict[str, Any]) -> str:
        """The text of the report of an index row."""
        ...


class CorpusOptions(NamedTuple):
    """What a reader is opened with."""

    uri: str
    format: str
    views: tuple[str, ...] = DEFAULT_VIEWS
    seed: int = 0
    target: Target | None = None
    """Size to which films will be shrunk; JPEGs may then be decoded at a reduced scale, at least twice as large."""
    crop_borders: bool = True
    follow_links: bool = False
    """Read films and reports behind symbolic links that leave the corpus folder."""
    phantom_studies: int = 4000
    phantom_size: int = 256
    reports: bool = True
    """Films have reports; otherwise none is looked for."""
    columns: Mapping[str, str] | None = None
    """Names of the columns of a table, by the names that they have for us."""
    films: str | None = None
    """Folder of the films, if it is not that of the table."""

    @property
    def of_files(self) -> tuple[str, str, tuple[str, ...], int, Target | None, bool, bool]:
        """The fields of a ``FileSource``."""
        return self[:7]


@dataclass(frozen=True)
class FileSource:
    """A corpus of films and texts under one folder."""

    in_groups: ClassVar[bool] = False
    io_bound: ClassVar[bool] = True

    uri: str
    format: str
    views: tuple[str, ...] = DEFAULT_VIEWS
    seed: int = 0
    target: Target | None = None
    """Size to which films will be shrunk."""
    crop_borders: bool = True
    follow_links: bool = False

    def arrange(self, studies: pa.Table, group_studies: int) -> tuple[pa.Table, Arrangement]:
        return arranged(studies, group_studies)

    def reader(self, paths: Sequence[str], films: bool = True) -> Reader:
        return self

    def read_image(self, path: str) -> CroppedImage:
        film = decode_image(self._read(path, "film"), path, self.target)
        check_looks_like_film(film.grey_HW)
        return without_borders(film) if self.crop_borders else uncropped(film)

    def read_sentences(self, study: dict[str, Any], path: str) -> ParsedReport:
        return parse_report(self.read_report(study))

    def read_report(self, study: dict[str, Any]) -> str:
        if study.get("report") is not None:
            return unescaped(str(study["report"]))
        if not study.get("report_path"):
            raise BadRow("study has no report")
        return unescaped(decode_text(self._read(study["report_path"], "report")))

    def _read(self, path: str, kind: str) -> bytes:
        if escapes(path):
            raise BadRow(f"{kind} path is outside the corpus folder")
        if len(path.encode()) > LONGEST_PATH:
            raise BadRow(f"{kind} path is longer than {LONGEST_PATH} bytes")
        if not self.follow_links and not storage.is_s3(self.uri) and leaves(self.uri, path):
            raise BadRow(
                f"{kind} path is a link that leaves the corpus folder; copy the file, or set data.follow_links=true"
            )
        try:
            return self._read_spelt(path)
        except storage.MissingFileError:
            raise BadRow(f"{kind} file is missing") from None
        except storage.ForbiddenFileError:
            raise BadRow(f"access to the {kind} file is denied") from None
        except storage.BrokenFileError as error:
            special = "not a regular file" in str(error)
            raise BadRow(f"{kind} file is {'not a regular file' if special else 'a circular symbolic link'}") from None

    def has_film(self, path: str) -> bool:
        """Whether there is a file at ``path``, or at another spelling of it."""
        places = [storage.join(self.uri, each) for each in (path, *(other for _, other in spellings(path)))]
        try:
            return any(map(storage.exists, places))
        except storage.MissingFileError:  # too long for a name
            return False
        except (storage.ForbiddenFileError, storage.BrokenFileError):
            return True

    def _read_spelt(self, path: str) -> bytes:
        """The file at ``path``, or at another spelling of it if there is none."""
        try:
            return storage.read_bytes(storage.join(self.uri, path))
        except storage.MissingFileError:
            for rule, other in spellings(path):
                if self.follow_links or storage.is_s3(self.uri) or not leaves(self.uri, other):
                    with suppress(storage.MissingFileError):
                        data = storage.read_bytes(storage.join(self.uri, other))
                        note(rule)
                        return data
            raise


def spellings(path: str) -> Iterator[tuple[str, str]]:
    """Other ways to write ``path``, each with its rule: without what Excel adds, slashes for backslashes, accents composed (most
    systems) or not (macOS)."""
    plain = unescaped(path).strip() if "_x" in path else path
    if plain != path:
        yield "paths with Excel escapes", plain
    tidy = posixpath.normpath(plain.replace("\\", "/"))
    if tidy != plain:
        yield "paths with backslashes or ./", tidy
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, tidy)
        if other != tidy:
            yield "paths with accents in another form", other


def escapes(path: str) -> bool:
    """Whether ``path`` is absolute, leaves the folder it is relative to, or is not a valid path."""
    parts = path.replace("\\", "/").split("/")
    return (
        ".." in parts
        or "\0" in path
        or path.startswith(("/", "\\", "~/"))  # elsewhere a tilde is a letter
        or re.match(r"[A-Za-z][\w+.-]*:", path) is not None
    )


def leaves(uri: str, path: str) -> bool:
    """Whether the file at ``path`` in the local folder ``uri`` lies elsewhere, behind symbolic links."""
    root = os.path.realpath(storage.filesystem(uri)[1])
    return os.path.commonpath([root, os.path.realpath(os.path.join(root, path))]) != root


def canonical_view(view: str) -> str:
    """PA, AP (also for 'AP Supine', 'AP Erect', ...), '' if unknown, otherwise the name in capitals."""
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
    """The films of ``views`` (and those of unknown view), and how many were excluded by reason."""
    spellings = {view: canonical_view(view) for view in films["view"].unique()}
    view = films["view"].map(spellings)
    kept = view.isin(list(wanted_views(views, keep_unknown)))
    filtered: Counter[str] = Counter()
    for name, count in view[~kept].value_counts().items():
        filtered[_exclusion(str(name))] += count
    return films.assign(view=view)[kept], dict(sorted(filtered.items()))


def wanted_views(views: Sequence[str], keep_unknown: bool = True) -> set[str]:
    """The canonical names of ``views`` and of those that count as such."""
    wanted = {canonical_view(name) for name in views} - {""}
    if wanted & {"PA", "AP"}:
        wanted.add("FRONTAL")
    if keep_unknown:
        wanted.add("")
    return wanted


def _exclusion(view: str) -> str:
    """The reason to report for an excluded view."""
    if not view:
        return "view unknown"
    return f"view {view}" if NAMED_VIEWS.issuperset(re.split(r"[ -]+", view)) else "other view"


def split_position(seed: int, group: str) -> float:
    """Position of ``group`` in [0, 1) by which splits are drawn: a function of seed and group only."""
    digest = hashlib.blake2b(f"split|{seed}|{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def draw_split(seed: int, group: str) -> str:
    """train, valid or test (80/10/10), a function of seed and group only."""
    position = split_position(seed, group)
    return next(name for name, end in SPLIT_SHARES if position < end or end == 1.0)


def draw_splits(seed: int, groups: pd.Series, given: pd.Series | None = None) -> pd.Series:
    """The split of each row's group, as ``given`` or, where that is null, drawn.

    One that is left empty, as chance does in a small corpus, gets the drawn group that is nearest to it."""
    given = pd.Series(None, groups.index, object) if given is None else given
    drawn = {group: draw_split(seed, group) for group in groups[given.isna()].unique()}
    fixed = Counter(given.dropna())
    starts = (0.0, *(end for _, end in SPLIT_SHARES))
    for start, (name, end) in zip(starts, SPLIT_SHARES, strict=False):
        counts = Counter(drawn.values()) + fixed
        if counts[name]:
            continue
        others = [group for group, split in drawn.items() if counts[split] > 1]
        away = {group: abs(split_position(seed, group) - (start + end) / 2) for group in others}
        if away:
            drawn[min(away, key=lambda group: (away[group], group))] = name
    return given.fillna(groups.map(drawn))
