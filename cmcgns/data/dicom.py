"""Bytes of a DICOM file decoded to 8-bit grey, with air dark. The only module that reads with pydicom."""

import io
import logging
import struct
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGExtended12Bit,
    MediaStorageDirectoryStorage,
)

from cmcgns.data.image import MAX_PIXELS
from cmcgns.data.isolated_decoder import IsolatedDecoder
from cmcgns.errors import BadRow

DEFLATED = "1.2.840.10008.1.2.1.99"
"""Transfer syntax of a deflated file (PS3.5, A.5); its header is not deflated."""
DEFLATED_WITHIN = 2048
"""Bytes in which a file's header names its transfer syntax."""
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601

# pydicom's warnings quote values of the file, which may identify a patient: none may be printed.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

logging.getLogger("pydicom").setLevel(logging.CRITICAL)

warnings.filterwarnings("ignore", module="pydicom")


def dicom_to_grey(data: bytes) -> NDArray[np.uint8]:
    """The film as uint8 (H, W) with air dark; ``BadRow`` with the reason if it cannot be decoded."""
    with _bad_row_on_error():
        if DEFLATED.encode() in data[:DEFLATED_WITHIN]:  # reading inflates it, to any size
            return _decode_isolated(data)
        film = _read(data)
        _check_is_film(film)
        if film.file_meta.TransferSyntaxUID.is_encapsulated:
            return _decode_isolated(data)
        return _grey(film)


def decode_here(data: bytes) -> NDArray[np.uint8]:
    """``dicom_to_grey`` of a compressed film in this process, which the C++ decoders may crash."""
    with _bad_row_on_error():
        film = _read(data)
        _check_is_film(film)
        return _grey(film)


_decode_isolated = IsolatedDecoder(decode_here)


def _grey(film: pydicom.Dataset) -> NDArray[np.uint8]:
    pixels = _decode(film)
    photometric = str(film.get("PhotometricInterpretation") or "MONOCHROME2").strip().upper()
    if photometric.startswith("MONOCHROME"):
        grey = _tone(pixels, film)
        # DX requires INVERSE with MONOCHROME1; both mean the same, so invert once
        if photometric == "MONOCHROME1" or film.get("PresentationLUTShape") == "INVERSE":
            grey = 255 - grey
    else:
        grey = _luminance(pixels, film, photometric)
    return np.ascontiguousarray(grey)


@contextmanager
def _bad_row_on_error() -> Iterator[None]:
    """Turn any error into a ``BadRow``: elements are parsed on first access, so any line that reads one can fail."""
    try:
        yield
    except BadRow:
        raise
    except Exception as error:  # the parser's own message may quote patient data
        raise BadRow(f"DICOM file is truncated or broken ({type(error).__name__})") from None


def _read(data: bytes) -> pydicom.Dataset:
    film = pydicom.dcmread(io.BytesIO(data), force=True)
    if not hasattr(film, "file_meta"):
        film.file_meta = pydicom.dataset.FileMetaDataset()
    if "TransferSyntaxUID" not in film.file_meta:
        film.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    if not film.file_meta.TransferSyntaxUID.is_transfer_syntax:
        raise BadRow("DICOM file has an unknown transfer syntax")
    if not len(film) and "MediaStorageSOPClassUID" not in film.file_meta:
        raise BadRow("not a DICOM file: no element could be read")
    return film


def _integer(film: pydicom.Dataset, name: str) -> int:
    try:
        return int(film.get(name) or 0)
    except (TypeError, ValueError):
        return 0


def _check_is_film(film: pydicom.Dataset) -> None:
    storage = film.file_meta.get("MediaStorageSOPClassUID")
    if storage == MediaStorageDirectoryStorage or "DirectoryRecordSequence" in film:
        raise BadRow("DICOMDIR: a directory of films, not a film")
    if "PixelData" not in film:
        report = film.get("Modality") == "SR" or "ContentSequence" in film
        raise BadRow("DICOM structured report, not a film" if report else "DICOM file has no PixelData or is truncated")
    if not film.PixelData:
        raise BadRow("DICOM PixelData is empty")
    frames = _integer(film, "NumberOfFrames")
    if frames > 1:
        raise BadRow(f"DICOM file has {frames} frames, not one film")
    height, width = _integer(film, "Rows"), _integer(film, "Columns")
    if height < 1 or width < 1:
        raise BadRow(f"DICOM header gives a size of {height} x {width} pixels")
    if height * width > MAX_PIXELS:
        raise BadRow(f"DICOM film of {height} x {width} pixels is over the limit of {MAX_PIXELS}")
    coded = _jpeg2000_size(film.PixelData) if film.file_meta.TransferSyntaxUID in JPEG2000TransferSyntaxes else None
    if coded not in (None, (height, width)):
        raise BadRow(f"JPEG 2000 codestream is for {coded} pixels, the header says {height} x {width}")


