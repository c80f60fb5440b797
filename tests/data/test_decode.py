"""Films from unusual files, resizing, and draws that depend only on their key."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cmcgns.data.batch import CROP_STREAM, crop, keyed_uniform, mask_positions, normalise
from cmcgns.data.decode import decode_image
from cmcgns.data.image import Target, resize_image
from cmcgns.data.order import draw_key, drawn_image
from cmcgns.errors import BadRow

RAMP = np.linspace(0, 255, 30 * 40).reshape(30, 40).astype(np.uint8)
SMOOTH = np.add.outer(np.arange(800), np.arange(600)).astype(np.float32)
SMOOTH = (SMOOTH / SMOOTH.max() * 255).astype(np.uint8)


def encoded(picture: Image.Image | NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def rgba(alpha: int) -> NDArray[np.uint8]:
    return np.dstack([RAMP, RAMP, RAMP, np.full_like(RAMP, alpha)])


def test_the_suffix_does_not_decide() -> None:
    assert np.array_equal(decode_image(encoded(RAMP), "film.jpg").grey_HW, RAMP)
    assert np.array_equal(decode_image(encoded(RAMP, "TIFF"), "film.dcm").grey_HW, RAMP)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.fromarray(np.dstack([RAMP] * 3)), RAMP),
        (Image.fromarray(rgba(255)), RAMP),
        (Image.fromarray(rgba(0)), np.zeros_like(RAMP)),
        (Image.fromarray(RAMP.astype(np.uint16) * 16), RAMP),
        (Image.fromarray(RAMP).convert("P"), RAMP),
        (Image.fromarray(RAMP).convert("LA"), RAMP),
        (Image.fromarray(RAMP > 127), np.where(RAMP > 127, 255, 0)),
    ],
    ids=["RGB", "RGBA opaque", "RGBA clear", "16 bits", "palette", "LA", "1 bit"],
)
def test_every_mode_of_png_becomes_grey(picture: Image.Image, expected: NDArray[np.uint8]) -> None:
    grey = decode_image(encoded(picture), "film.png").grey_HW
    assert grey.dtype == np.uint8
    assert np.array_equal(grey, expected)


def test_a_jpeg_in_cmyk_becomes_grey() -> None:
    cmyk = Image.fromarray(np.dstack([SMOOTH] * 3)).convert("CMYK")
    grey = decode_image(encoded(cmyk, "JPEG", quality=95), "film.jpg").grey_HW
    assert abs(grey.astype(int) - SMOOTH).mean() < 3


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    grey = decode_image(encoded(SMOOTH, "JPEG", quality=95, exif=exif), "film.jpg").grey_HW
    assert grey.shape == (600, 800)
    assert abs(grey.astype(int) - np.rot90(SMOOTH, -1)).mean() < 2


def test_a_reduced_jpeg_resizes_to_nearly_the_same_film() -> None:
    data = encoded(Image.fromarray(SMOOTH).resize((2400, 3200)), "JPEG", quality=90)
    full, reduced = (
        decode_image(data, "film.jpg").grey_HW,
        decode_image(data, "film.jpg", target=Target(256, "longer")).grey_HW,
    )
    assert full.shape == (3200, 2400)
    assert reduced.shape == (800, 600)  # 1/4, because 1/8 is less than twice 256
    assert abs(resize_image(full, 256).astype(int) - resize_image(reduced, 256)).max() <= 4


def png_that_declares(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"%PDF-1.4 a document", "neither"),
        (b"<html>not found</html>", "neither"),
        (encoded(RAMP)[:-30], "truncated"),
        (encoded(SMOOTH, "JPEG")[: len(encoded(SMOOTH, "JPEG")) // 2], "truncated"),
        (encoded(RAMP)[:20], "truncated"),
        (b"\xff\xd8\xff" + b"\0" * 50, "truncated"),
        (png_that_declares(60_000, 60_000), "over the limit"),
        (png_that_declares(12_000, 12_000), "over the limit"),
        (encoded(Image.fromarray(RAMP), "TIFF", save_all=True, append_images=[Image.fromarray(RAMP)]), "2 images"),
    ],
    ids=["0 bytes", "PDF", "HTML", "PNG cut", "JPEG cut", "PNG head", "JPEG junk", "bomb", "half bomb", "two pages"],
)
def test_unreadable_files_are_bad_rows(data: bytes, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        decode_image(data, "patient-77/film.png")


def test_every_real_film_is_read(realdata: Path) -> None:
    for path in sorted((realdata / "images").iterdir()):
        grey = decode_image(path.read_bytes(), path.name).grey_HW
        with Image.open(path) as picture:
            assert grey.shape == (picture.height, picture.width)
        assert np.ptp(grey) > 50


@pytest.mark.parametrize("shape", [(256, 256), (256, 201), (100, 256), (512, 512), (300, 211), (64, 64)])
def test_a_film_of_the_size_is_only_padded_and_others_are_resized_first(shape: tuple[int, int]) -> None:
    film_HW, side = np.random.default_rng(0).integers(0, 256, shape, np.uint8), max(shape)
    size = (round(shape[1] * 256 / side), round(shape[0] * 256 / side))
    scaled = cv2.resize(film_HW, size, interpolation=cv2.INTER_AREA if side > 256 else cv2.INTER_LINEAR)
    before = [(256 - length) // 2 for length in scaled.shape]
    padding = [(start, 256 - start - length) for start, length in zip(before, scaled.shape, strict=True)]
    assert np.array_equal(resize_image(film_HW, 256), np.pad(scaled, padding))


@pytest.mark.parametrize("shape", [(512, 512), (800, 600), (600, 800), (1000, 10), (100, 80), (3, 1)])
def test_resizing_keeps_the_aspect_and_pads_with_black(shape: tuple[int, int]) -> None:
    film = resize_image(np.full(shape, 200, np.uint8), 256)
    assert film.shape == (256, 256)
    rows, columns = np.flatnonzero(film.any(axis=1)), np.flatnonzero(film.any(axis=0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert max(height, width) == 256
    exact = [max(1.0, side * 256 / max(shape)) for side in shape]
    assert abs(height - exact[0]) <= 0.5
    assert abs(width - exact[1]) <= 0.5
    assert abs((rows[0]) - (255 - rows[-1])) <= 1
    assert abs((columns[0]) - (255 - columns[-1])) <= 1
    assert (film[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 200).all()


def test_shrinking_by_a_whole_number_is_the_mean_of_each_block() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512), dtype=np.uint8)
    blocks = noise.reshape(256, 2, 256, 2).astype(float).mean(axis=(1, 3))
    assert abs(resize_image(noise, 256) - blocks).max() <= 0.75


# Draws


def splitmix(key: int, stream: int, place: int) -> float:
    """The slow, obvious twin of ``keyed_uniform``, in Python's unbounded integers."""
    limit = 2**64

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % limit
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % limit
        return x ^ (x >> 31)

    state = mix((key + mix(stream)) % limit)
    return (mix((state + (place + 1) * 0x9E3779B97F4A7C15) % limit) >> 40) / 2**24


