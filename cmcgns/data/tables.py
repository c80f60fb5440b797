"""CSV files as people and programs write them: one reading, by stated rules, or one refusal with the row; never cut text."""

import csv
import gzip
import io
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from cmcgns import storage
from cmcgns.data.repairs import note, noted
from cmcgns.data.text import decode_text
from cmcgns.errors import UserError

log = logging.getLogger(__name__)
MAX_TABLE_BYTES = 4 * 2**30
"""A row of a table has 100 to 1,000 bytes, so that is several million studies."""
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
NULL = "\\N"
"""A blank cell of MySQL's exports."""
_ENDINGS = r"\.(?:png|jpe?g|dcm|dicom|tiff?|bmp|webp)"
IS_FILM = re.compile(rf"{_ENDINGS}[\s\"]*$", re.I)
"""Finds the ending of a film's name."""
SEPARATED_BY, FILE = "separated by", "file"
"""Keys of a table's ``attrs``: what separates its cells, in words, and its URI."""
COMMA = re.compile(r"[-+]?\d*,\d+(?:[eE][-+]?\d+)?")
POINT = re.compile(r"[-+]?\d*\.\d+(?:[eE][-+]?\d+)?")
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2},\d{3}")
"""Numbers as they may be written: with a decimal comma, with a decimal point, with thousands after a comma."""
MOST_NAMES = 20
_NAME = re.compile(r"[^\W\d_][^\d/\\^]{0,39}")
csv.field_size_limit(MAX_TABLE_BYTES)


Rows = list[list[str]]
"""The cells of each row, the header first."""


class _BadTableError(ValueError):
    """Why a table does not parse one way; the message names the row and no content."""


