"""Black borders are cropped, films are shrunk by area, boxes and masks move with them."""

import io

import numpy as np
import pytest
from PIL import Image

from cmcgns.data.decode import decode_image
from cmcgns.data.image import DecodedImage, Frame, Target, shrink, without_borders
from cmcgns.phantom import PhantomCorpus


def scan(grey_HW: np.ndarray) -> DecodedImage:
    return DecodedImage(grey_HW, *grey_HW.shape)


def bordered() -> np.ndarray:
    """A film of 60 x 80 on a black image of 100 x 120."""
    grey_HW = np.zeros((100, 120), np.uint8)
    grey_HW[10:70, 30:110] = np.random.default_rng(0).integers(30, 200, (60, 80))
    return grey_HW


def test_black_borders_are_cropped_and_black_inside_is_kept() -> None:
    grey_HW = bordered()
    grey_HW[40, :] = 0
    film = without_borders(scan(grey_HW))
    assert film.frame == Frame(30, 10, 110, 70)
    assert (film.grey_HW == grey_HW[10:70, 30:110]).all()


@pytest.mark.parametrize("level", [0, 8])
def test_an_all_black_film_is_not_cropped(level: int) -> None:
    film = without_borders(scan(np.full((8, 9), level, np.uint8)))
    assert film.frame == Frame(0, 0, 9, 8)


def test_a_jpeg_and_its_lossless_copy_are_cropped_equally() -> None:
    """Within one line: JPEG leaves a few grey levels next to an edge."""
    corpus = PhantomCorpus(40, seed=2, height=320, width=384)
    cut = 0
    for number in range(40):
        grey_HW = corpus.render(number)
        file = io.BytesIO()
        Image.fromarray(grey_HW).save(file, "JPEG", quality=95)
        lossless, lossy = without_borders(scan(grey_HW)), without_borders(decode_image(file.getvalue(), "film.jpg"))
        assert np.abs(np.array(lossy.frame) - lossless.frame).max() <= 1
        cut += lossless.frame != Frame(0, 0, 384, 320)
    assert cut >= 10


def test_the_frame_of_a_film_decoded_at_half_scale_is_in_pixels_of_the_file() -> None:
    grey_HW = np.zeros((1200, 1600), np.uint8)
    grey_HW[200:1000, 320:1440] = 150
    file = io.BytesIO()
    Image.fromarray(grey_HW).save(file, "JPEG", quality=95)
    found = decode_image(file.getvalue(), "film.jpg", Target(256, "shorter"))
    assert found.grey_HW.shape == (600, 800)
    assert (found.height, found.width) == (1200, 1600)
    assert np.abs(np.array(without_borders(found).frame) - [320, 200, 1440, 1000]).max() <= 2


@pytest.mark.parametrize("shape", [(600, 800), (800, 600), (512, 700), (300, 400), (2000, 3)])
def test_the_shorter_side_is_shrunk_and_nothing_is_enlarged(shape: tuple[int, int]) -> None:
    film = shrink(np.zeros(shape, np.uint8), 512)
    if min(shape) <= 512:
        assert film.shape == shape
    else:
        assert min(film.shape) == 512
        assert film.shape[0] / film.shape[1] == pytest.approx(shape[0] / shape[1], rel=0.01)


def test_shrinking_by_a_whole_number_is_the_mean_of_each_block() -> None:
    grey_HW = np.random.default_rng(1).integers(0, 256, (60, 80)).astype(np.uint8)
    blocks = grey_HW[:, :78].reshape(20, 3, 26, 3)
    assert np.abs(shrink(grey_HW[:, :78], 20) - blocks.mean(axis=(1, 3))).max() <= 0.5


def test_boxes_and_masks_move_with_the_crop() -> None:
    """A bright block on the shrunken film is where its moved box and mask are."""
    grey_HW = bordered()
    grey_HW[10:70, 30:110] = 60
    grey_HW[22:46, 50:90] = 250
    film = without_borders(scan(grey_HW))
    small_HW = shrink(film.grey_HW, 30)
    seen_HW = small_HW > 155
    ys, xs = np.nonzero(seen_HW)
    (box,) = film.frame.boxes(np.array([[50, 22, 90, 46]]), *small_HW.shape)
    assert box == pytest.approx([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], abs=0.5)
    mask_HW = np.zeros(grey_HW.shape, bool)
    mask_HW[22:46, 50:90] = True
    assert (film.frame.mask(mask_HW, *small_HW.shape) == seen_HW).mean() > 0.99


def test_a_box_that_reaches_into_the_border_is_clipped() -> None:
    frame = Frame(30, 10, 110, 70)
    assert frame.boxes(np.array([[0, 0, 120, 40]]), 60, 80).tolist() == [[0, 0, 80, 30]]
