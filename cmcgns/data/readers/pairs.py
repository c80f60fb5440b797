"""``pairs-csv``: a user's own table with a film and its report in each row, or with films alone."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from cmcgns import storage
from cmcgns.config.sections import PAIRS_COLUMNS
from cmcgns.data.image import Target
from cmcgns.data.readers.base import (
    PROBED,
    SPLIT_NAMES,
    CorpusOptions,
    FileSource,
    draw_splits,
    escapes,
    filter_views,
)
from cmcgns.data.record import StudyIndex, index_of_films
from cmcgns.data.tables import COMMA, IS_FILM, columns_in_words, numbers, read_table
from cmcgns.data.text import unescaped
from cmcgns.errors import UserError

log = logging.getLogger(__name__)
PAIRS = "pairs.csv"
"""The table of a folder."""
PROBED_FOLDERS = 20
REQUIRED = ("image", "report")
METADATA = ("age", "sex", "offset", "offset_days", "height", "width", "rows", "columns", "date", "year", "id", "index")
KNOWN = frozenset([*PAIRS_COLUMNS, *METADATA])


@dataclass(frozen=True)
class PairsSource(FileSource):
    """The films of a ``pairs.csv``, or of a table with another name; ``uri`` is their folder."""

    table_name: str = PAIRS
    reports: bool = True
    """The table has a column of reports; otherwise none is read."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The table's own names for columns, by ours."""
    folder: str = ""
    """The folder of the table, if the films are in another."""

    @classmethod
    def at(
        cls,
        uri: str,
        views: tuple[str, ...],
        seed: int,
        target: Target | None = None,
        crop_borders: bool = True,
        follow_links: bool = False,
        reports: bool = True,
        columns: Mapping[str, str] | None = None,
        films: str | None = None,
    ) -> "PairsSource":
        """The source at a folder or at a CSV file; ``films`` as in ``CorpusConfig``."""
        folder, _, name = uri.rstrip("/").rpartition("/")
        if name.endswith(".csv"):
            folder = folder or ("/" if uri.startswith("/") else ".")
        else:
            folder, name = uri, PAIRS
        place = folder if films is None else _inside(folder, films)
        return cls(
            place, "pairs-csv", views, seed, target, crop_borders, follow_links, name, reports, dict(columns or {}),
            "" if place == folder else folder,
        )  # fmt: skip

    @property
    def table_folder(self) -> str:
        """URI of the folder of the table."""
        return self.folder or self.uri

    @property
    def table_uri(self) -> str:
        """URI of the table."""
        return storage.join(self.table_folder, self.table_name)

    def check_films(self, index: StudyIndex) -> None:
        """Raise ``UserError`` if none of the first films of ``index`` is there."""
        first = [film["path"] for films in index.table["films"].slice(0, PROBED).to_pylist() for film in films][:PROBED]
        if not first or any(map(self.has_film, first)):
            return
        inside = [
            name
            for name in (storage.list_folders(self.uri) if storage.is_folder(self.uri) else [])[:PROBED_FOLDERS]
            if storage.exists(storage.join(self.uri, f"{name}/{first[0]}"))
        ]
        # a long name, or one with blanks, may be a report in the wrong column
        tried = storage.join(self.uri, first[0] if len(first[0]) <= 200 and not re.search(r"\s", first[0]) else "...")
        fix = (
            f"they are in {inside[0]}: set data.films={inside[0]}"
            if inside
            else "copy the films there, or give their folder as data.films"
        )
        raise UserError(
            f"{self.table_uri}: none of its first {len(first)} films is there, the first was tried as {tried}; {fix}"
        )

    def index(self) -> StudyIndex:
        table = self._table()
        films = _films(table, self.reports)
        _check_whole(films, self.table_uri)
        reasons = _bad_reasons(films, self.reports)
        bad_rows = [
            {"source": f"{self.table_name} row {row}", "reason": reason}
            for row, reason in zip(films["row"], reasons, strict=True)
            if reason
        ]
        films = films[reasons == ""]
        films, filtered = filter_views(films, self.views)
        films = films.assign(split=_splits(films, self.seed, self.table_name, "group" in table.columns))
        labels = _labels(table)
        log.info("%s: %d films, labels %s", self.table_name, len(films), [*labels] or "none")
        return StudyIndex(table=index_of_films(films, labels), filtered=filtered, bad_rows=bad_rows)

    def _table(self) -> pd.DataFrame:
        needed = REQUIRED if self.reports else ("image",)
        table = self._read_table([self.columns.get(name, name) for name in needed])
        return with_our_names(table, self.columns, needed, self.table_uri)

    def _read_table(self, columns: Sequence[str]) -> pd.DataFrame:
        try:
            return read_table(self.table_uri, columns)
        except storage.MissingFileError:
            folder = self.table_folder
            if not storage.is_folder(folder):
                if self.table_name == PAIRS:
                    raise storage.MissingFileError(
                        f"{folder} does not exist; give an existing file or folder"
                    ) from None
                raise
            tables = tables_in_words(folder, storage.list_files(folder, recursive=False))
            raise storage.MissingFileError(
                f"{folder} has no {self.table_name}. {tables or f'Write one there with a column {REQUIRED[0]} (docs/data.md)'}"
            ) from None


