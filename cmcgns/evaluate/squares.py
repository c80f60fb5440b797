"""Boxes and masks of a film on the padded square that an encoder sees, moved as ``resize_film`` moves the film itself.

N boxes, K masks, R pixels of the square.
"""

from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]
Pixel = TypeVar("Pixel", np.bool_, np.uint8)


def _placed(height: int, width: int, side: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the film on its square."""
    scale = side / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    return (side - new_height) // 2, (side - new_width) // 2, new_height, new_width


def square_boxes(box_N4: Floats, size: tuple[int, ...], side: int) -> Floats:
    """Boxes (x0, y0, x1, y1) of a film of ``size`` (height, width) on its square of ``side`` pixels."""
    height, width = size
    top, left, new_height, new_width = _placed(height, width, side)
    scale = np.array([new_width / width, new_height / height] * 2)
    return np.asarray(box_N4, np.float64) * scale + np.array([left, top] * 2)


def square_masks(mask_KHW: Masks, side: int) -> Masks:
    """Masks (K, side, side): set where at least half of what a pixel covers is."""
    _, height, width = mask_KHW.shape
    top, left, new_height, new_width = _placed(height, width, side)
    filter_ = cv2.INTER_AREA if side < max(height, width) else cv2.INTER_LINEAR  # as resize_film has it
    square_KRR = np.zeros((len(mask_KHW), side, side), bool)
    for k, mask_HW in enumerate(mask_KHW):
        scaled = cv2.resize(mask_HW.astype(np.float32), (new_width, new_height), interpolation=filter_)
        square_KRR[k, top : top + new_height, left : left + new_width] = scaled >= 0.5
    return square_KRR


def middle(values_KRR: NDArray[Pixel], size: int) -> NDArray[Pixel]:
    """The middle ``size`` pixels of squares, as validation crops films."""
    start = (values_KRR.shape[-1] - size) // 2
    return values_KRR[..., start : start + size, start : start + size]


def patch_coverage(mask_KRR: Masks, grid: int) -> Floats:
    """Share of each of ``grid`` x ``grid`` patches that each mask covers, (K, P) in raster order."""
    cell = mask_KRR.shape[-1] // grid
    cells = mask_KRR.reshape(len(mask_KRR), grid, cell, grid, cell)
    return np.asarray(cells.mean((2, 4)).reshape(len(mask_KRR), grid * grid), np.float64)
