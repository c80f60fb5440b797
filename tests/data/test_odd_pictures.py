"""PNG, JPEG and TIFF files as devices and archives write them: every depth, colour, alpha and polarity, and broken side data."""

import io
import itertools
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from cmcgns.data.decode import decode_image
from cmcgns.data.image import check_looks_like_film
from cmcgns.data.repairs import noted
from cmcgns.errors import BadRow
from tests.data.coded_films import expected, shot
from tests.data.test_dicom import stretched

FILM = shot()
GREY = (FILM // 16).astype(np.uint8)
DEFLATE = 8
"""Compression of TIFF."""
FULL = np.full_like(FILM, 65535)


BYTES = tuple(itertools.product("<>", (False, True)))
"""The forms of a TIFF: the order of its bytes, and whether it is a BigTIFF."""


def read(data: bytes) -> tuple[NDArray[np.uint8], set[str]]:
    """The film, and the rules by which it was read."""
    with noted() as notes:
        return decode_image(data, "film").grey_HW, set(notes)


def png(pixels: NDArray[Any], **options: Any) -> bytes:
    """A PNG of any depth and number of channels (grey, grey with alpha, RGB, RGBA), written chunk by chunk."""
    height, width, channels = (*pixels.shape, 1)[:3]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *options.get("before", ()), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in chunks)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def tiff(pixels: NDArray[Any], photometric: int, order: str = "<", big: bool = False, **tags: int) -> bytes:
    """A TIFF, or a ``big`` one, of one strip; ``tags`` by number, as ``t274=3``."""
    height, width, samples = (*pixels.shape, 1)[:3]
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if tags.get("t259") == DEFLATE else data
    bits, kind = 8 * pixels.itemsize, {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    # of each tag the type of its values (short, long, long of 8 bytes) and the values
    whole = "Q" if big else "I"
    entries: dict[int, tuple[str, list[int]]] = {
        256: (whole, [width]), 257: (whole, [height]), 258: ("H", [bits] * samples), 259: ("H", [1]), 262: ("H", [photometric]),
        273: (whole, [0]), 277: ("H", [samples]), 278: ("I", [height]), 279: (whole, [len(data)]), 339: ("H", [kind]),
    }  # fmt: skip
    entries |= {int(name[1:]): ("H", [value]) for name, value in tags.items()}
    room, counted, version = (
        (8, "Q", struct.pack(f"{order}HHH", 43, 8, 0)) if big else (4, "H", struct.pack(f"{order}H", 42))
    )
    first = 2 + len(version) + room
    extra = first + struct.calcsize(f"<{counted}") + len(entries) * (4 + 2 * room) + room
    outside = b""
    if samples * 2 > room:
        outside = struct.pack(f"{order}{samples}H", *entries[258][1])
    entries[273] = (whole, [extra + len(outside)])
    out = (b"II" if order == "<" else b"MM") + version + struct.pack(f"{order}{whole}{counted}", first, len(entries))
    for tag, (type_, values) in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}{type_}", *values)
        if len(packed) > room:
            packed = struct.pack(f"{order}{whole}", extra)
        out += struct.pack(f"{order}HH{whole}", tag, {"H": 3, "I": 4, "Q": 16}[type_], len(values)) + packed.ljust(
            room, b"\0"
        )
    return out + bytes(room) + outside + data


@pytest.mark.parametrize(
    "pixels",
    [FILM, np.dstack([FILM, FULL]), np.dstack([FILM] * 3), np.dstack([FILM] * 3 + [FULL])],
    ids=["grey", "grey with alpha", "RGB", "RGBA"],
)
def test_16_bits_per_colour_keep_their_lower_8(pixels: NDArray[np.uint16]) -> None:
    assert np.array_equal(read(png(pixels))[0], expected())
    if pixels.ndim == 2 or pixels.shape[2] > 2:
        for form in BYTES:
            assert np.array_equal(read(tiff(pixels, 1 if pixels.ndim == 2 else 2, *form))[0], expected())


def test_colours_of_16_bits_become_luminance() -> None:
    colour = np.dstack([FILM * 16, FILM[::-1] * 8, 65535 - FILM * 4])
    light = colour @ np.array([0.299, 0.587, 0.114])
    assert abs(read(png(colour))[0].astype(int) - stretched(light)).max() <= 1


def test_half_transparent_pixels_of_16_bits_are_half_as_bright() -> None:
    alpha = FULL.copy()
    alpha[:, :40] = 32768
    seen = FILM * (alpha / 65535)
    assert abs(read(png(np.dstack([FILM, alpha])))[0].astype(int) - stretched(np.rint(seen))).max() <= 1


@pytest.mark.parametrize("pixels", [np.dstack([FILM, FULL]), np.dstack([FILM] * 3)], ids=["alpha", "RGB"])
def test_a_broken_png_of_16_bits_is_refused(pixels: NDArray[np.uint16]) -> None:
    whole = png(pixels)
    middle = len(whole) // 2
    for broken in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]):
        with pytest.raises(BadRow, match="truncated or broken"):
            decode_image(broken, "film.png")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("photometric", [0, 1], ids=["white is 0", "black is 0"])
@pytest.mark.parametrize("big", [False, True], ids=["TIFF", "BigTIFF"])
def test_the_polarity_of_a_tiff_is_kept_at_every_depth(big: bool, photometric: int, kind: Any, order: str) -> None:
    values = (GREY if kind == np.uint8 else FILM).astype(kind)
    shown = values if kind == np.uint8 else stretched(values)
    grey, _ = read(tiff(values, photometric, order, big))
    assert np.array_equal(grey, 255 - shown if photometric == 0 else shown)