def tables_in_words(folder: str, names: Sequence[str]) -> str:
    """A sentence about the tables among the files ``names`` of a folder; '' if there are none."""
    tables = [name for name in names if name.endswith(".csv")]
    if not tables:
        return ""
    return f"The folder has {', '.join(tables[:5])}: give the table itself, as {storage.join(folder, tables[0])}"


def _inside(folder: str, films: str) -> str:
    """The folder ``films``; if it is relative, inside of ``folder``."""
    given = films if "://" in films else str(Path(films).expanduser())
    return given if "://" in given or Path(given).is_absolute() else storage.join(folder, given)


def with_our_names(
    table: pd.DataFrame, columns: Mapping[str, str], needed: Sequence[str], uri: str, of_set: str = ""
) -> pd.DataFrame:
    """The table with our names for its columns: those of ``columns``, and known ones in capitals; it must have ``needed``.

    ``of_set``: the table is of this set of an evaluation, and ``columns`` of its settings.
    """
    setting, found = "evaluate.columns" if of_set else "data.columns", columns_in_words(table)
    table = _renamed(table, columns, uri, setting)
    # a repeated name has its count
    given = {name: re.sub(r"\.\d+$", "", name).lower() for name in table.columns}
    table = table.rename(columns={name: known for name, known in given.items() if known in KNOWN})
    duplicates = sorted({name for name in table.columns if list(table.columns).count(name) > 1})
    if duplicates:
        raise UserError(f"{uri}: column {duplicates[0]} appears twice; keep one")
    missing = [name for name in needed if name not in table.columns]
    if missing:
        names = dict(columns) | dict.fromkeys(missing, "NAME")
        example = f"{{{', '.join(f'{name}: {given}' for name, given in names.items())}}}"
        shown = f"{{{of_set}: {example}}}" if of_set else example
        films_alone = "; for films without reports set data.reports=false" if missing == ["report"] else ""
        raise UserError(
            f"{uri} has no column {' and no column '.join(missing)} among its {found}. Its first line must contain "
            f"{' and '.join(needed)}; or give its own names with --{setting}='{shown}'{films_alone}"
        )
    return table


def _renamed(table: pd.DataFrame, columns: Mapping[str, str], uri: str, setting: str) -> pd.DataFrame:
    """The table with our names for the ``columns`` of the setting, in place of any other columns of these names."""
    by_name = {name.lower(): name for name in reversed(table.columns)}
    missing = [f"{given} (for {name})" for name, given in columns.items() if given.strip().lower() not in by_name]
    if missing:
        raise UserError(
            f"{uri} has no column {' and no column '.join(missing)}, which {setting} names, among its "
            f"{columns_in_words(table)}"
        )
    named = {name: table[by_name[given.strip().lower()]] for name, given in columns.items()}
    used = {by_name[given.strip().lower()] for given in columns.values()}
    others = [name for name in table.columns if name not in used and name.lower() not in columns]
    renamed = pd.concat([table[others], pd.DataFrame(named, index=table.index)], axis=1)
    renamed.attrs = table.attrs
    return renamed


def _check_whole(films: pd.DataFrame, uri: str) -> None:
    """Raise if a row is the rest of the report above it, which has a line end and no quotes."""
    names_film = films["path"].str.contains(IS_FILM)
    is_rest = ~names_film & films["path"].str.contains(r"\s") & (films["row"] > 1)
    if is_rest.any() and names_film.mean() >= 0.5:
        raise UserError(
            f"{uri}: row {films.loc[is_rest, 'row'].iloc[0]} under the header names no film file, as most rows do; if it is the "
            "rest of a report with a line end, that report must stand in quotes"
        )


def _ids(column: pd.Series) -> pd.Series:
    """Ids of patients, groups and studies: one person is one id, however the accents of the name are written."""
    return column.map({each: unescaped(each).strip() for each in column.unique()})