def _jpeg2000_size(pixels: bytes) -> tuple[int, int] | None:
    """Height and width in the codestream's SIZ marker (ISO/IEC 15444-1, A.5.1); None if there is none."""
    start = pixels.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(pixels) < start + 24:
        return None
    right, bottom, left, top = struct.unpack(">4I", pixels[start + 8 : start + 24])
    return bottom - top, right - left


def _decode(film: pydicom.Dataset) -> NDArray[Any]:
    """Stored values or palette indices (H, W), or RGB (H, W, 3) for the other colour spaces."""
    try:
        if film.file_meta.TransferSyntaxUID == JPEGExtended12Bit and _integer(film, "BitsAllocated") == 16:
            return _decode_jpeg_extended(film)
        pixels: NDArray[Any] = pixel_array(film)
    except Exception as error:  # each plug-in raises its own classes; the message may quote values of the file
        syntax = film.file_meta.TransferSyntaxUID
        name = syntax.name if syntax.is_transfer_syntax else "an unknown transfer syntax"
        raise BadRow(f"DICOM pixels ({name}) are truncated or cannot be decoded ({type(error).__name__})") from None
    height, width = _integer(film, "Rows"), _integer(film, "Columns")
    if pixels.shape[:2] != (height, width) or pixels.ndim > 3:
        raise BadRow(f"DICOM pixels decode to {pixels.shape}, the header says {height} x {width}")
    return pixels


def _decode_jpeg_extended(film: pydicom.Dataset) -> NDArray[np.uint16]:
    """12-bit lossy JPEG by GDCM's own reader, because pydicom rejects it with every plug-in."""
    import gdcm

    stored = _integer(film, "BitsStored")
    copy = pydicom.Dataset()
    for name in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PixelRepresentation", "PixelData"):
        setattr(copy, name, film[name].value)
    copy.PhotometricInterpretation = "MONOCHROME2"
    # GDCM masks to BitsStored, so lossy overshoot would wrap from white to black: ask for all 12, then clip
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
    pixels = np.frombuffer(buffer, dtype=np.uint16).reshape(copy.Rows, copy.Columns)
    return np.minimum(pixels, np.uint16(2**stored - 1))


def _tone(pixels_HW: NDArray[Any], film: pydicom.Dataset) -> NDArray[np.uint8]:
    """Grey levels of monochrome pixels, by a lookup table over the stored values."""
    if pixels_HW.ndim != 2:
        raise BadRow(f"DICOM file is declared monochrome but decodes to {pixels_HW.shape}")
    low, high = int(pixels_HW.min()), int(pixels_HW.max())
    if high - low > 0xFFFF:
        raise BadRow(f"DICOM pixels span {low} to {high}, more than 16 bits")
    curve = _curve(pixels_HW, low, high, film)
    if pixels_HW.dtype in (np.uint8, np.uint16):
        # a table that starts at 0 is indexed by the pixels directly, which is faster than subtracting first
        return np.asarray(np.pad(curve, (low, 0))[pixels_HW])
    return np.asarray(curve[pixels_HW.astype(np.int32) - low])


def _curve(pixels_HW: NDArray[Any], low: int, high: int, film: pydicom.Dataset) -> NDArray[np.uint8]:
    """uint8 grey of each value from ``low`` (minimum) to ``high`` (maximum): by the VOI LUT, otherwise by the first window
    with any contrast, otherwise from min to max."""
    try:
        with np.errstate(all="ignore"):
            values = np.asarray(apply_modality_lut(np.arange(low, high + 1, dtype=np.int32), film), dtype=np.float64)
    except Exception as error:
        raise BadRow(f"DICOM rescale or modality LUT is broken ({type(error).__name__})") from None
    if not np.isfinite(values).all():
        raise BadRow("DICOM rescale gives values that are not finite")
    padded = "PixelPaddingValue" in film
    for unit in _voi_curves(values, film):
        grey = _to_uint8(unit)
        # the ends are values of the film: if they differ there is contrast, and the others need no check
        if not padded and grey[0] != grey[-1]:
            return grey
        shown = _shown(pixels_HW, low, high, film)
        if np.ptp(grey[shown]) > 0 or np.ptp(values[shown]) == 0:
            return grey
    shown = _shown(pixels_HW, low, high, film)
    least, most = values[shown].min(), values[shown].max()
    return _to_uint8((values - least) / max(most - least, 1e-9))


