"""Bytes of an image file decoded to 8-bit grey."""

import io
import warnings
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cmcgns.data.image import MAX_PIXELS, DecodedImage, Target
from cmcgns.errors import BadRow

PICTURE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
_MAGIC = (
    (b"\xff\xd8\xff", "picture"),
    (b"\x89PNG\r\n\x1a\n", "picture"),
    (b"BM", "picture"),
    (b"II*\x00", "picture"),
    (b"MM\x00*", "picture"),
    (b"RIFF", "picture"),
    # no preamble: the first element is of group 0002 or 0008, little or big endian
    (b"\x02\x00\x00\x00", "dicom"),
    (b"\x02\x00\x01\x00", "dicom"),
    (b"\x02\x00\x10\x00", "dicom"),
    (b"\x08\x00", "dicom"),
    (b"\x00\x08\x00", "dicom"),
)

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
    try:
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
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            width, height = size if upright.size == picture.size else size[::-1]
            return DecodedImage(_grey(upright), height, width)
    except BadRow:
        raise
    except Image.DecompressionBombError:
        raise BadRow(f"film is over the limit of {MAX_PIXELS} pixels") from None
    except Exception as error:  # Pillow's decoders raise many classes for broken bytes
        raise BadRow(f"film file is truncated or broken ({type(error).__name__})") from None


def _grey(picture: Image.Image) -> NDArray[np.uint8]:
    """uint8 (H, W) from any of Pillow's modes."""
    if picture.mode.startswith(("I", "F")):
        return _stretch(np.asarray(picture))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        opaque = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(opaque, picture).convert("RGB")
    elif picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    return np.array(picture.convert("L"), dtype=np.uint8)


def _stretch(pixels_HW: NDArray[Any]) -> NDArray[np.uint8]:
    """More than 8 bits without a window: scaled so that minimum and maximum become 0 and 255."""
    values = pixels_HW.astype(np.float64)
    if not np.isfinite(values).all():
        raise BadRow("film has values that are not finite")
    low, high = values.min(), values.max()
    grey: NDArray[np.uint8] = np.rint((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
    return grey
