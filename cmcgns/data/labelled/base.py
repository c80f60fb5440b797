"""A labelled set of images for downstream tasks, and functions shared by its readers."""

# N boxes, K mask classes, H, W pixels

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
from cmcgns.data.decode import decode_image
from cmcgns.data.image import CroppedImage, Target
from cmcgns.data.readers import FileSource, Reader
from cmcgns.data.readers.base import split_position
from cmcgns.data.record import FILM_TYPE, INDEX_SCHEMA
from cmcgns.data.tables import read_columns
from cmcgns.data.text import decode_text
from cmcgns.errors import UserError

SPLITS = ("train", "valid", "test")
AnnotationKind = Literal["masks", "boxes", "labels"]
BOX_TYPE = pa.struct(
    [pa.field("kind", pa.int32()), *(pa.field(name, pa.float64()) for name in ("x0", "y0", "x1", "y1"))]
)

IMAGE_SCHEMA = pa.schema(
    [
        FILM_TYPE.field("image_id"),
        FILM_TYPE.field("path"),  # for the set's source
        INDEX_SCHEMA.field("group"),  # what splits keep together: the patient if the set names one
        INDEX_SCHEMA.field("split"),
        pa.field("labels", pa.list_(pa.float32())),  # one per class: 1, 0, or NaN if unknown; empty without classes
        # in pixels of the file; null if not annotated, empty if there is none
        pa.field("boxes", pa.list_(BOX_TYPE)),
        # each part of the mask in the set's own notation; null if not annotated
        pa.field("masks", pa.list_(pa.string())),
    ]
)


class ImageSource(Protocol):
    """Source of the images of a set; a pretraining corpus is one, too."""

    @property
    def uri(self) -> str: ...

    def reader(self, paths: Sequence[str], films: bool = True) -> Reader:
        """A reader of the images at ``paths``."""
        ...


@dataclass(frozen=True)
class Annotations:
    """Boxes and masks of one image, in pixels of its crop."""

    kind_N: NDArray[np.int32]
    """Index of each box's class in ``box_classes``."""
    box_N4: NDArray[np.float64]
    """x0, y0, x1, y1; x1 and y1 are exclusive."""
    mask_KHW: NDArray[np.bool_]
    """One mask per ``mask_classes`` of the set."""


@dataclass(frozen=True)
class ImageSet:
    """A downstream set. Picklable: it is sent to Ray tasks, by reference if it is large."""

    name: str
    source: ImageSource
    table: pa.Table = field(repr=False)
    """``IMAGE_SCHEMA``, in a fixed order."""
    rule: str
    """How images were assigned to splits, in words."""
    classes: tuple[str, ...] = ()
    exclusive: bool = False
    """Whether every image has exactly one class; otherwise each class is present or absent."""
    box_classes: tuple[str, ...] = ()
    mask_classes: tuple[str, ...] = ()
    filtered: dict[str, int] = field(default_factory=dict)
    """Number of images excluded on purpose, by reason."""

    @property
    def kind(self) -> str:
        """The name of its layout: ``name`` up to a colon."""
        return self.name.split(":")[0]

    def split(self, name: str) -> pa.Table:
        """The images of one split, in the set's order."""
        return self.table.filter(pc.equal(self.table["split"], name))

    def annotated(self, rows: pa.Table, kind: AnnotationKind) -> pa.Table:
        """Those of ``rows`` that were annotated with ``kind``, also if nothing was found."""
        if kind == "masks" and type(self).paint is ImageSet.paint:
            kind = "boxes"  # its masks are painted from boxes
        return rows.filter(pc.is_valid(rows[kind]))

    def annotations(self, row: dict[str, Any], image: CroppedImage) -> Annotations:
        """The annotations of a row of ``table``, whose image is ``image``."""
        height, width = image.grey_HW.shape
        boxes = row["boxes"] or []
        corners = [[box[side] for side in ("x0", "y0", "x1", "y1")] for box in boxes]
        kind_N = np.array([box["kind"] for box in boxes], np.int32)
        moved_N4 = image.frame.boxes(np.array(corners, np.float64).reshape(-1, 4), height, width)
        inside_N = (moved_N4[:, 2] > moved_N4[:, 0]) & (moved_N4[:, 3] > moved_N4[:, 1])
        mask_KHW = np.zeros((len(self.mask_classes), height, width), bool)
        annotations = Annotations(kind_N[inside_N], moved_N4[inside_N], mask_KHW)
        self.paint(row, image, annotations)
        return annotations

    def paint(self, row: dict[str, Any], image: CroppedImage, annotations: Annotations) -> None:
        """Set ``annotations.mask_KHW``: by default to the filled boxes; a set with masks overrides this."""
        if self.mask_classes:
            annotations.mask_KHW[:] |= filled(annotations.box_N4, *image.grey_HW.shape)

    def digest(self, split: str) -> str:
        """Hash of the split's sorted image ids, to check that two evaluations used the same images."""
        ids = sorted(self.split(split)["image_id"].to_pylist())
        return hashlib.blake2b("\n".join(ids).encode(), digest_size=6).hexdigest()


