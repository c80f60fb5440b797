"""Phantom films inside black borders, and checks of the sets made from them."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmcgns.data.image import Frame
from cmcgns.data.labelled import ImageSet
from cmcgns.phantom import FilmTruth, PhantomCorpus

STUDIES, SIDE = 30, 64
DARKEST = 16
"""Grey level of the darkest pixel of a film, so that only the borders are cropped."""
TOP, LEFT, BOTTOM, RIGHT = 6, 9, 4, 2
KEPT = Frame(LEFT, TOP, LEFT + SIDE, TOP + SIDE)


@dataclass(frozen=True)
class Shot:
    """The first film of a phantom study, and its findings on the image with borders."""

    image_id: str
    patient_id: str
    grey_HW: NDArray[np.uint8]
    truth: FilmTruth

    @property
    def scan_HW(self) -> NDArray[np.uint8]:
        return np.pad(self.grey_HW, ((TOP, BOTTOM), (LEFT, RIGHT)))

    def boxes(self, name: str) -> list[list[float]]:
        """x0, y0, x1, y1 on the film."""
        return self.truth.boxes.get(name, [])

    def scan_xywh(self, name: str) -> list[list[float]]:
        """x, y, width, height on the image with borders."""
        return [[x0 + LEFT, y0 + TOP, x1 - x0, y1 - y0] for x0, y0, x1, y1 in self.boxes(name)]

    def mask(self, *names: str) -> NDArray[np.bool_]:
        """The union of these masks on the film."""
        mask_HW = np.zeros((SIDE, SIDE), bool)
        for name in names:
            mask_HW |= self.truth.masks.get(name, False)
        return mask_HW


@cache
def shots() -> tuple[Shot, ...]:
    """The corpus of these tests, cached."""
    corpus = PhantomCorpus(STUDIES, 0, SIDE, SIDE)
    studies = [corpus.study(i) for i in range(STUDIES)]
    return tuple(
        Shot(study.films[0].image_id, study.patient_id, np.maximum(corpus.render(i), DARKEST), corpus.truth(i))
        for i, study in enumerate(studies)
    )


def save(grey_HW: NDArray[Any], path: Path, format: str | None = None) -> None:
    """Save an image, in the format of its name unless another is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey_HW).save(path, format)


def write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def rows(images: ImageSet) -> dict[str, dict[str, Any]]:
    """The rows of a set by image id."""
    images.table.validate(full=True)
    return {row["image_id"]: row for row in images.table.to_pylist()}


def splits(images: ImageSet) -> dict[str, set[str]]:
    """The image ids of each split, checked to be non-empty and without a group in two splits."""
    found = {name: set(images.split(name)["image_id"].to_pylist()) for name in ("train", "valid", "test")}
    groups = [set(images.split(name)["group"].to_pylist()) for name in found]
    assert all(groups)
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert sum(map(len, found.values())) == len(images.table)
    return found


def seen(images: ImageSet, row: dict[str, Any]) -> tuple[list[tuple[str, list[float]]], NDArray[np.bool_]]:
    """The boxes with their classes and the masks of a row, on its cropped film."""
    film = images.source.reader([row["path"]]).read_image(row["path"])
    assert film.frame == KEPT
    places = images.annotations(row, film)
    named = [images.box_classes[kind] for kind in places.kind_N]
    return list(zip(named, places.box_N4.tolist(), strict=True)), places.mask_KHW
