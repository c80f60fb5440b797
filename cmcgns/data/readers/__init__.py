"""Readers of corpora behind one protocol: an index of the studies, then films and reports one at a time.

`open_source` picks the reader for a URI; `detect_format` recognises the layout by a few file names.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from cmcgns import storage
from cmcgns.config import CorpusConfig
from cmcgns.config.sections import is_generated
from cmcgns.data.image import Target
from cmcgns.data.manifest import MANIFEST, PLAN, SPLITS
from cmcgns.data.readers.base import DEFAULT_VIEWS, CorpusOptions, FileSource, Reader, Source
from cmcgns.data.readers.grouped import LISTED_STUDIES, grouped_splits
from cmcgns.data.readers.mimic import MimicSource
from cmcgns.data.readers.open_i import OpenISource
from cmcgns.data.readers.pairs import PAIRS, PairsSource, tables_in_words
from cmcgns.data.readers.phantom import PhantomSource
from cmcgns.data.readers.prepared import PreparedSource
from cmcgns.data.readers.published import PublishedSource, published_format
from cmcgns.data.record import StudyIndex
from cmcgns.data.repairs import noted
from cmcgns.data.studies import ListedStudies, Studies
from cmcgns.errors import UserError, with_prefix
from cmcgns.plugins import load_plugin

READERS = {
    "phantom": "cmcgns.data.readers.phantom",
    "pairs-csv": "cmcgns.data.readers.pairs",
    "mimic-cxr-jpg": "cmcgns.data.readers.mimic",
    "mimic-cxr": "cmcgns.data.readers.mimic",
    "open-i": "cmcgns.data.readers.open_i",
    "open-i-csv": "cmcgns.data.readers.published",
    "padchest": "cmcgns.data.readers.published",
    "chexpert-plus": "cmcgns.data.readers.published",
    "brax": "cmcgns.data.readers.published",
    "vindr-cxr": "cmcgns.data.readers.published",
    "parquet": "cmcgns.data.readers.prepared",
}
"""Modules by format; each has ``open_corpus(options: CorpusOptions) -> Source``."""
FORMATS = tuple(READERS)
MAX_DEPTH = 5
REPORTS_OF_OPEN_I = "ecgen-radiology"
METADATA_TABLE = "mimic-cxr-*-metadata.csv*"


def detect_format(uri: str) -> str:
    """The format of the corpus at ``uri``; ``UserError`` with the known ones if it is none of them."""
    if is_generated(uri):
        return "phantom"
    if uri.endswith(".csv"):
        return "pairs-csv"
    names = storage.list_files(uri, recursive=False)
    if MANIFEST in names:
        return "parquet"
    if PLAN in names:
        raise UserError(
            f"{uri} is an incomplete prepared set; complete it with python jobs/prepare.py --prepare.out={uri} and the same "
            "settings"
        )
    if PAIRS in names:
        return "pairs-csv"
    published = published_format(uri, names)
    if published:
        return published
    if _is_open_i(uri):
        return "open-i"
    example = _first_file(uri, (".jpg", ".jpeg", ".dcm", ".xml"))
    if fnmatch.filter(names, METADATA_TABLE):
        return "mimic-cxr" if example.endswith(".dcm") else "mimic-cxr-jpg"
    if example.endswith(".xml") or any(name.endswith(".xml") for name in names):
        return "open-i"
    if example.endswith(".dcm"):
        return "mimic-cxr"
    raise UserError(
        f"{uri}: no known format found. Known are pairs-csv (a pairs.csv), mimic-cxr-jpg ({METADATA_TABLE} and "
        "files/), mimic-cxr (folders of .dcm), open-i (.xml reports), open-i-csv, padchest, chexpert-plus, brax and vindr-cxr "
        "(their published tables), parquet (prepared: manifest.json). "
        f"{tables_in_words(uri, names) or 'Check the path'}, or set data.format"
    )


def _is_open_i(uri: str) -> bool:
    """Whether a folder beside those of the films has Open-I's reports."""
    folders = storage.list_folders(uri)
    if REPORTS_OF_OPEN_I in folders:
        return True
    named = [name for name in folders if "reports" in name.lower()]
    return any(_first_file(storage.join(uri, name), (".xml", ".txt")).endswith(".xml") for name in named)


