"""Boxes and masks are moved to the padded square like the film."""

import numpy as np
import pytest

from cmcgns.data.image import resize_image
from cmcgns.evaluate.films import center_crop, patch_coverage, resize_boxes, resize_masks

SHAPES = [(200, 200), (150, 320), (320, 150), (97, 241), (24, 30), (30, 11)]
"""Height and width: square, wide, tall, odd, and films that are enlarged."""


def bright(shape: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """A dark film with a bright rectangle, and the corners of that."""
    height, width = shape
    x0, y0, x1, y1 = width // 5, height // 4, width * 3 // 4, height * 2 // 3
    grey_HW = np.full(shape, 20, np.uint8)
    grey_HW[y0:y1, x0:x1] = 220
    return grey_HW, [x0, y0, x1, y1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [64, 51])
def test_a_box_lies_around_what_is_bright_on_the_square(shape: tuple[int, int], side: int) -> None:
    grey_HW, box = bright(shape)
    ys, xs = np.nonzero(resize_image(grey_HW, side) > 120)
    (moved,) = resize_boxes(np.array([box]), shape, side)
    # a pixel is set if half of it is in the rectangle, so edges are accurate to half a pixel
    assert moved == pytest.approx([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], abs=0.51)
    assert resize_boxes(np.zeros((0, 4)), shape, side).shape == (0, 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [64, 51])
def test_a_mask_is_set_where_the_square_is_bright(shape: tuple[int, int], side: int) -> None:
    grey_HW, _ = bright(shape)
    mask_KHW = np.stack([grey_HW > 120, np.ones(shape, bool), np.zeros(shape, bool)])
    square_KRR = resize_masks(mask_KHW, side)
    shown = resize_image(grey_HW, side)
    # half of a pixel is bright at 120: films are rounded to whole grey levels, so that pixels of just half may differ
    clear = np.abs(shown.astype(int) - 120) > 2
    assert clear.mean() > 0.95
    assert (square_KRR[0] == (shown > 120))[clear].all()
    assert (square_KRR[1] == (shown > 0)).all()
    assert not square_KRR[2].any()


def test_the_corners_of_a_film_are_the_corners_of_what_it_fills() -> None:
    for shape in SHAPES:
        filled_RR = resize_masks(np.ones((1, *shape), bool), 64)[0]
        ys, xs = np.nonzero(filled_RR)
        (moved,) = resize_boxes(np.array([[0, 0, shape[1], shape[0]]]), shape, 64)
        assert moved.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert max(moved[2] - moved[0], moved[3] - moved[1]) == 64


@pytest.mark.parametrize("grid", [1, 4, 7])
def test_the_share_of_a_patch_is_that_of_a_loop_over_its_pixels(grid: int) -> None:
    mask_KRR = np.random.default_rng(grid).random((3, 28, 28)) < 0.3
    found_KP = patch_coverage(mask_KRR, grid)
    cell = 28 // grid
    for k in range(3):
        for row in range(grid):
            for column in range(grid):
                pixels = [mask_KRR[k, row * cell + y, column * cell + x] for y in range(cell) for x in range(cell)]
                assert found_KP[k, row * grid + column] == pytest.approx(sum(pixels) / cell**2)


def test_the_middle_of_a_mask_is_what_validation_shows_of_a_film() -> None:
    import torch

    from cmcgns.data.batch import crop

    for side, size in ((72, 64), (41, 32), (40, 40)):
        square_RR = np.random.default_rng(side).random((side, side)) < 0.5
        shown = crop(torch.from_numpy(square_RR)[None, None], size, None)[0, 0].numpy()
        assert (center_crop(square_RR[None], size)[0] == shown).all()