@pytest.mark.parametrize("pixels", [GREY, FILM, np.dstack([GREY] * 3)], ids=["8 bits", "16 bits", "RGB"])
def test_a_bigtiff_has_the_pixels_of_the_tiff(pixels: NDArray[Any]) -> None:
    shown = expected() if pixels is FILM else GREY
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF", big_tiff=True)
    written = [file.getvalue()]
    for order, tags in itertools.product("<>", ({}, {"t259": DEFLATE})):
        photometric = 1 if pixels.ndim == 2 else 2
        assert np.array_equal(read(tiff(pixels, photometric, order, **tags))[0], shown)
        written.append(tiff(pixels, photometric, order, big=True, **tags))
    for data in written:
        assert data[:4] in (b"II+\0", b"MM\0+")
        assert np.array_equal(read(data)[0], shown)
        for length in (4, 12, 40, len(data) // 2):
            with pytest.raises(BadRow, match="truncated or broken"):
                decode_image(data[:length], "film.tif")


def test_colours_of_8_bits_in_a_bigtiff_become_luminance() -> None:
    colour = np.dstack([GREY, GREY[::-1], 255 - GREY])
    light = np.rint(colour @ np.array([0.299, 0.587, 0.114]))
    for order in "<>":
        assert abs(read(tiff(colour, 2, order, big=True))[0] - light).max() <= 1


def test_a_bigtiff_of_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    for order, says in (("<", "film of 10001 x 10000 pixels is over the limit"), (">", "truncated or broken")):
        huge = tiff(np.zeros((10_001, 10_000), np.uint8), 1, order, big=True, t259=DEFLATE)
        with pytest.raises(BadRow, match=says):
            decode_image(huge, "film.tif")


def test_a_bigtiff_of_two_films_is_refused() -> None:
    one = tiff(FILM, 1, ">", big=True)
    (entries,) = struct.unpack_from(">Q", one, 16)
    next_image = 16 + 8 + 20 * entries
    two = one[:next_image] + struct.pack(">Q", len(one)) + one[next_image + 8 :] + one[16 : next_image + 8]
    with pytest.raises(BadRow, match="several images, not one film"):
        decode_image(two, "film.tif")


def test_a_turned_picture_of_16_bits_is_put_upright() -> None:
    colour, exif = np.dstack([FILM] * 3), Image.Exif()
    exif[0x0112] = 6
    turned_png = png(colour, before=[(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))])
    for turned in (turned_png, *(tiff(colour, 2, *form, t274=6) for form in BYTES)):
        assert np.array_equal(read(turned)[0], np.rot90(expected(), -1))


# Broken side data


def with_chunk(name: bytes, body: bytes, broken: bool = True) -> bytes:
    """The film as PNG with one more chunk, whose checksum is wrong if ``broken``."""
    extra = chunk(name, body)
    if broken:
        extra = extra[:-1] + bytes([extra[-1] ^ 1])
    whole = png(GREY)
    at = whole.index(b"IDAT") - 4
    return whole[:at] + extra + whole[at:]


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (b"tEXt", b"Comment\0made by a device"),
        (b"pHYs", struct.pack(">IIB", 5000, 5000, 1)),
        (b"gAMA", struct.pack(">I", 45455)),
        (b"tIME", bytes([7, 220, 1, 1, 1, 1, 1])),
        (b"iCCP", b"profile\0\0" + zlib.compress(b"x")),
        (b"prVt", b"private"),
    ],
)
def test_a_side_chunk_with_a_wrong_checksum_costs_no_film(name: bytes, body: bytes) -> None:
    grey, rules = read(with_chunk(name, body))
    assert np.array_equal(grey, GREY)
    assert rules <= {"PNG with broken side chunks"}
    assert np.array_equal(read(with_chunk(name, body, broken=False))[0], GREY)


def test_a_text_that_is_too_long_for_pillow_costs_no_film() -> None:
    text = b"Comment\0\0" + zlib.compress(bytes(2 * PngImagePlugin.MAX_TEXT_CHUNK))
    assert np.array_equal(read(with_chunk(b"zTXt", text, broken=False))[0], GREY)


@pytest.mark.parametrize("name", [b"IHDR", b"IDAT"])
def test_a_fault_in_what_the_pixels_need_is_refused(name: bytes) -> None:
    whole = png(GREY)
    at = whole.index(name) + 20 if name == b"IDAT" else whole.index(name) + 4 + 13
    with pytest.raises(BadRow, match="truncated or broken"):
        decode_image(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], "film.png")


def test_broken_exif_costs_no_film() -> None:
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, "JPEG", quality=98, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert abs(read(buffer.getvalue())[0].astype(int) - GREY).max() <= 6


# What a film can be


def test_pictures_that_are_no_films_are_refused() -> None:
    for levels in (np.full((80, 90), 7, np.uint8), np.where(GREY > 100, 255, 0).astype(np.uint8)):
        with pytest.raises(BadRow, match=r"film has only [12] grey level"):
            check_looks_like_film(levels)


def test_colours_read_as_pixels_are_refused_and_films_are_not() -> None:
    large = cv2.resize(GREY, (480, 576))
    ybr = np.dstack([large, np.full_like(large, 128), np.full_like(large, 128)])
    as_pixels = ybr.reshape(-1)[: large.size].reshape(large.shape)
    bytes_of_words = (large.astype(np.uint16) * 8).view(np.uint8)[:, :480]
    for striped in (as_pixels, as_pixels.T.copy(), bytes_of_words):
        with pytest.raises(BadRow, match="striped"):
            check_looks_like_film(striped)
    rng = np.random.default_rng(0)
    for sound in (large, GREY, 255 - large, rng.integers(0, 256, (200, 300), np.uint8), np.zeros((20, 30), np.uint8)):
        check_looks_like_film(sound)