def _shown(pixels_HW: NDArray[Any], low: int, high: int, film: pydicom.Dataset) -> NDArray[np.bool_]:
    """Which values from ``low`` to ``high`` occur on the film and are not padding; all values if none are left."""
    used = np.bincount(pixels_HW.ravel().astype(np.int32) - low, minlength=high - low + 1) > 0
    shown = used & (np.arange(low, high + 1) != film.get("PixelPaddingValue", low - 1))
    return shown if shown.any() else np.ones_like(shown)


def _to_uint8(unit: NDArray[Any]) -> NDArray[np.uint8]:
    """0 to 1 scaled to 0 to 255; values outside are clipped."""
    grey: NDArray[np.uint8] = np.rint(np.clip(unit, 0.0, 1.0) * 255).astype(np.uint8)
    return grey


def _voi_curves(values: NDArray[np.float64], film: pydicom.Dataset) -> Iterator[NDArray[np.float64]]:
    """``values`` mapped to 0 to 1 by each VOI LUT and window of the header, best first; unusable entries are skipped."""
    for item in film.get("VOILUTSequence") or []:
        unit = _voi_lut(values, item)
        if unit is not None:
            yield unit
    centres, widths = _numbers(film.get("WindowCenter")), _numbers(film.get("WindowWidth"))
    function = str(film.get("VOILUTFunction") or "LINEAR").strip().upper()
    for centre, width in zip(centres, widths, strict=False):
        if width > 0:
            yield _window(values, centre, width, function)


def _voi_lut(values: NDArray[np.float64], item: pydicom.Dataset) -> NDArray[np.float64] | None:
    try:
        entries, first, bits = (int(number) for number in item.LUTDescriptor)
        table = item["LUTData"].value
        if isinstance(table, bytes):
            table = np.frombuffer(table, dtype="<u2" if len(table) >= 2 * (entries or 2**16) else "u1")
        table = np.asarray(table, dtype=np.float64)[: entries or 2**16]
    except Exception:  # an unreadable table is skipped, like a width of 0
        return None
    if first > 0x7FFF and values.min() < 0:
        first -= 0x10000
    if table.size < 2 or not 1 <= bits <= 16:
        return None
    # scale by the table's own range: 8-bit tables declared as 16 bits are common
    low, high = table.min(), table.max()
    shown = table[np.clip(np.rint(values) - first, 0, table.size - 1).astype(np.int64)]
    return np.asarray((shown - low) / max(high - low, 1e-9))


def _window(values: NDArray[np.float64], centre: float, width: float, function: str) -> NDArray[np.float64]:
    """DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, with an output of 0 to 1."""
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -50, 50))))
    if function == "LINEAR_EXACT" or width <= 1:
        return (values - centre) / width + 0.5
    return (values - (centre - 0.5)) / (width - 1) + 0.5


def _numbers(value: Any) -> list[float]:
    """The finite numbers of an element that may have several values or be malformed."""
    if value is None:
        return []
    try:
        items = [value] if isinstance(value, str | int | float) else list(value)
        numbers = [float(item) for item in items]
    except (TypeError, ValueError):
        return []
    return [number for number in numbers if np.isfinite(number)]


def _luminance(pixels: NDArray[Any], film: pydicom.Dataset, photometric: str) -> NDArray[np.uint8]:
    """uint8 brightness of RGB pixels or of palette indices."""
    try:
        if photometric == "PALETTE COLOR":
            pixels, bits = (
                apply_color_lut(pixels, film),
                int(film.RedPaletteColorLookupTableDescriptor[2]),
            )
        else:
            bits = _integer(film, "BitsStored") or 8
    except Exception as error:
        raise BadRow(f"DICOM palette is broken ({type(error).__name__})") from None
    if pixels.ndim != 3 or pixels.shape[2] < 3:
        raise BadRow(f"DICOM colour film decodes to {pixels.shape}")
    return _to_uint8(pixels[..., :3].astype(np.float32) @ LUMINANCE / (2**bits - 1))
