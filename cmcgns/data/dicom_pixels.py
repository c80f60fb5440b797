"""Stored values of a DICOM film: decoded, held against BitsStored and HighBit, and refused where they contradict the header."""

import tempfile
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import pixel_array
from pydicom.uid import JPEGExtended12Bit

from cmcgns.data.codestream import Codestream, whole_stream, with_presets
from cmcgns.data.dicom_colour import are_equal, rearranged
from cmcgns.data.dicom_header import complete_header, number_of, tagged
from cmcgns.data.image import LEAST_SIDE
from cmcgns.data.repairs import note
from cmcgns.errors import BadRow

SOME_LINES = 64
"""Rows and columns by which a reading of the pixels is judged."""
LOSSY = ("baseline JPEG", "extended JPEG", "progressive JPEG")
MOST_OVERSHOOT = 0.01
"""Share of the pixels of a lossy film that may be above BitsStored."""
LEAST_LEVELS = 8
"""Different values on both sides of the places where the values of a film wrap around."""


def stored_values(film: pydicom.Dataset) -> NDArray[Any]:
    """Stored values or palette indices (H, W), or RGB (H, W, 3) for the other colour spaces.

    The header of ``film`` is completed and corrected on the way, by what its pixels say.
    """
    stream = complete_header(film)
    declared = number_of(film, "BitsStored"), number_of(film, "HighBit")
    allocated = number_of(film, "BitsAllocated")
    if stream is None or stream.name == "RLE" or (stream.bits or 0) > declared[0]:
        # pydicom cuts the bits above BitsStored, which may be those of the film
        depth = allocated if stream is None or stream.name == "RLE" else stream.bits or allocated
        film.BitsStored, film.HighBit = depth, depth - 1
    elif stream.name == "JPEG-LS" and declared[0] in (6, 7):
        film.BitsStored, film.HighBit = 8, 7  # pydicom refuses these depths of a header, not of a stream
        film.PixelData = encapsulate([with_presets(whole_stream(film.PixelData))])
    pixels = _decoded(film, stream)
    if stream is not None and stream.name in LOSSY and (stream.bits or 0) > declared[0]:
        pixels, declared = _without_overshoot(pixels, declared, stream.bits or 0)
    film.BitsStored, film.HighBit = declared
    height, width = number_of(film, "Rows"), number_of(film, "Columns")
    if pixels.shape[:2] != (height, width) or pixels.ndim > 3:
        raise BadRow(f"DICOM pixels decode to {pixels.shape}, the header says {height} x {width}")
    if pixels.dtype.itemsize > 2 or pixels.dtype.kind not in "iu" or allocated not in (8, 16):
        return pixels
    is_plain = stream is None and pixels.ndim == 2 and pixels.dtype.itemsize == 2 and min(pixels.shape) >= LEAST_SIDE
    if is_plain:
        _check_order_of_bytes(pixels)
    pixels = _without_other_bits(pixels, film, stream)
    if is_plain:
        _check_sign(pixels, film)
    return pixels


def _without_overshoot(
    pixels: NDArray[Any], declared: tuple[int, int], bits: int
) -> tuple[NDArray[Any], tuple[int, int]]:
    """Lossy pixels cut off at BitsStored, which a few of them pass; if many do, all of them, and the depth of the codestream."""
    limit = 2 ** declared[0] - 1
    if (pixels > limit).mean() > MOST_OVERSHOOT:
        note("BitsStored of the codestream")
        return pixels, (bits, bits - 1)
    return np.minimum(pixels, np.asarray(limit, pixels.dtype)), declared


def _decoded(film: pydicom.Dataset, stream: Codestream | None) -> NDArray[Any]:
    try:
        if film.file_meta.TransferSyntaxUID == JPEGExtended12Bit and number_of(film, "BitsAllocated") == 16:
            return _decode_jpeg_extended(film)
        pixels = _maybe_rgb(film, stream)
    except Exception as error:  # each plug-in raises its own classes; the message may quote values of the file
        syntax = film.file_meta.TransferSyntaxUID
        raise BadRow(
            f"DICOM pixels ({syntax.name}) are truncated or cannot be decoded ({type(error).__name__})"
        ) from None
    return np.asarray(pixels, pixels.dtype.newbyteorder("="))