@pytest.fixture
def key_B() -> Tensor:
    return torch.tensor([draw_key(0, epoch, f"film {number}") for epoch in range(4) for number in range(16)])


def test_keyed_draws_match_unbounded_integers(key_B: Tensor) -> None:
    draws = keyed_uniform(key_B, 5, 3)
    expected = [[splitmix(int(key), 3, place) for place in range(5)] for key in key_B]
    assert torch.equal(draws, torch.tensor(expected))


def test_keyed_draws_are_uniform_and_unrelated() -> None:
    draws = keyed_uniform(torch.arange(2000), 100, 1)  # neighbouring keys, the hardest
    counts = torch.histc(draws, bins=50, min=0, max=1)
    assert ((counts - 4000) ** 2 / 4000).sum() < 95  # chi-square, 49 degrees of freedom, p = 1e-4
    table = np.corrcoef(draws.numpy()[:200])
    assert abs(table[~np.eye(200, dtype=bool)]).max() < 0.55
    assert draws.min() >= 0
    assert draws.max() < 1
    assert not torch.equal(draws, keyed_uniform(torch.arange(2000), 100, 2))


def test_draws_do_not_depend_on_the_batch_they_are_in(key_B: Tensor) -> None:
    order = torch.randperm(len(key_B))
    assert torch.equal(keyed_uniform(key_B, 7, 1)[order], keyed_uniform(key_B[order], 7, 1))
    assert torch.equal(mask_positions(key_B, 49, 0.5)[order], mask_positions(key_B[order], 49, 0.5))
    image_B1RR = torch.randint(0, 256, (len(key_B), 1, 32, 32), dtype=torch.uint8)
    assert torch.equal(crop(image_B1RR, 24, key_B)[order], crop(image_B1RR[order], 24, key_B[order]))
    assert torch.equal(keyed_uniform(key_B, 3, 1), keyed_uniform(key_B, 7, 1)[:, :3])