def _films(table: pd.DataFrame, reports: bool) -> pd.DataFrame:
    """One row per film, unfiltered; ``row`` is the row's number under the header, from 1."""
    stripped = {name: table[name].str.strip() for name in KNOWN if name in table.columns}
    stripped |= {name: _ids(stripped[name]) for name in ("patient", "group", "study") if name in stripped}
    blank = pd.Series("", index=table.index)
    image = stripped["image"]
    patient = _or_else(stripped.get("patient", blank), image)
    # the same image in two rows is two studies unless the table has study ids
    repeats = image.groupby(image).cumcount()
    own_study = image.where(repeats == 0, image + "#" + (repeats + 1).astype(str))
    return pd.DataFrame(
        {
            "row": np.arange(1, len(table) + 1),
            "image_id": own_study,
            "path": image,
            "report": table["report"] if reports else None,
            "view": stripped.get("view", blank),
            "patient_id": patient,
            "group": _or_else(stripped.get("group", blank), patient),
            "study_id": _or_else(stripped.get("study", blank), own_study),
            "split": stripped.get("split", blank).str.lower(),
        }
    )


def _or_else(values: pd.Series, otherwise: pd.Series) -> pd.Series:
    return values.where(values != "", otherwise)


def _bad_reasons(films: pd.DataFrame, reports: bool) -> pd.Series:
    """Why each row cannot be used; '' if it can."""
    outside = films["path"].map(escapes)
    reasons = pd.Series("", index=films.index, dtype=object)
    reasons[films.groupby("study_id")["group"].transform("nunique") > 1] = "films of one study are in different groups"
    if reports:
        report = films["report"].str.strip()
        several = films.assign(report=report).groupby("study_id")["report"].transform("nunique") > 1
        reasons[several] = "films of one study have different reports"
        reasons[report == ""] = "row has no report"
    reasons[outside] = "film path is outside the corpus folder"
    reasons[films["path"] == ""] = "row names no image"
    return reasons


def _splits(films: pd.DataFrame, seed: int, table_name: str, grouped: bool) -> pd.Series:
    """Each row's split: as given, otherwise that of its group, otherwise drawn by group."""
    unknown = sorted(set(films["split"]) - set(SPLIT_NAMES) - {""})
    if unknown:
        bad = films["split"].isin(unknown)
        count, first = int(bad.sum()), int(films.loc[bad, "row"].iloc[0])
        # one word is printed; a sentence may be a report in the wrong column
        shown = f" {unknown[0]}" if len(unknown[0]) <= 12 and unknown[0].isalnum() else ""
        raise UserError(
            f"{table_name}: unknown split{shown} in {count} rows, first in row {first}; "
            "give train, valid, test or leave it blank"
        )
    given = films["split"].map(SPLIT_NAMES)
    of_group = given.groupby(films["group"])
    conflicting = of_group.transform("nunique") > 1
    if conflicting.any():
        raise UserError(_split_conflict(films.assign(split=given), conflicting, table_name, grouped))
    return draw_splits(seed, films["group"], of_group.transform("first"))


def _split_conflict(films: pd.DataFrame, conflicting: pd.Series, table_name: str, grouped: bool) -> str:
    """The message about groups with films in several splits."""
    group = films.loc[conflicting, "group"].iloc[0]
    rows = films[films["group"] == group]
    names = " and ".join(sorted(rows["split"].dropna().unique()))
    count = films.loc[conflicting, "group"].nunique()
    # an id of a patient is not printed
    named = f"group {group}" if grouped else "a patient"
    shown = ", ".join(str(row) for row in rows["row"][:6])
    return (
        f"{table_name}: {named} ({len(rows)} rows: {shown}) is in {names}, and so are {count - 1} others; "
        "each must be in one split: fix the split column, or leave it blank to have it drawn"
    )


def _labels(table: pd.DataFrame) -> pd.DataFrame:
    """The columns with only blanks and numbers from -1 to 1, as numbers."""
    labels = pd.DataFrame(index=table.index)
    for name in table.columns:
        if name in KNOWN or name.lower().startswith("unnamed"):
            continue
        distinct = pd.Series(table[name].unique()).str.strip()
        given = distinct[distinct != ""]
        values = pd.to_numeric(given.where(~given.str.fullmatch(COMMA), given.str.replace(",", ".")), errors="coerce")
        if not len(values) or not values.between(-1, 1).all():
            continue
        try:
            labels[name] = numbers(table[[name]])
        except UserError as doubt:  # it may be no label at all, and nobody could leave it out
            log.warning("%s. The column is not taken as a label", doubt)
    return labels


def open_corpus(options: CorpusOptions) -> PairsSource:
    """The reader of ``pairs-csv``."""
    return PairsSource.at(
        options.uri,
        options.views,
        options.seed,
        options.target,
        options.crop_borders,
        options.follow_links,
        options.reports,
        options.columns,
        options.films,
    )