def _maybe_rgb(film: pydicom.Dataset, stream: Codestream | None) -> NDArray[Any]:
    """The decoded pixels; three equal planes are RGB, whatever the header says: as luminance and colour they would be no film."""
    labelled = str(film.PhotometricInterpretation)
    if labelled == "YBR_FULL" and (stream is None or stream.is_ycbcr is None):
        film.PhotometricInterpretation = "RGB"
        pixels: NDArray[Any] = pixel_array(film)
        if pixels.ndim == 3 and are_equal(pixels):
            note("RGB labelled YBR")
            return pixels
        film.PhotometricInterpretation = labelled
    pixels = pixel_array(film)
    is_plain = stream is None and labelled in ("RGB", "MONOCHROME1", "MONOCHROME2")
    return rearranged(pixels, film) if is_plain and pixels.ndim == 3 and pixels.shape[2] == 3 else pixels


def _decode_jpeg_extended(film: pydicom.Dataset) -> NDArray[np.uint16]:
    """12-bit lossy JPEG by GDCM's own reader, because pydicom rejects it with every plug-in."""
    import gdcm

    copy = pydicom.Dataset()
    for name in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PixelRepresentation", "PixelData"):
        setattr(copy, name, film[name].value)
    copy.PhotometricInterpretation = "MONOCHROME2"
    # GDCM masks to BitsStored, so lossy overshoot would wrap from white to black: ask for all 12
    copy.BitsStored, copy.HighBit = 12, 11
    copy["PixelData"].VR = "OB"
    copy["PixelData"].is_undefined_length = True
    copy.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    copy.SOPInstanceUID = pydicom.uid.generate_uid()
    copy.file_meta = pydicom.dataset.FileMetaDataset()
    copy.file_meta.TransferSyntaxUID = JPEGExtended12Bit
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        copy.save_as(file, enforce_file_format=True)
        file.flush()
        reader = gdcm.ImageReader()
        reader.SetFileName(file.name)
        if not reader.Read():
            raise ValueError("GDCM cannot read it either")
        buffer = reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape")
    return np.frombuffer(buffer, dtype=np.uint16).reshape(copy.Rows, copy.Columns)


def _without_other_bits(pixels: NDArray[Any], film: pydicom.Dataset, stream: Codestream | None) -> NDArray[Any]:
    """The ``BitsStored`` bits below ``HighBit`` of each value, with their sign; ``BadRow`` if others hold the film."""
    stored, shift = number_of(film, "BitsStored"), number_of(film, "HighBit") + 1 - number_of(film, "BitsStored")
    size = 8 * pixels.dtype.itemsize
    if stored == size or pixels.dtype == np.bool_:
        return pixels
    bits = pixels.view(f"u{pixels.dtype.itemsize}")
    moved = _left_justified_by(bits, stored, shift, film)
    bits = bits >> moved if moved else bits
    if not int(bits.max()) >> stored:
        return _signed(bits, stored, film) if number_of(film, "PixelRepresentation") else bits
    values = _signed(bits, stored, film)
    if np.array_equal(values.view(bits.dtype), bits):  # the other bits repeat the sign
        return values
    padding = _is_padding(bits, film)
    if padding.any() and not (bits[~padding] >> stored).any():
        # padding outside of the stored bits must not become a value of the film
        kept = values[~padding]
        values[padding] = kept.min() if len(kept) else 0
        note("PixelPaddingValue outside of BitsStored")
        return values
    if _has_overlay_bits(film, stored) or _is_overlay(bits, stored):
        note("bits above BitsStored cut off (overlays)")
        return values
    if stream is not None and stream.name != "RLE" and stream.bits is not None and not (bits >> stream.bits).any():
        film.BitsStored, film.HighBit = stream.bits, stream.bits - 1
        note("BitsStored of the codestream")
        return _signed(bits, stream.bits, film)
    raise BadRow(
        f"DICOM {tagged(film, 'BitsStored')}, but pixels reach {int(bits.max())}; expected at most {2**stored - 1}"
    )


def _left_justified_by(bits: NDArray[Any], stored: int, shift: int, film: pydicom.Dataset) -> int:
    """How far the values stand to the left of where they usually do."""
    if shift <= 0 or shift + stored > 8 * bits.dtype.itemsize:
        if shift:
            note("HighBit other than BitsStored - 1")
        return 0
    if (bits & ((1 << shift) - 1)).any() and not (bits >> stored).any():
        note("HighBit other than BitsStored - 1")  # the values stand where they usually do
        return 0
    note("left-justified values (HighBit)")
    return shift


