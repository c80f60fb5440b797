"""A grey film in memory: its target size, black borders cut away, shrunk or padded to a square."""

from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

MAX_PIXELS = 100_000_000
"""Of a film; larger ones are refused before they are decoded."""


class Target(NamedTuple):
    """What films will be shrunk to, so that more than twice as many pixels need not be decoded."""

    pixels: int
    side: Literal["longer", "shorter"]

    def of(self, size: tuple[int, ...]) -> int:
        """The side of ``size`` that is to become ``pixels``."""
        return max(size) if self.side == "longer" else min(size)


class Scan(NamedTuple):
    """A film as decoded, and its size in the file, which is larger where it was decoded at a reduced scale."""

    grey_HW: NDArray[np.uint8]
    height: int
    width: int


def resize_film(grey_HW: NDArray[np.uint8], resize: int) -> NDArray[np.uint8]:
    """uint8 (resize, resize): the longer side becomes ``resize``, the rest is padded with 0 on both sides."""
    height, width = grey_HW.shape
    scale = resize / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    filter_ = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    square = np.zeros((resize, resize), dtype=np.uint8)
    top, left = (resize - new_height) // 2, (resize - new_width) // 2
    scaled = cv2.resize(grey_HW, (new_width, new_height), interpolation=filter_)
    square[top : top + new_height, left : left + new_width] = scaled
    return square


# H, W pixels of an array, N boxes

BLACK = 8
"""Grey level up to which a line is pure black: JPEG leaves as much beside a film's edge."""


class Frame(NamedTuple):
    """The part of a scan that was kept, in the scan's own pixels; ``right`` and ``bottom`` lie just beyond the last."""

    left: int
    top: int
    right: int
    bottom: int

    def boxes(self, box_N4: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
        """Boxes (x0, y0, x1, y1) of the scan on the film, which is now ``height`` x ``width``; cut at its edges."""
        scale = np.array([width / (self.right - self.left), height / (self.bottom - self.top)] * 2)
        moved_N4 = (np.asarray(box_N4, np.float64) - [self.left, self.top] * 2) * scale
        return np.clip(moved_N4, 0, [width, height] * 2)

    def mask(self, mask_HW: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
        """A mask of the scan on the film: set where at least half of what a pixel covers is."""
        kept_HW = mask_HW[self.top : self.bottom, self.left : self.right].astype(np.float32)
        return np.asarray(cv2.resize(kept_HW, (width, height), interpolation=cv2.INTER_AREA) >= 0.5)


class Film(NamedTuple):
    """A film without its black borders."""

    grey_HW: NDArray[np.uint8]
    frame: Frame


def without_borders(scan: Scan) -> Film:
    """The film on ``scan`` without the lines along its edges that are pure black; one that is all black stays whole."""
    height, width = scan.grey_HW.shape
    lit_H = np.flatnonzero(scan.grey_HW.max(axis=1) > BLACK)
    if not len(lit_H):
        return whole(scan)
    lit_W = np.flatnonzero(scan.grey_HW[lit_H[0] : lit_H[-1] + 1].max(axis=0) > BLACK)
    top, bottom, left, right = int(lit_H[0]), int(lit_H[-1]) + 1, int(lit_W[0]), int(lit_W[-1]) + 1
    down, across = scan.height / height, scan.width / width  # above 1 where it was decoded at a reduced scale
    frame = Frame(int(left * across), int(top * down), round(right * across), round(bottom * down))
    return Film(scan.grey_HW[top:bottom, left:right], frame)


def whole(scan: Scan) -> Film:
    """All of ``scan``."""
    return Film(scan.grey_HW, Frame(0, 0, scan.width, scan.height))


def shrink(grey_HW: NDArray[np.uint8], shorter: int) -> NDArray[np.uint8]:
    """The film with its shorter side at ``shorter`` pixels, by the mean of what each pixel covers; never enlarged."""
    height, width = grey_HW.shape
    scale = shorter / min(height, width)
    if scale >= 1:
        return np.ascontiguousarray(grey_HW)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(grey_HW, size, interpolation=cv2.INTER_AREA))
