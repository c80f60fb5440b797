"""Colour DICOM films made grey, whatever their header calls their colours."""

from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_color_lut

from cmcgns.data.dicom_header import number_of, tagged
from cmcgns.data.repairs import note
from cmcgns.errors import BadRow

LUMINANCE_RGB = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


def to_uint8(unit: NDArray[Any]) -> NDArray[np.uint8]:
    """0 to 1 scaled to 0 to 255; values outside are clipped."""
    grey: NDArray[np.uint8] = np.rint(np.clip(unit, 0.0, 1.0) * 255).astype(np.uint8)
    return grey


def luminance(pixels: NDArray[Any], film: pydicom.Dataset, photometric: str) -> NDArray[np.uint8]:
    """uint8 brightness of RGB pixels or of palette indices."""
    try:
        if photometric == "PALETTE COLOR":
            pixels, bits = (
                apply_color_lut(pixels, film),
                int(film.RedPaletteColorLookupTableDescriptor[2]),
            )
        else:
            bits = number_of(film, "BitsStored") or 8
    except Exception as error:
        raise BadRow(f"DICOM palette is broken ({type(error).__name__})") from None
    if pixels.ndim != 3 or pixels.shape[2] < 3:
        raise BadRow(f"DICOM colour film decodes to {pixels.shape}")
    if photometric == "RGB" and pixels.dtype.itemsize <= 2 and _is_ycbcr(pixels, bits):
        note("YBR labelled RGB")
        return to_uint8(pixels[..., 0].astype(np.float32) / (2**bits - 1))
    return to_uint8(pixels[..., :3].astype(np.float32) @ LUMINANCE_RGB / (2**bits - 1))


def _is_ycbcr(pixels_HW3: NDArray[Any], bits: int) -> bool:
    """Whether the second and third plane are the colour differences of a grey film, all near the middle, and the first is not."""
    middle, near = 1 << bits - 1, max((1 << bits) // 64, 1)
    luminance, *differences = (pixels_HW3[..., plane].astype(np.int32) - middle for plane in range(3))
    return bool(np.ptp(luminance) > 4 * near) and all(np.abs(plane).max() <= near for plane in differences)


def are_equal(pixels_HW3: NDArray[Any]) -> bool:
    """Whether the three planes are the same: a grey film written as colours."""
    first, *others = (pixels_HW3[..., plane] for plane in range(3))
    return all(np.array_equal(first, other) for other in others)


def single_plane(pixels: NDArray[Any], film: pydicom.Dataset) -> NDArray[Any]:
    """The pixels of a monochrome film; ``BadRow`` if they have three planes that differ."""
    if pixels.ndim == 3 and pixels.shape[2] == 3 and are_equal(pixels):
        note("three equal planes labelled monochrome")
        return np.ascontiguousarray(pixels[..., 0])
    if pixels.ndim != 2:
        raise BadRow(
            f"DICOM pixels decode to {pixels.shape}, but {tagged(film, 'PhotometricInterpretation')}; "
            f"{tagged(film, 'SamplesPerPixel')}, expected 1"
        )
    return pixels


def rearranged(pixels_HW3: NDArray[Any], film: pydicom.Dataset) -> NDArray[Any]:
    """The planes of an uncompressed film, in the other PlanarConfiguration if only that shows a grey film."""
    height, width, _ = pixels_HW3.shape
    if are_equal(pixels_HW3):
        return pixels_HW3
    if number_of(film, "PlanarConfiguration"):
        other = np.ascontiguousarray(pixels_HW3.transpose(2, 0, 1)).reshape(height, width, 3)
    else:
        other = np.ascontiguousarray(pixels_HW3).reshape(3, height, width).transpose(1, 2, 0)
    if not are_equal(other):
        return pixels_HW3
    note("PlanarConfiguration of the pixels")
    return other
