"""Picture files that Pillow refuses or cuts to 8 bits: PNG with broken side chunks, 16 bits per colour, some BigTIFF."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmcgns.data.image import MAX_PIXELS, stretch
from cmcgns.data.isolated_decoder import IsolatedDecoder
from cmcgns.errors import BadRow

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
TIFF_MAGIC = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
"""Order of the bytes, and whether it is a BigTIFF."""
HIGH_BYTE_FIRST = b"MM\0+"
"""BigTIFF that Pillow 13.0 takes for a TIFF."""
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
BITS, PHOTOMETRIC, SAMPLES, WIDTH, HEIGHT = 258, 262, 277, 256, 257
"""Tags of TIFF."""
NEXT_IMAGE = -1
"""Beside the tags: where the directory of the next image begins; 0 after the last one."""
WHITE_IS_ZERO = 0
LUMINANCE_BGR = np.array([0.114, 0.587, 0.299], dtype=np.float32)  # ITU-R BT.601
STRIP = 256
"""Rows converted at a time."""


def without_side_chunks(data: bytes) -> bytes | None:
    """The PNG without its texts and without side chunks whose checksum is wrong; None if nothing was left out.

    What the pixels need has capital letters (PNG, 5.4): a fault there stays an error.
    """
    if not data.startswith(PNG_MAGIC):
        return None
    kept, place = [PNG_MAGIC], len(PNG_MAGIC)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunk = data[place : place + 12 + length]
        name, body, checksum = chunk[4:8], chunk[8:-4], chunk[-4:]
        is_side = name[:1].islower()
        is_broken = len(chunk) < 12 + length or struct.pack(">I", zlib.crc32(name + body)) != checksum
        if not (is_side and (is_broken or name in TEXT_CHUNKS)):
            kept.append(chunk)
        place += 12 + length
    shorter = b"".join(kept)
    return shorter if len(shorter) < len(data) else None


def tiff_tags(data: bytes) -> dict[int, int]:
    """The first value of each tag with whole numbers in the first directory, and ``NEXT_IMAGE``; empty if it is no TIFF."""
    tags: dict[int, int] = {}
    order, is_big = TIFF_MAGIC.get(data[:4], ("", False))
    # BigTIFF: offsets, counts and the place of a value in its entry have 8 bytes
    offset, count_of, entry, place_of_start = ("Q", "Q", "HHQ", 8) if is_big else ("I", "H", "HHI", 4)
    at = lambda kind, place: struct.unpack_from(f"{order}{kind}", data, place)
    length = lambda kind: struct.calcsize(f"{order}{kind}")
    if not order or len(data) < place_of_start + length(offset):
        return tags
    (start,) = at(offset, place_of_start)
    first = start + length(count_of)
    if first > len(data):
        return tags
    (entries,), step = at(count_of, start), length(entry) + length(offset)
    for place in range(first, min(first + step * entries, len(data) - step + 1), step):
        tag, kind, number = at(entry, place)
        value = {3: "H", 4: "I", 16: "Q"}.get(kind)
        if value is None or not number:
            continue
        inside = place + length(entry)
        found = inside if length(value) * number <= length(offset) else at(offset, inside)[0]
        if found + length(value) <= len(data):
            (tags[tag],) = at(value, found)
    end = first + step * entries
    if end + length(offset) <= len(data):
        (tags[NEXT_IMAGE],) = at(offset, end)
    return tags


def is_white_zero(data: bytes) -> bool:
    """Whether a TIFF stores white as 0; Pillow heeds that up to 8 bits only."""
    return tiff_tags(data).get(PHOTOMETRIC) == WHITE_IS_ZERO


def is_deep(data: bytes) -> bool:
    """Whether a PNG or TIFF has 16 bits for each of several channels, of which Pillow would drop the lower 8."""
    if data.startswith(PNG_MAGIC):
        return len(data) > 25 and data[24] == 16 and data[25] in (2, 4, 6)
    tags = tiff_tags(data)
    return tags.get(BITS) == 16 and tags.get(SAMPLES, 1) > 1


def is_tiff_of_other_kind(data: bytes) -> bool:
    """Whether OpenCV may read a TIFF that Pillow does not know: more than 8 bits, or BigTIFF with the high byte first, and a size
    that is accepted."""
    tags = tiff_tags(data)
    known = tags.get(BITS, 1) in (16, 32) or data.startswith(HIGH_BYTE_FIRST)
    return known and 0 < tags.get(WIDTH, 0) * tags.get(HEIGHT, 0) <= MAX_PIXELS


def decode_deep_here(data: bytes) -> NDArray[np.uint8]:
    """Grey of a picture with more than 8 bits per channel, from its least to its greatest value; alpha is laid over black."""
    if data.startswith(PNG_MAGIC):  # OpenCV accepts what Pillow finds broken
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is None or (pixels.dtype == np.uint8 and not data.startswith(HIGH_BYTE_FIRST)):
        raise BadRow("film file is truncated or broken, or has a depth that is not read")
    if pixels.dtype == np.uint8:  # OpenCV heeds the polarity up to 8 bits
        return pixels if pixels.ndim == 2 else np.rint(_luminance(pixels)).astype(np.uint8)
    grey_HW = stretch(pixels if pixels.ndim == 2 else _luminance(pixels))
    return 255 - grey_HW if is_white_zero(data) else grey_HW


def _luminance(pixels_HWC: NDArray[Any]) -> NDArray[Any]:
    """One channel of grey pictures as it is, brightness of others."""
    blue, green, red = (pixels_HWC[..., channel] for channel in range(3))
    is_grey = np.array_equal(blue, green) and np.array_equal(green, red)
    light = np.empty(pixels_HWC.shape[:2], pixels_HWC.dtype if is_grey else np.float32)
    top = np.iinfo(pixels_HWC.dtype).max if pixels_HWC.dtype.kind in "iu" else 1
    for start in range(0, len(light), STRIP):
        part = pixels_HWC[start : start + STRIP]
        shown = part[..., 0] if is_grey else part[..., :3].astype(np.float32) @ LUMINANCE_BGR
        if part.shape[2] == 4:
            shown = shown * (part[..., 3].astype(np.float64) / top)
        light[start : start + STRIP] = np.rint(shown) if is_grey else shown
    return light


decode_deep = IsolatedDecoder(decode_deep_here)