def _first_file(uri: str, suffixes: tuple[str, ...], depth: int = 0) -> str:
    """Name of one film or report in the first folders, without listing a corpus of 300,000 files."""
    for name in storage.list_files(uri, recursive=False):
        if name.lower().endswith(suffixes):
            return name.lower()
    if depth < MAX_DEPTH:
        for folder in storage.list_folders(uri)[:3]:
            name = _first_file(storage.join(uri, folder), suffixes, depth + 1)
            if name:
                return name
    return ""


__all__ = [
    "DEFAULT_VIEWS",
    "FORMATS",
    "LISTED_STUDIES",
    "READERS",
    "CorpusOptions",
    "FileSource",
    "MimicSource",
    "OpenISource",
    "PairsSource",
    "PhantomSource",
    "PreparedSource",
    "PublishedSource",
    "Reader",
    "Source",
    "Splits",
    "detect_format",
    "open_source",
]


def open_source(
    uri: str,
    format: str = "auto",
    views: Sequence[str] = DEFAULT_VIEWS,
    seed: int = 0,
    target: Target | None = None,
    crop_borders: bool = True,
    follow_links: bool = False,
    phantom_studies: int = 4000,
    phantom_size: int = 256,
    reports: bool = True,
    columns: Mapping[str, str] | None = None,
    films: str | None = None,
) -> Source:
    """The corpus at ``uri``; small enough to be sent to every Ray task.

    ``target``: size to which films will be shrunk; JPEGs may then be decoded at a reduced scale, at least twice as large.
    ``reports``: films have reports. ``columns``, ``films``: see ``CorpusConfig``.
    """
    if format == "auto":
        format = detect_format(uri)
    if format in READERS and format != "pairs-csv" and (columns or films):
        name = "columns" if columns else "films"
        raise UserError(f"data.{name} is for a pairs-csv, and {uri} is {format}; remove data.{name}")
    options = CorpusOptions(
        uri, format, tuple(views), seed, target, crop_borders, follow_links, phantom_studies, phantom_size, reports,
        columns, films,
    )  # fmt: skip
    opener = getattr(load_plugin("data.format", format, READERS), "open_corpus", None)
    if opener is None:
        raise UserError(f"data.format {format} defines no open_corpus (docs/data.md)")
    source: Source = opener(options)
    return source


def open_index(key: str, data: CorpusConfig, target: Target) -> tuple[Source, StudyIndex]:
    """The corpus of the settings ``data`` and its index; if it cannot be read, the error names the setting ``key``.

    ``target``: size to which films will be shrunk.
    """
    with _named(key, data):
        source = _source(data, target)
        return source, _index(source)


@dataclass(frozen=True)
class Splits:
    """A corpus by split, and what was excluded before any pixel was read."""

    source: Source
    studies: Mapping[str, Studies]
    """By split; none for a split without studies."""
    filtered: dict[str, int] = field(default_factory=dict)
    """As in ``StudyIndex``."""
    bad_rows: list[dict[str, str]] = field(default_factory=list)
    """As in ``StudyIndex``."""


def open_splits(key: str, data: CorpusConfig, target: Target, group_studies: int) -> Splits:
    """The corpus of the settings ``data`` for training, as ``open_index`` opens it. The studies of a prepared set of more than
    ``LISTED_STUDIES`` are not listed."""
    with _named(key, data):
        source = _source(data, target)
        if isinstance(source, PreparedSource) and source.studies > LISTED_STUDIES:
            return Splits(source, *grouped_splits(source))
        index = _index(source)
    studies = {}
    for split in SPLITS:
        table, arrangement = source.arrange(index.split(split), group_studies)
        if len(table):
            studies[split] = ListedStudies(source, table.combine_chunks(), arrangement)
    return Splits(source, studies, index.filtered, index.bad_rows)


def _source(data: CorpusConfig, target: Target) -> Source:
    return open_source(
        data.uri, data.format, data.views, data.seed, target, data.crop_borders, data.follow_links,
        data.phantom_studies, data.phantom_size, data.reports, data.columns, data.films,
    )  # fmt: skip


def _index(source: Source) -> StudyIndex:
    with noted() as notes:
        index = source.index()
    if isinstance(source, PairsSource):
        source.check_films(index)
    return replace(index, repaired=dict(notes))


@contextmanager
def _named(key: str, data: CorpusConfig) -> Iterator[None]:
    """Name the setting ``key`` in errors."""
    try:
        yield
    except UserError as error:
        reason = str(error).removeprefix("data.uri ")
        raise UserError(f"{key} {with_prefix(data.uri, reason)}") from None