def _signed(bits: NDArray[Any], stored: int, film: pydicom.Dataset) -> NDArray[Any]:
    """The lowest ``stored`` bits as numbers, by PixelRepresentation."""
    spare = 8 * bits.dtype.itemsize - stored
    shifted = bits << spare
    return (shifted.view(f"i{bits.dtype.itemsize}") if number_of(film, "PixelRepresentation") else shifted) >> spare


def _is_padding(bits: NDArray[Any], film: pydicom.Dataset) -> NDArray[np.bool_]:
    value = film.get("PixelPaddingValue")
    if not isinstance(value, int):
        return np.zeros(bits.shape, np.bool_)
    return np.asarray(bits == value % (1 << 8 * bits.dtype.itemsize))


def _has_overlay_bits(film: pydicom.Dataset, stored: int) -> bool:
    """Whether a bit of an overlay (60xx,0102) lies above those of the film."""
    groups = range(0x6000, 0x6020, 2)
    return any((group, 0x0102) in film and int(film[group, 0x0102].value or 0) >= stored for group in groups)


def _samples(pixels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Some rows and some columns of a film, both as rows."""
    height, width = pixels.shape[:2]
    return pixels[:: max(height // SOME_LINES, 1)], pixels[:, :: max(width // SOME_LINES, 1)].swapaxes(0, 1)


def _differences(marked: NDArray[Any], *readings: NDArray[Any]) -> list[NDArray[np.int64]]:
    """For each reading of the same lines, how far neighbours with different marks are apart."""
    at = np.nonzero(marked[:, 1:] != marked[:, :-1])[:2]
    return [np.abs(np.diff(reading.astype(np.int64), axis=1)[at]).ravel() for reading in readings]


def _is_overlay(bits: NDArray[Any], stored: int) -> bool:
    """Whether the film goes on under the edges of what the bits above BitsStored show.

    If they are bits of its values, many of the places where they change are smooth with them and jump without.
    """
    pairs = [
        _differences(lines >> stored, lines, lines & ((1 << stored) - 1)) for lines in map(np.asarray, _samples(bits))
    ]
    whole, cut = (np.concatenate(each) for each in zip(*pairs, strict=True))
    return bool((whole < cut).mean() < 0.1) if len(whole) else True


def _relative_roughness(pixels: NDArray[Any]) -> float:
    """Mean difference of neighbours by the range of values: some hundredths for a film, a third where it makes no sense."""
    return float(np.abs(np.diff(pixels.astype(np.int32), axis=1)).mean()) / max(float(np.ptp(pixels)), 1.0)


def _check_order_of_bytes(pixels: NDArray[Any]) -> None:
    rows = _samples(pixels)[0]
    rough = _relative_roughness(rows)
    if rough > 0.1 and _relative_roughness(rows.byteswap()) < rough / 4:
        raise BadRow(
            "DICOM pixels are smooth only with their bytes swapped; TransferSyntaxUID (0002,0010) has another byte order"
        )


def _check_sign(pixels: NDArray[Any], film: pydicom.Dataset) -> None:
    """Raise if values jump from one end of their range to the other, all around places that are smooth with the other sign.

    A saturated marker on black does so, too, but all its values are the same.
    """
    stored, is_signed = number_of(film, "BitsStored"), number_of(film, "PixelRepresentation")
    size, pairs = 1 << stored, []
    for lines in _samples(pixels):
        values = lines.astype(np.int32)
        is_high = values < 0 if is_signed else values >= size // 2
        other = values + size * is_high if is_signed else values - size * is_high
        is_seam = np.nonzero(is_high[:, 1:] != is_high[:, :-1])
        at_seam = values[is_seam]
        pairs.append((*_differences(is_high, values, other), at_seam[is_high[is_seam]], at_seam[~is_high[is_seam]]))
    given, otherwise, high, low = (np.concatenate(each) for each in zip(*pairs, strict=True))
    if min(len(np.unique(high)), len(np.unique(low))) < LEAST_LEVELS:
        return
    if np.median(given) > 0.85 * size and np.median(otherwise) < 0.15 * size:
        raise BadRow(f"DICOM {tagged(film, 'PixelRepresentation')}, but the pixels are smooth only as {1 - is_signed}")