def read_table(uri: str, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV (or .csv.gz) as strings, blanks as ''; ``UserError`` with the row and the fix if it does not parse one way.

    ``columns`` that the table is to have, in upper or lower case, show what separates its cells: commas, semicolons, tabs or
    bars. Columns without a name are called ``Unnamed: NUMBER``, a repeated name gets its count (``name.1``).
    """
    text = _text(uri)
    sign, text = _separator(text, columns)
    if _is_simple(text, sign):  # three times as fast
        table = pd.read_csv(
            io.StringIO(text), sep=sign, dtype=str, keep_default_na=False, skipinitialspace=True, index_col=False,
            quoting=csv.QUOTE_NONE,
        )  # fmt: skip
        return _with_names(table, list(table.columns), sign, uri)
    try:
        header, *body = _parsed(text, sign)
        body = _filled(header, body, _lower(columns), text)
    except _BadTableError as error:
        raise UserError(f"{uri} is not a valid CSV: {error}") from None
    if sign != ",":
        note(f"cells separated by {SEPARATORS[sign]}", len(body))
    columns_of_cells = zip(*body, strict=True) if body else [()] * len(header)
    table = pd.DataFrame(dict(enumerate(map(list, columns_of_cells))), dtype=str)
    return _with_names(table, header, sign, uri)


def _with_names(table: pd.DataFrame, header: list[str], sign: str, uri: str) -> pd.DataFrame:
    table = table.set_axis(_names(header), axis=1)
    table.attrs |= {SEPARATED_BY: SEPARATORS[sign], FILE: uri}
    return table


def columns_in_words(table: pd.DataFrame) -> str:
    """How many columns a table has, what separates them, and their names, unless these may be the data of a patient."""
    names = [name for name in table.columns if not name.startswith("Unnamed: ")]
    count, separators = len(table.columns), table.attrs[SEPARATED_BY]
    found = f"{count} columns, separated by {separators}" if count > 1 else "1 column"
    if not all(map(_is_name, names)):
        return f"{found}; its first line is not printed, because it looks like data and not like names of columns"
    cut = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{found}: {', '.join(names[:MOST_NAMES])}{cut}"


def _is_name(text: str) -> bool:
    """Whether ``text`` is the name of a column, and neither a film's nor from a report."""
    return bool(_NAME.fullmatch(text)) and len(text.split()) <= 4 and text[-1] != "." and not IS_FILM.search(text)


def read_columns(uri: str, columns: Sequence[str], needed_by: str) -> pd.DataFrame:
    """``read_table`` of a published table, stripped, which must have all of ``columns``; ``needed_by``: the collection."""
    table = read_table(uri, columns)
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise UserError(
            f"{uri} has no column {missing[0]}; {needed_by} needs {', '.join(columns)}; download the published file again"
        )
    return stripped(table)


def stripped(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its cells stripped."""
    return table.apply(lambda column: column.str.strip())


def numbers(cells: pd.DataFrame) -> pd.DataFrame:
    """Columns of a table as numbers, NaN for blanks; ``UserError`` with the first cell that is not a number."""
    values = stripped(cells)
    parsed = with_points(values).apply(pd.to_numeric, errors="coerce").astype(np.float64)
    invalid = ~np.isfinite(parsed) & (values != "")
    if invalid.to_numpy().any():
        raise UserError(f"{_first_cell(values, invalid)} is not a number; fix it, or download the file again")
    return parsed


def with_points(cells: pd.DataFrame) -> pd.DataFrame:
    """Columns of a table in which numbers are expected, with points for decimal commas.

    Excel writes these in German, Spanish and other languages, with semicolons or tabs between the cells.

    Raises:
        UserError: a cell whose comma may as well stand before thousands.
    """
    commas = _matching(cells, COMMA)
    if not commas.to_numpy().any():
        return cells
    sign, has_points = cells.attrs[SEPARATED_BY], _matching(cells, POINT).to_numpy().any()
    may_be_thousands = sign != SEPARATORS[";"] and not (commas & ~_matching(cells, THOUSANDS)).to_numpy().any()
    if sign == SEPARATORS[","] or may_be_thousands or has_points:
        why = "other numbers have points" if has_points else f"the cells are separated by {sign}"
        raise UserError(
            f"{_first_cell(cells, commas)} can be read in two ways: its comma may be decimal, or stand before thousands, "
            f"as {why}; write numbers with a point and no other sign"
        )
    note("decimal commas", int(commas.any(axis=1).sum()))
    return cells.where(~commas, cells.apply(lambda column: column.str.replace(",", ".")))


def _matching(cells: pd.DataFrame, pattern: re.Pattern[str]) -> pd.DataFrame:
    return cells.apply(lambda column: column.isin([each for each in column.unique() if pattern.fullmatch(str(each))]))


def _first_cell(cells: pd.DataFrame, wanted: pd.DataFrame) -> str:
    """File, column, value and row of the first of the ``wanted`` cells."""
    row, column = np.argwhere(wanted.to_numpy())[0]
    found, number = f"{cells.columns[column]} {cells.iloc[row, column]}", cells.index[row] + 1
    return f"{cells.attrs[FILE]}: {found} in row {number} under the header"


def _is_simple(text: str, sign: str) -> bool:
    """Whether a table has no quotes and as many cells in each row, so that any parser reads the same."""
    if sign != "," or '"' in text or NULL in text:
        return False
    lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    return len(lines) > 1 and lines[0].count(sign) > 0 and len({line.count(sign) for line in lines}) == 1


def _text(uri: str) -> str:
    """The decoded content of the table, perhaps unzipped."""
    data = storage.read_bytes(uri)
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_TABLE_BYTES + 1)
    except (OSError, EOFError) as error:
        raise UserError(f"{uri} is a broken gzip file ({error}); download it again") from None
    if len(data) > MAX_TABLE_BYTES:
        raise UserError(f"{uri} has over {MAX_TABLE_BYTES >> 30} GiB of text; split the table")
    with noted() as notes:
        text = decode_text(data)
    for rule, times in notes.items():
        log.warning("%s: %d %s", uri.rsplit("/", 1)[-1], times, rule)
        note(rule, times)
    if "\0" in text[:65536]:
        raise UserError(f"{uri} is not text (it contains zero bytes); save it as CSV in UTF-8")
    return text


def _separator(text: str, columns: Sequence[str]) -> tuple[str, str]:
    """What separates the cells, and the text without Excel's line ``sep=;``."""
    directive = re.match(r'"?sep=([,;\t|])"?[^\S\r\n]*(?:\r\n|\r|\n)', text)
    if directive:
        return directive[1], text[directive.end() :]
    line = next((line for line in re.split(r"\r\n|\r|\n", text[:65536]) if line.strip()), "")
    names = {sign: _lower(next(csv.reader([line], delimiter=sign, skipinitialspace=True), [])) for sign in SEPARATORS}
    wanted = _lower(columns)
    # max: the first of those with most, so commas unless another shows more
    return max(SEPARATORS, key=lambda sign: (len(wanted & names[sign]), len(names[sign]) > 1)), text


def _lower(names: Sequence[str]) -> set[str]:
    return {name.strip().lower() for name in names}


def _parsed(text: str, sign: str) -> Rows:
    """The rows of the table by the standard (RFC 4180), otherwise by the one other rule about quotes under which all rows
    are sound."""
    try:
        return _sound(_standard_rows(text, sign), text, sign)
    except _BadTableError as error:
        standard = error
    for rule, parse in _QUOTE_RULES.items():
        found = [rows for rows in (_or_none(part, text, sign) for part in parse) if rows is not None]
        if found and all(rows == found[0] for rows in found):
            note(rule, sum(any('"' in cell for cell in row) for row in found[0]))
            return found[0]
        if found:
            raise _BadTableError(
                "quotes inside of quoted text can be read in two ways; save it again, with quotes doubled"
            )
    raise standard


def _or_none(parse: Callable[[str, str], Rows], text: str, sign: str) -> Rows | None:
    try:
        return _sound(parse(text, sign), text, sign)
    except _BadTableError:
        return None


def _reader(text: str, sign: str) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=sign, skipinitialspace=True, strict=True)


def _standard_rows(text: str, sign: str) -> Rows:
    reader = _reader(text, sign)
    try:
        return [cells for cells in reader if len(cells) > 1 or (cells and cells[0].strip())]
    except csv.Error:
        raise _BadTableError(
            f"a quote is not closed, or text follows a closing quote, near line {reader.line_num}; double the quotes inside of "
            "quoted text, or save it again from the program that has it"
        ) from None


def _backslash_rows(text: str, sign: str) -> Rows:
    r"""Quotes in quoted text are escaped by a backslash (MySQL, Spark): ``\"``."""
    return _standard_rows(re.sub(r'(?<!\\)((?:\\\\)*)\\"', r'\1""', text), sign)


def _lenient_rows(text: str, sign: str, pairs: bool) -> Rows:
    """Only a quote before a separator or line end closes a cell; others are part of it. ``pairs``: two quotes never close."""
    mark, ends = re.escape(sign), rf"[^\S\r\n{re.escape(sign)}]*(?:{re.escape(sign)}|\r|\n|\Z)"
    # each place of a text fits one alternative only, so that a match never backtracks far
    inner = rf'""|"(?!"|{ends})' if pairs else rf'"(?!{ends})'
    cell = re.compile(
        rf'[ ]*(?:"(?P<quoted>[^"]*(?:(?:{inner})[^"]*)*)"[^\S\r\n{mark}]*|(?P<plain>(?!")[^{mark}\r\n]*))'
        rf"(?P<end>{mark}|\r\n|\r|\n|\Z)"
    )
    rows: Rows = []
    cells: list[str] = []
    place = 0
    while place < len(text):
        found = cell.match(text, place)
        if found is None:
            raise _BadTableError("a quote is not closed")
        quoted = found["quoted"]
        cells.append(found["plain"] if quoted is None else quoted.replace('""', '"'))
        place = found.end()
        if found["end"] != sign or place == len(text):
            cells += [""] if found["end"] == sign else []
            if len(cells) > 1 or cells[0].strip():
                rows.append(cells)
            cells = []
    return rows


_QUOTE_RULES: dict[str, tuple[Callable[[str, str], Rows], ...]] = {
    r"quotes escaped as \"": (_backslash_rows,),
    "quotes inside of quoted text": (partial(_lenient_rows, pairs=True), partial(_lenient_rows, pairs=False)),
}


def _sound(rows: Rows, text: str, sign: str) -> Rows:
    """The rows, if none has more cells than the header and none holds another row in its quotes."""
    if not rows:
        raise _BadTableError("it is empty")
    width = len(rows[0])
    quoted = '"' in text
    for number, row in enumerate(rows):
        if len(row) > width and any(cell.strip() for cell in row[width:]):
            raise _BadTableError(
                f"row {number} under the header{_line(number, text, sign)} has {len(row)} cells, the header has {width}; a text "
                f"that contains {SEPARATORS[sign]} must stand in quotes"
            )
        if quoted and width > 1 and number and any(_holds_row(cell, sign) for cell in row):
            raise _BadTableError(
                f"row {number} under the header{_line(number, text, sign)} holds another row in its quotes; a quote before it is "
                "not closed: close it, or double the quotes inside of quoted text"
            )
    return rows


def _holds_row(cell: str, sign: str) -> bool:
    """Whether a later line of ``cell`` has several cells and one of them names a film."""
    if "\n" not in cell and "\r" not in cell:
        return False
    lines = [line.split(sign) for line in re.split(r"\r\n|\r|\n", cell)[1:] if sign in line]
    return any(IS_FILM.search(part) for parts in lines for part in parts)


def _line(number: int, text: str, sign: str) -> str:
    """Where in the file row ``number`` under the header ends; blank if it is not a row by the standard."""
    reader, place = _reader(text, sign), -1
    with suppress(csv.Error):
        for cells in reader:
            place += len(cells) > 1 or bool(cells and cells[0].strip())
            if place == number:
                return f" (line {reader.line_num})"
    return ""


def _filled(header: list[str], body: Rows, wanted: set[str], text: str) -> Rows:
    """The rows under the header with as many cells as it has; blanks that a program left out at the end are added.

    A row that ends before the last of the ``wanted`` columns and names no film is refused: it is the rest of a text with a
    line end and without quotes.
    """
    width = len(header)
    needed = max((place + 1 for place, name in enumerate(header) if name.strip().lower() in wanted), default=1)
    for number, cells in enumerate(body, start=1):
        if len(cells) == width:
            continue
        if len(cells) < needed and not any(IS_FILM.search(cell) for cell in cells):
            raise _BadTableError(
                f"row {number} under the header has {len(cells)} cells, the header has {width}; a text that contains line ends "
                "must stand in quotes"
            )
        cells[width:] = [""] * (width - len(cells))
    if NULL in text:
        note(r"blanks written as \N", sum(NULL in cells for cells in body))
        body = [["" if cell == NULL else cell for cell in cells] for cells in body]
    return body


def _names(header: list[str]) -> list[str]:
    """The names of the columns, each once."""
    names: list[str] = []
    for place, name in enumerate(header):
        name = name.strip() or f"Unnamed: {place}"
        same, count = name, 0
        while same in names:
            count += 1
            same = f"{name}.{count}"
        names.append(same)
    return names
