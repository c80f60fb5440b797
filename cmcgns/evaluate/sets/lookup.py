"""What every reader of a downstream set does: list the folder once, find label files and films in it, draw splits."""

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from cmcgns.data import storage
from cmcgns.data.framing import Film
from cmcgns.data.sources import FileSource
from cmcgns.data.sources.base import decode_text, place_of, read_table
from cmcgns.data.transforms import Target, decode_scan
from cmcgns.errors import UserError

FILM_ENDINGS = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")
"""Of films that are looked up by name; where one name has several, the first of these is read."""
MOST_MISSING = 0.01
"""Share of a label file's images that may be missing."""
MISSING = "image missing"


@dataclass(frozen=True)
class Folder:
    """The folder of a downstream set, listed once."""

    name: str
    uri: str
    paths: frozenset[str]

    @classmethod
    def of(cls, source: FileSource) -> "Folder":
        return cls(source.format, source.uri, frozenset(storage.list_files(source.uri)))

    def file(self, pattern: str) -> str | None:
        """The last file directly in the folder whose name fits ``pattern``."""
        names = sorted(path for path in self.paths if "/" not in path and fnmatch.fnmatchcase(path, pattern))
        return names[-1] if names else None

    def label_file(self, pattern: str) -> str:
        """``file``, which must be there."""
        name = self.file(pattern)
        if name is None:
            raise UserError(f"{self.uri} holds no {pattern}, which {self.name} needs; give the folder that holds it")
        return name

    def table(self, name: str, columns: Sequence[str]) -> pd.DataFrame:
        """The CSV ``name`` as strings without blanks around them, '' where empty; it must have ``columns``."""
        table = read_table(storage.join(self.uri, name)).fillna("")
        missing = [column for column in columns if column not in table.columns]
        if missing:
            raise UserError(
                f"{storage.join(self.uri, name)} has no column {missing[0]}; {self.name} needs {', '.join(columns)}, "
                "so fetch the file as it is published"
            )
        return table.apply(lambda column: column.str.strip())

    def lines(self, name: str) -> list[str]:
        """The lines of the text file ``name`` without the blanks around them."""
        return [line.strip() for line in decode_text(storage.read_bytes(storage.join(self.uri, name))).splitlines()]

    def first(self, *paths: str) -> str | None:
        """The first of ``paths`` at which a file lies."""
        return next((path for path in paths if path in self.paths), None)

    def films_by_name(self, names: Iterable[str], stem: bool = False, under: str = "") -> dict[str, str]:
        """Where under the folder ``under`` the film of each of ``names`` lies; those that lie nowhere are not in it.

        ``stem``: names are those of the files without their ending.
        """
        wanted, found = set(names), defaultdict(list)
        for path in sorted(self.paths):
            start, dot, ending = path.rpartition("/")[2].rpartition(".")
            key = start if stem else start + dot + ending
            if key in wanted and path.startswith(under) and f".{ending.lower()}" in FILM_ENDINGS:
                found[key].append((FILM_ENDINGS.index(f".{ending.lower()}"), path))
        return {name: self._only(name, sorted(places)) for name, places in found.items()}

    def _only(self, name: str, places: list[tuple[int, str]]) -> str:
        if len(places) > 1 and places[0][0] == places[1][0]:
            both = f"{places[0][1]} and {places[1][1]}"
            raise UserError(f"{self.uri}: image {name} is there as {both}; keep one of them under the folder")
        return places[0][1]

    def present(self, rows: pd.DataFrame, table_name: str) -> tuple[pd.DataFrame, dict[str, int]]:
        """The rows (one an image) that have a ``path``, and how many have none; too many are refused."""
        gone = rows["path"].isna()
        missing = int(gone.sum())
        if missing > MOST_MISSING * len(rows):
            raise UserError(
                f"{self.uri}: {missing} of the {len(rows)} images of {table_name} are not there, the first of them "
                f"{rows.loc[gone, 'image_id'].iloc[0]}; fetch them, or take their rows out of {table_name}"
            )
        return rows[~gone], {MISSING: missing} if missing else {}


def numbers(values: pd.DataFrame, file: str) -> pd.DataFrame:
    """Strings as numbers, NaN where empty; else a ``UserError`` that names the first row of ``file`` that holds none."""
    parsed = values.apply(pd.to_numeric, errors="coerce").astype(np.float64)
    odd = ~np.isfinite(parsed) & (values != "")
    if odd.to_numpy().any():
        place, column = np.argwhere(odd.to_numpy())[0]
        raise UserError(
            f"{file}: {values.columns[column]} {values.iloc[place, column]} in row {place + 1} under the header is no "
            "number; correct it, or fetch the file again"
        )
    return parsed


def box(kind: int, x0: float, y0: float, x1: float, y1: float) -> dict[str, Any]:
    """One entry of a row's ``boxes``."""
    return {"kind": kind, "x0": x0, "y0": y0, "x1": x1, "y1": y1}


def first_by_hash(groups: Iterable[str], seed: int, count: int) -> set[str]:
    """The ``count`` groups that lie first."""
    return set(sorted(set(groups), key=lambda group: (place_of(seed, group), group))[:count])


def split_by_hash(groups: pd.Series, seed: int, shares: dict[str, int]) -> pd.Series:
    """The split of each row's group, drawn with ``shares`` in hundredths.

    By the places that ``draw_split`` goes by: what is drawn here for test from the last tenths was not drawn for training there.
    """
    ends = np.cumsum(list(shares.values()))
    if ends[-1] != 100:
        raise ValueError(f"shares {shares} add up to {ends[-1]}, not to 100")
    names = list(shares)
    drawn = {each: names[int(np.searchsorted(ends, 100 * place_of(seed, each), "right"))] for each in groups.unique()}
    return groups.map(drawn)


def mask_on_film(mask_HW: NDArray[np.bool_], source: FileSource, path: str, film: Film) -> NDArray[np.bool_]:
    """A mask of the scan at ``path``, whatever its own size, on the ``film`` that was read from it."""
    # a frame does not tell how large its scan was, so that the file is read again; a JPEG at an eighth
    data = storage.read_bytes(storage.join(source.uri, path))
    _, height, width = decode_scan(data, path, Target(1, "longer"))
    if mask_HW.shape != (height, width):
        mask_HW = np.array(Image.fromarray(mask_HW).resize((width, height), Image.Resampling.NEAREST))
    return film.frame.mask(mask_HW, *film.grey_HW.shape)
