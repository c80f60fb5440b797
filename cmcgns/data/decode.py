"""Bytes of an image file decoded to 8-bit grey."""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cmcgns.data.image import MAX_PIXELS, DecodedImage, Target, stretch
from cmcgns.data.picture_files import (
    NEXT_IMAGE,
    TIFF_MAGIC,
    decode_deep,
    is_deep,
    is_tiff_of_other_kind,
    is_white_zero,
    tiff_tags,
    without_side_chunks,
)
from cmcgns.data.repairs import note
from cmcgns.errors import BadRow

PICTURE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
_MAGIC = (
    (b"\xff\xd8\xff", "picture"),
    (b"\x89PNG\r\n\x1a\n", "picture"),
    (b"BM", "picture"),
    *((magic, "picture") for magic in TIFF_MAGIC),
    (b"RIFF", "picture"),
    # no preamble: the first element is of group 0002 or 0008, little or big endian
    (b"\x02\x00\x00\x00", "dicom"),
    (b"\x02\x00\x01\x00", "dicom"),
    (b"\x02\x00\x10\x00", "dicom"),
    (b"\x08\x00", "dicom"),
    (b"\x00\x08\x00", "dicom"),
)

ORIENTATION = 0x0112
"""Tag of EXIF."""
MAX_SCANS = 100
"""Encoders write about ten scans."""


class Budget:
    """Memory that threads of a process may use at a time; one that needs more than all of it goes alone."""

    def __init__(self, total: int) -> None:
        self.total, self._used = total, 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, wanted: int) -> Iterator[None]:
        """Wait until ``wanted`` bytes are free, and hold them."""
        taken = min(wanted, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._used + taken <= self.total)
            self._used += taken
        try:
            yield
        finally:
            with self._changed:
                self._used -= taken
                self._changed.notify_all()


DECODE_BUDGET = Budget(512 * 2**20)
"""For the threads of one task: two dozen films of 2500 x 3000 in 8 bits, or three of 4000 x 4000 in 16 bits."""

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is lower

cv2.setNumThreads(1)  # many decoding tasks share the machine, with one CPU each


def decode_image(data: bytes, name: str, target: Target | None = None) -> DecodedImage:
    """The image as uint8 (H, W), whatever the name of its file; ``BadRow`` with the reason if it cannot be decoded.

    ``target``: a JPEG may be decoded at a reduced scale of at least twice the target. Measured on JPEGs of 2500 x 3000
    to 256 pixels: 2.3 times as fast as Pillow's full decoding, with a mean difference of 0.23 grey levels from shrinking the
    full image (`python -m tests.benchmarks.decoding`).
    """
    kind = _kind(data, name)
    if kind == "dicom":
        # imported here: pydicom is slow to import in each process of a stream, and most corpora have no DICOM
        from cmcgns.data.dicom import dicom_to_grey

        grey_HW = dicom_to_grey(data)
        return DecodedImage(grey_HW, *grey_HW.shape)
    if kind == "picture":
        return _decode_picture(data, target)
    if not data:
        raise BadRow("film file is empty (0 bytes)")
    raise BadRow("film file is neither JPEG, PNG, TIFF, BMP, WebP nor DICOM")


def _kind(data: bytes, name: str) -> str:
    """``picture``, ``dicom`` or ``unknown`` by the first bytes, otherwise by the name."""
    if data[128:132] == b"DICM":
        return "dicom"
    named = "dicom" if data and name.lower().endswith((".dcm", ".dicom")) else "unknown"
    return next((kind for magic, kind in _MAGIC if data.startswith(magic)), named)


def _decode_picture(data: bytes, target: Target | None) -> DecodedImage:
    # each scan of a progressive JPEG goes over the whole film: a thousand of them take half a minute
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise BadRow(f"JPEG has {data.count(bytes([0xFF, 0xDA]))} scans; films have at most {MAX_SCANS}")
    try:
        return _opened(data, target)
    except BadRow:
        raise
    except Image.DecompressionBombError:
        raise BadRow(f"film is over the limit of {MAX_PIXELS} pixels") from None
    except Exception as error:  # Pillow's decoders raise many classes for broken bytes
        rescued = _rescued(data, target)
        if rescued is None:
            raise BadRow(f"film file is truncated or broken ({type(error).__name__})") from None
        return rescued


def _opened(data: bytes, target: Target | None) -> DecodedImage:
    with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as picture:
        # before decoding: a small file can declare a huge image
        if picture.width * picture.height > MAX_PIXELS:
            raise BadRow(f"film of {picture.height} x {picture.width} pixels is over the limit of {MAX_PIXELS}")
        if getattr(picture, "n_frames", 1) > 1:
            raise BadRow(f"film file has {getattr(picture, 'n_frames', 1)} images, not one film")
        size = picture.size
        if target is not None and target.of(size) >= 4 * target.pixels:
            # DCT scaling to the smallest of 1/2, 1/4, 1/8 that is at least twice the target
            factor = 2 * target.pixels / target.of(size)
            picture.draft(None, (round(picture.width * factor), round(picture.height * factor)))
        with DECODE_BUDGET.reserve(picture.width * picture.height * _bytes_per_pixel(picture.mode)):
            if is_deep(data):
                note("16 bits per colour")
                film: Image.Image = Image.fromarray(decode_deep(data))
                if picture.format == "PNG":  # OpenCV turns TIFFs itself
                    film.getexif().update(_exif(picture))
            else:
                picture.load()
                film = picture
            upright = _upright(film)
            width, height = size if upright.size == picture.size else size[::-1]
            grey_HW = grey_of(upright)
            # Pillow heeds it up to 8 bits
            if picture.format == "TIFF" and picture.mode.startswith(("I", "F")) and is_white_zero(data):
                note("white stored as 0 (TIFF)")
                grey_HW = 255 - grey_HW
            return DecodedImage(grey_HW, height, width)


def _exif(picture: Image.Image) -> dict[int, Any]:
    """The tags of the camera; none if they are broken, which makes no difference to the pixels."""
    try:
        return dict(picture.getexif())
    except Exception:  # Pillow's parser raises many classes for broken bytes
        note("broken EXIF ignored")
        return {}


def _upright(picture: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(picture) if _exif(picture).get(ORIENTATION, 1) != 1 else picture


def _rescued(data: bytes, target: Target | None) -> DecodedImage | None:
    """The film in a file that Pillow refused, if its pixels are whole."""
    shorter = without_side_chunks(data)
    if shorter is not None:
        with suppress(Exception):
            film = _opened(shorter, target)
            note("PNG with broken side chunks")
            return film
    if is_tiff_of_other_kind(data):
        if tiff_tags(data).get(NEXT_IMAGE, 0):
            raise BadRow("film file has several images, not one film")
        with suppress(BadRow):
            grey_HW = decode_deep(data)
            note("TIFF of a kind that Pillow does not know")
            return DecodedImage(grey_HW, *grey_HW.shape)
    return None


def _bytes_per_pixel(mode: str) -> int:
    """Memory that ``grey_of`` needs for each pixel of a picture, with all copies."""
    if mode.startswith(("I", "F")):
        return 9  # the picture, the same as an array, the result
    return {"L": 3, "1": 8, "RGB": 5}.get(mode, 20)


def grey_of(picture: Image.Image) -> NDArray[np.uint8]:
    """uint8 (H, W) from any of Pillow's modes."""
    if picture.mode.startswith(("I", "F")):
        return stretch(np.asarray(picture))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        opaque = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(opaque, picture).convert("RGB")
    elif picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    return np.array(picture.convert("L"), dtype=np.uint8)
