"""A labelled set of films, whatever layout it came in, and what its readers share."""

import fnmatch
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from cmcgns import storage
from cmcgns.data.decode import decode_scan
from cmcgns.data.image import Film, Target
from cmcgns.data.readers import FileSource, Reader
from cmcgns.data.readers.base import decode_text, place_of, read_table
from cmcgns.errors import UserError

SPLITS = ("train", "valid", "test")
What = Literal["masks", "boxes", "labels"]
BOX_TYPE = pa.struct(
    [pa.field("kind", pa.int32()), *(pa.field(name, pa.float64()) for name in ("x0", "y0", "x1", "y1"))]
)

IMAGE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("path", pa.string()),  # as the set's source reads it
        pa.field("group", pa.string()),  # what splits keep together: the patient where the set names one
        pa.field("split", pa.string()),  # train, valid or test
        pa.field("labels", pa.list_(pa.float32())),  # one a class: 1, 0, or NaN where unknown; empty without classes
        # in pixels of the scan; null where nobody has looked, empty where nothing is
        pa.field("boxes", pa.list_(BOX_TYPE)),
        # how each part of the mask is written down; null where nobody has looked
        pa.field("masks", pa.list_(pa.string())),
    ]
)


class FilmSource(Protocol):
    """Where the films of a set lie; a corpus of pretraining is one, too."""

    @property
    def uri(self) -> str: ...

    def reader(self, paths: Sequence[str], films: bool = True) -> Reader:
        """What reads the films at ``paths``."""
        ...


@dataclass(frozen=True)
class Places:
    """Where findings lie on a film, in its pixels."""

    kind_N: NDArray[np.int32]
    """Place of each box's class in ``box_classes``."""
    box_N4: NDArray[np.float64]
    """x0, y0, x1, y1; x1 and y1 lie just beyond the last pixel."""
    mask_KHW: NDArray[np.bool_]
    """One for each of the set's ``mask_classes``."""


@dataclass(frozen=True)
class ImageSet:
    """A downstream set. Picklable: it travels into Ray tasks, by reference where it is large."""

    name: str
    source: FilmSource
    table: pa.Table = field(repr=False)
    """``IMAGE_SCHEMA``, in the set's own fixed order."""
    rule: str
    """How images came into their splits, in words."""
    classes: tuple[str, ...] = ()
    exclusive: bool = False
    """Whether every image is of exactly one class; else each class is there or not."""
    box_classes: tuple[str, ...] = ()
    mask_classes: tuple[str, ...] = ()
    filtered: dict[str, int] = field(default_factory=dict)
    """Images left out on purpose, by reason."""

    @property
    def kind(self) -> str:
        """Whose layout it has: its name up to a colon."""
        return self.name.split(":")[0]

    def split(self, name: str) -> pa.Table:
        """The images of one split, in the set's order."""
        return self.table.filter(pc.equal(self.table["split"], name))

    def seen(self, rows: pa.Table, what: What) -> pa.Table:
        """Those of ``rows`` on which somebody has looked for ``what``."""
        if what == "masks" and type(self).paint is ImageSet.paint:
            what = "boxes"  # which are what it paints
        return rows.filter(pc.is_valid(rows[what]))

    def places(self, row: dict[str, Any], film: Film) -> Places:
        """Where the findings of a row of ``table`` lie on its ``film``."""
        height, width = film.grey_HW.shape
        boxes = row["boxes"] or []
        box_N4 = np.array([[box[side] for side in ("x0", "y0", "x1", "y1")] for box in boxes], np.float64).reshape(
            -1, 4
        )
        kind_N = np.array([box["kind"] for box in boxes], np.int32)
        moved_N4 = film.frame.boxes(box_N4, height, width)
        seen_N = (moved_N4[:, 2] > moved_N4[:, 0]) & (moved_N4[:, 3] > moved_N4[:, 1])
        places = Places(kind_N[seen_N], moved_N4[seen_N], np.zeros((len(self.mask_classes), height, width), bool))
        self.paint(row, film, places)
        return places

    def paint(self, row: dict[str, Any], film: Film, places: Places) -> None:
        """Set ``places.mask_KHW``: here the boxes, each filled; a set with masks of its own paints those."""
        if self.mask_classes:
            places.mask_KHW[:] |= filled(places.box_N4, *film.grey_HW.shape)

    def digest(self, split: str) -> str:
        """Hash of the split's image ids, sorted, by which two evaluations know that they saw the same images."""
        ids = sorted(self.split(split)["image_id"].to_pylist())
        return hashlib.blake2b("\n".join(ids).encode(), digest_size=6).hexdigest()


def filled(box_N4: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """A mask of the pixels whose centres lie in any of the boxes, (height, width)."""
    mask_HW = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in np.ceil(np.asarray(box_N4) - 0.5).astype(int):
        mask_HW[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    return mask_HW


def image_table(rows: list[dict[str, Any]]) -> pa.Table:
    """``rows`` as a table of ``IMAGE_SCHEMA``; what a row does not name is null."""
    return pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA)


def check_set(images: ImageSet) -> ImageSet:
    """``images``, with ids that name one image each and groups that stay in one split.

    Raises:
        UserError: an id twice, a group in two splits, no image at all.
    """
    table = images.table
    if not len(table):
        raise UserError(f"{images.name} at {images.source.uri}: its tables name no image")
    if len(table["image_id"].unique()) < len(table):
        counted = pc.value_counts(table["image_id"]).to_pylist()
        twice = next(each["values"] for each in counted if each["counts"] > 1)
        raise UserError(f"{images.name} at {images.source.uri}: image {twice} is there twice")
    torn = table.group_by("group").aggregate([("split", "count_distinct")])
    torn = torn.filter(pc.greater(torn["split_count_distinct"], 1))
    if len(torn):
        raise UserError(f"{images.name} at {images.source.uri}: {len(torn)} groups are torn apart by the splits")
    return images


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
