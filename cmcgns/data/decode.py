"""From a file's bytes to a grey square, and the keys that say which draw a study gets."""

import io
import warnings
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cmcgns.data.image import MAX_PIXELS, Scan, Target
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

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS refuses sooner

cv2.setNumThreads(1)  # many decoding tasks share the machine: each takes the one CPU it was given


def decode_film(data: bytes, name: str, target: Target | None = None) -> NDArray[np.uint8]:
    """The film as uint8 (H, W), whatever its file is called; ``BadRow`` with the reason where it cannot be read.

    ``target``: a JPEG may be decoded at a reduced scale that keeps the side at twice the target or more.
    """
    return decode_scan(data, name, target).grey_HW


def decode_scan(data: bytes, name: str, target: Target | None = None) -> Scan:
    """``decode_film`` with the film's own size.

    Measured on JPEGs of 2500 x 3000 to 256 pixels: 2.3 times Pillow's full decode, at a mean error of 0.23 grey levels
    against shrinking the whole film (`python -m tests.benchmarks.decoding`).
    """
    kind = _kind(data, name)
    if kind == "dicom":
        # in here: pydicom takes longer to load than all else of ours, in each process of a stream, and most sets have no DICOM
        from cmcgns.data.dicom import dicom_to_grey

        grey_HW = dicom_to_grey(data)
        return Scan(grey_HW, *grey_HW.shape)
    if kind == "picture":
        return _decode_picture(data, target)
    if not data:
        raise BadRow("film file is empty (0 bytes)")
    raise BadRow("film file is neither JPEG, PNG, TIFF, BMP, WebP nor DICOM")


def _kind(data: bytes, name: str) -> str:
    """``picture``, ``dicom`` or ``unknown`` by the first bytes; the name counts where they tell nothing."""
    if data[128:132] == b"DICM":
        return "dicom"
    named = "dicom" if data and name.lower().endswith((".dcm", ".dicom")) else "unknown"
    return next((kind for magic, kind in _MAGIC if data.startswith(magic)), named)


def _decode_picture(data: bytes, target: Target | None) -> Scan:
    try:
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as picture:
            # before any pixel is decoded: a small file can declare a huge picture
            if picture.width * picture.height > MAX_PIXELS:
                raise BadRow(f"film of {picture.height} x {picture.width} pixels is over the limit of {MAX_PIXELS}")
            if getattr(picture, "n_frames", 1) > 1:
                raise BadRow(f"film file holds {getattr(picture, 'n_frames', 1)} pictures, not one film")
            size = picture.size
            if target is not None and target.of(size) >= 4 * target.pixels:
                # DCT scaling to the smallest of 1/2, 1/4, 1/8 that still leaves twice what is wanted
                factor = 2 * target.pixels / target.of(size)
                picture.draft(None, (round(picture.width * factor), round(picture.height * factor)))
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            width, height = size if upright.size == picture.size else size[::-1]
            return Scan(_grey(upright), height, width)
    except BadRow:
        raise
    except Image.DecompressionBombError:
        raise BadRow(f"film is over the limit of {MAX_PIXELS} pixels") from None
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise BadRow(f"film file is truncated or broken ({type(error).__name__})") from None


def _grey(picture: Image.Image) -> NDArray[np.uint8]:
    """uint8 (H, W) of a picture in any of Pillow's modes."""
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
    """More than 8 bits without a window: least to greatest value become 0 to 255."""
    values = pixels_HW.astype(np.float64)
    if not np.isfinite(values).all():
        raise BadRow("film holds values that are not finite")
    low, high = values.min(), values.max()
    grey: NDArray[np.uint8] = np.rint((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
    return grey
