"""What every downstream set shares: one table of its images, the classes they are labelled with, and where findings lie.

C classes, N boxes, K box classes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cmcgns.data.framing import Film
from cmcgns.data.sources import Reader
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