def test_crops_match_a_slow_loop(key_B: Tensor) -> None:
    image_B1RR = torch.randint(0, 256, (len(key_B), 1, 40, 40), dtype=torch.uint8)
    cropped = crop(image_B1RR, 33, key_B)
    corners = set()
    for study, key in enumerate(key_B):
        top, left = (int(splitmix(int(key), CROP_STREAM, place) * 8) for place in range(2))
        corners.add((top, left))
        assert torch.equal(cropped[study, 0], image_B1RR[study, 0, top : top + 33, left : left + 33])
    assert len(corners) > 25


def test_without_keys_the_middle_is_cropped() -> None:
    image_B1RR = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6)
    assert crop(image_B1RR, 2, None).flatten().tolist() == [14, 15, 20, 21]
    assert torch.equal(crop(image_B1RR, 6, torch.tensor([5])), image_B1RR)
    with pytest.raises(ValueError, match="cannot crop 7"):
        crop(image_B1RR, 7, None)


@pytest.mark.parametrize(("positions", "ratio"), [(49, 0.5), (196, 0.5), (49, 0.1), (16, 0.99), (49, 0.75)])
def test_masks_hide_exactly_their_share(positions: int, ratio: float, key_B: Tensor) -> None:
    mask_BP = mask_positions(key_B, positions, ratio)
    assert mask_BP.dtype == torch.bool
    assert (mask_BP.sum(dim=1) == round(ratio * positions)).all()
    everywhere = mask_positions(torch.arange(4000), positions, ratio).float().mean(dim=0)
    assert (everywhere - round(ratio * positions) / positions).abs().max() < 0.04


def test_pixels_span_minus_one_to_one() -> None:
    assert normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_keys_change_with_each_of_their_parts() -> None:
    keys = {draw_key(*parts) for parts in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))}
    assert len(keys) == 4
    assert all(-(2**63) <= key < 2**63 for key in keys)
    # pinned: a resumed run must draw the same as the uninterrupted one
    assert draw_key(0, 0, "a") == 5350698289723012159


def test_each_film_of_a_study_is_used_in_some_epoch() -> None:
    drawn = [drawn_image(0, epoch, "s50414267", 3) for epoch in range(300)]
    assert all(80 <= drawn.count(film) <= 120 for film in range(3))
    assert drawn_image(0, 0, "any", 1) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_draws_are_the_same_on_the_gpu(key_B: Tensor) -> None:
    image_B1RR = torch.randint(0, 256, (len(key_B), 1, 40, 40), dtype=torch.uint8)
    assert torch.equal(keyed_uniform(key_B.cuda(), 50, 1).cpu(), keyed_uniform(key_B, 50, 1))
    assert torch.equal(mask_positions(key_B.cuda(), 49, 0.5).cpu(), mask_positions(key_B, 49, 0.5))
    assert torch.equal(crop(image_B1RR.cuda(), 32, key_B.cuda()).cpu(), crop(image_B1RR, 32, key_B))