def filled(box_N4: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """A mask (height, width) of the pixels whose centre is in any of the boxes."""
    mask_HW = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in np.ceil(np.asarray(box_N4) - 0.5).astype(int):
        mask_HW[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    return mask_HW


def image_table(rows: list[dict[str, Any]]) -> pa.Table:
    """``rows`` as a table of ``IMAGE_SCHEMA``; missing columns are null."""
    return pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA)


def check_set(images: ImageSet) -> ImageSet:
    """``images``, checked for unique ids and for groups that are in one split each.

    Raises:
        UserError: a duplicate id, a group in two splits, or no image.
    """
    table = images.table
    if not len(table):
        raise UserError(f"{images.name} at {images.source.uri}: its tables have no rows; check the folder")
    if len(table["image_id"].unique()) < len(table):
        counts = pc.value_counts(table["image_id"]).to_pylist()
        duplicate = next(each["values"] for each in counts if each["counts"] > 1)
        raise UserError(f"{images.name} at {images.source.uri}: image {duplicate} appears twice; keep one row")
    splits = table.group_by("group").aggregate([("split", "count_distinct")])
    in_two = splits.filter(pc.greater(splits["split_count_distinct"], 1))
    if len(in_two):
        raise UserError(
            f"{images.name} at {images.source.uri}: {len(in_two)} groups are in several splits; fix the splits"
        )
    return images


IMAGE_ENDINGS = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")
"""Endings of images looked up by name; if a name has several, the first of these is read."""
MAX_MISSING = 0.01
"""Share of the images of a label file that may be missing."""
MISSING = "image missing"


@dataclass(frozen=True)
class Folder:
    """The folder of a downstream set and its files."""

    name: str
    uri: str
    paths: frozenset[str]

    @classmethod
    def of(cls, source: FileSource) -> "Folder":
        return cls(source.format, source.uri, frozenset(storage.list_files(source.uri)))

    def file(self, pattern: str) -> str | None:
        """The last file directly in the folder whose name matches ``pattern``."""
        names = sorted(path for path in self.paths if "/" not in path and fnmatch.fnmatchcase(path, pattern))
        return names[-1] if names else None

    def label_file(self, *patterns: str) -> str:
        """Like ``file``, by the first of ``patterns`` that any file matches; one must."""
        name = next(filter(None, map(self.file, patterns)), None)
        if name is None:
            wanted = " or ".join(patterns)
            raise UserError(f"{self.uri} has no {wanted}, which {self.name} needs; give the folder that contains it")
        return name

    def table(self, name: str, columns: Sequence[str]) -> pd.DataFrame:
        """The CSV ``name`` as stripped strings, '' for blanks; it must have ``columns``."""
        return read_columns(storage.join(self.uri, name), columns, self.name)

    def lines(self, name: str) -> list[str]:
        """The stripped lines of the text file ``name``."""
        return [line.strip() for line in decode_text(storage.read_bytes(storage.join(self.uri, name))).splitlines()]

    def first(self, *paths: str) -> str | None:
        """The first of ``paths`` that exists."""
        return next((path for path in paths if path in self.paths), None)

    def paths_by_name(self, names: Iterable[str], stem: bool = False, under: str = "") -> dict[str, str]:
        """Path of the image of each of ``names`` in the subfolder ``under``, without those that do not exist.

        ``stem``: names have no ending.
        """
        wanted, candidates = set(names), defaultdict(list)
        for path in sorted(self.paths):
            start, dot, ending = path.rpartition("/")[2].rpartition(".")
            key = start if stem else start + dot + ending
            if key in wanted and path.startswith(under) and f".{ending.lower()}" in IMAGE_ENDINGS:
                candidates[key].append((IMAGE_ENDINGS.index(f".{ending.lower()}"), path))
        return {name: self._preferred(name, sorted(paths)) for name, paths in candidates.items()}

    def _preferred(self, name: str, paths: list[tuple[int, str]]) -> str:
        if len(paths) > 1 and paths[0][0] == paths[1][0]:
            both = f"{paths[0][1]} and {paths[1][1]}"
            raise UserError(f"{self.uri}: image {name} exists twice, as {both}; keep one of them in the folder")
        return paths[0][1]

    def present(
        self, rows: pd.DataFrame, table_name: str, fix: str = "download them"
    ) -> tuple[pd.DataFrame, dict[str, int]]:
        """The rows (one per image) that have a ``path``, and how many have none; ``UserError`` if these are too many."""
        absent = rows["path"].isna()
        missing = int(absent.sum())
        if missing > MAX_MISSING * len(rows):
            raise UserError(
                f"{self.uri}: {missing} of the {len(rows)} images of {table_name} are missing, such as "
                f"{rows.loc[absent, 'image_id'].iloc[0]}; {fix}, or remove their rows from {table_name}"
            )
        return rows[~absent], {MISSING: missing} if missing else {}


def box(kind: int, x0: float, y0: float, x1: float, y1: float) -> dict[str, Any]:
    """One entry of a row's ``boxes``."""
    return {"kind": kind, "x0": x0, "y0": y0, "x1": x1, "y1": y1}


def first_by_hash(groups: Iterable[str], seed: int, count: int) -> set[str]:
    """The first ``count`` groups by ``split_position``."""
    return set(sorted(set(groups), key=lambda group: (split_position(seed, group), group))[:count])


def split_by_hash(groups: pd.Series, seed: int, shares: dict[str, int]) -> pd.Series:
    """The split of each row's group, drawn with ``shares`` in percent.

    It uses the positions of ``draw_split``: groups drawn here for test from the last tenths are not in training there.
    """
    ends = np.cumsum(list(shares.values()))
    if ends[-1] != 100:
        raise ValueError(f"shares {shares} add up to {ends[-1]}, not 100")
    names = list(shares)
    drawn = {
        each: names[int(np.searchsorted(ends, 100 * split_position(seed, each), "right"))] for each in groups.unique()
    }
    return groups.map(drawn)


def tested_on_valid(split: pd.Series, groups: pd.Series, seed: int) -> tuple[pd.Series, str]:
    """Splits of a set without test images, and the rule in words: valid is test, and a tenth of the training groups is valid."""
    drawn = split_by_hash(groups, seed, {"train": 90, "valid": 10})
    rule = f"valid is test, and a tenth of the train groups, drawn with seed {seed}, is valid"
    return drawn.where(split == "train", split.replace("valid", "test")), rule


def mask_on_image(mask_HW: NDArray[np.bool_], source: FileSource, path: str, image: CroppedImage) -> NDArray[np.bool_]:
    """A mask of the file at ``path``, in any resolution, moved to ``image``, which was read from that file."""
    # the frame lacks the size of the file, so it is read again; a JPEG at 1/8 of its scale
    data = storage.read_bytes(storage.join(source.uri, path))
    _, height, width = decode_image(data, path, Target(1, "longer"))
    if mask_HW.shape != (height, width):
        mask_HW = np.array(Image.fromarray(mask_HW).resize((width, height), Image.Resampling.NEAREST))
    return image.frame.mask(mask_HW, *image.grey_HW.shape)
