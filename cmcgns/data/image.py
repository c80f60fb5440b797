"""Grey images in memory: cropping of black borders, shrinking, and resizing to a square."""

# H, W pixels of an array, N boxes

from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from cmcgns.errors import BadRow

MAX_PIXELS = 100_000_000
"""Largest image; larger ones are rejected before they are decoded."""


class Target(NamedTuple):
    """Size to which images will be shrunk; a JPEG may be decoded at a reduced scale of at least twice this size."""

    pixels: int
    side: Literal["longer", "shorter"]

    def of(self, size: tuple[int, ...]) -> int:
        """The side of ``size`` that will become ``pixels``."""
        return max(size) if self.side == "longer" else min(size)


class DecodedImage(NamedTuple):
    """An image and its size in the file, which is larger if it was decoded at a reduced scale."""

    grey_HW: NDArray[np.uint8]
    height: int
    width: int


STRIP = 256
"""Rows converted at a time."""


def stretch(pixels_HW: NDArray[Any]) -> NDArray[np.uint8]:
    """More than 8 bits without a window: scaled so that minimum and maximum become 0 and 255."""
    low, high = float(pixels_HW.min()), float(pixels_HW.max())  # NaN if any value is
    if not np.isfinite([low, high]).all():
        raise BadRow("film has values that are not finite")
    grey = np.empty(pixels_HW.shape, np.uint8)
    for start in range(0, len(grey), STRIP):  # in float64, eight times the film
        values = pixels_HW[start : start + STRIP].astype(np.float64)
        grey[start : start + STRIP] = np.rint((values - low) * (255 / max(high - low, 1e-9)))
    return grey


LEAST_SIDE = 64
"""Pixels of the shorter side from which a picture must look like a film."""
SOME_LINES = 64
"""Rows and columns that are looked at."""
LEAST_STEP = 4
"""Mean difference of neighbours, in grey levels, below which stripes are not looked for."""


def check_looks_like_film(grey_HW: NDArray[np.uint8]) -> None:
    """Raise ``BadRow`` if a picture has one grey level or two, or stripes as of values read in the wrong places."""
    if min(grey_HW.shape) < LEAST_SIDE:
        return
    height, width = grey_HW.shape
    some_HW = grey_HW[:: max(height // SOME_LINES, 1)]
    if _levels(some_HW) <= 2 and (levels := _levels(grey_HW)) <= 2:
        raise BadRow(f"film has only {levels} grey level{'s' * (levels > 1)}")
    for lines in (some_HW, grey_HW[:, :: max(width // SOME_LINES, 1)].T):
        one, two, three = (_difference(lines, lag) for lag in (1, 2, 3))
        if one > LEAST_STEP and min(two, three) < one / 4:
            raise BadRow(
                "film is striped: its values repeat every 2 or 3 pixels, as if colours or bytes were read as pixels"
            )


def _levels(grey_HW: NDArray[np.uint8]) -> int:
    return int(np.count_nonzero(np.bincount(grey_HW.ravel(), minlength=256)))


def _difference(lines: NDArray[np.uint8], lag: int) -> float:
    """Mean difference of pixels of a line that are ``lag`` apart."""
    return float(np.abs(lines[:, lag:].astype(np.int16) - lines[:, :-lag]).mean())


def resize_image(grey_HW: NDArray[np.uint8], resize: int) -> NDArray[np.uint8]:
    """uint8 (resize, resize): the longer side becomes ``resize``, the other is padded with 0 on both sides. May be ``grey_HW``
    itself."""
    height, width = grey_HW.shape
    scale = resize / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    scaled = grey_HW
    if scale != 1:  # prepared films usually have this size
        filter_ = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        scaled = np.asarray(cv2.resize(grey_HW, (new_width, new_height), interpolation=filter_))
    if new_height == new_width:
        return scaled
    square = np.zeros((resize, resize), dtype=np.uint8)
    top, left = (resize - new_height) // 2, (resize - new_width) // 2
    square[top : top + new_height, left : left + new_width] = scaled
    return square


BLACK = 8
"""Highest grey level that counts as black: JPEG produces such values next to an edge."""


class Frame(NamedTuple):
    """The part of an image that was kept, in pixels of the file; ``right`` and ``bottom`` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    def boxes(self, box_N4: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
        """Boxes (x0, y0, x1, y1) moved from the file to the crop of ``height`` x ``width``, and clipped to it."""
        scale = np.array([width / (self.right - self.left), height / (self.bottom - self.top)] * 2)
        moved_N4 = (np.asarray(box_N4, np.float64) - [self.left, self.top] * 2) * scale
        return np.clip(moved_N4, 0, [width, height] * 2)

    def mask(self, mask_HW: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
        """A mask moved from the file to the crop: set if at least half of the area of a pixel is set."""
        kept_HW = mask_HW[self.top : self.bottom, self.left : self.right].astype(np.float32)
        return np.asarray(cv2.resize(kept_HW, (width, height), interpolation=cv2.INTER_AREA) >= 0.5)


class CroppedImage(NamedTuple):
    """An image without its black borders."""

    grey_HW: NDArray[np.uint8]
    frame: Frame


def without_borders(image: DecodedImage) -> CroppedImage:
    """``image`` without black rows and columns at its edges; an all-black image is not cropped."""
    height, width = image.grey_HW.shape
    lit_H = np.flatnonzero(image.grey_HW.max(axis=1) > BLACK)
    if not len(lit_H):
        return uncropped(image)
    lit_W = np.flatnonzero(image.grey_HW[lit_H[0] : lit_H[-1] + 1].max(axis=0) > BLACK)
    top, bottom, left, right = int(lit_H[0]), int(lit_H[-1]) + 1, int(lit_W[0]), int(lit_W[-1]) + 1
    down, across = image.height / height, image.width / width  # above 1 if it was decoded at a reduced scale
    frame = Frame(int(left * across), int(top * down), round(right * across), round(bottom * down))
    return CroppedImage(image.grey_HW[top:bottom, left:right], frame)


def uncropped(image: DecodedImage) -> CroppedImage:
    """All of ``image``."""
    return CroppedImage(image.grey_HW, Frame(0, 0, image.width, image.height))


def shrink(grey_HW: NDArray[np.uint8], shorter: int) -> NDArray[np.uint8]:
    """The image with its shorter side reduced to ``shorter`` pixels by area averaging; never enlarged."""
    height, width = grey_HW.shape
    scale = shorter / min(height, width)
    if scale >= 1:
        return np.ascontiguousarray(grey_HW)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(grey_HW, size, interpolation=cv2.INTER_AREA))
