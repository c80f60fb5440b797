"""Bytes of a DICOM file decoded to 8-bit grey, with air dark. ``dicom_header`` reads it, ``dicom_pixels`` decodes it."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from cmcgns.data.dicom_colour import luminance, single_plane, to_uint8
from cmcgns.data.dicom_header import check_is_film, number_of, read_film, tagged
from cmcgns.data.dicom_pixels import stored_values
from cmcgns.data.isolated_decoder import IsolatedDecoder
from cmcgns.data.repairs import note, noted
from cmcgns.errors import BadRow

DEFLATED = "1.2.840.10008.1.2.1.99"
"""Transfer syntax of a deflated file (PS3.5, A.5); its header is not deflated."""
DEFLATED_WITHIN = 2048
"""Bytes in which a file's header names its transfer syntax."""

# pydicom's warnings quote values of the file, which may identify a patient: none may be printed.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

logging.getLogger("pydicom").setLevel(logging.CRITICAL)

warnings.filterwarnings("ignore", module="pydicom")


def dicom_to_grey(data: bytes) -> NDArray[np.uint8]:
    """The film as uint8 (H, W) with air dark; ``BadRow`` with the reason if it cannot be decoded."""
    with _bad_row_on_error():
        if DEFLATED.encode() in data[:DEFLATED_WITHIN]:  # reading inflates it, to any size
            return _isolated(data)
        film = read_film(data)
        check_is_film(film)
        if film.file_meta.TransferSyntaxUID.is_encapsulated:
            return _isolated(data)
        return _grey(film)


def decode_here(data: bytes) -> tuple[NDArray[np.uint8], Counter[str]]:
    """``dicom_to_grey`` of a compressed film in this process, which the C++ decoders may crash, and what it noted."""
    with _bad_row_on_error(), noted() as notes:
        film = read_film(data)
        check_is_film(film)
        return _grey(film), notes


_decode_isolated = IsolatedDecoder(decode_here)


def _isolated(data: bytes) -> NDArray[np.uint8]:
    """``decode_here`` in a child process; what it noted is noted here."""
    grey, notes = _decode_isolated(data)
    for rule, times in notes.items():
        note(rule, times)
    return grey


def _grey(film: pydicom.Dataset) -> NDArray[np.uint8]:
    pixels = stored_values(film)
    photometric = str(film.PhotometricInterpretation)
    if photometric.startswith("MONOCHROME"):
        grey = _tone(pixels, film)
        # DX requires INVERSE with MONOCHROME1; both mean the same, so invert once
        shape = str(film.get("PresentationLUTShape") or "").strip(" \0").upper()
        if photometric == "MONOCHROME1" or shape == "INVERSE":
            grey = 255 - grey
    else:
        grey = luminance(pixels, film, photometric)
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


def _tone(pixels_HW: NDArray[Any], film: pydicom.Dataset) -> NDArray[np.uint8]:
    """Grey levels of monochrome pixels, by a lookup table over the stored values."""
    pixels_HW = single_plane(pixels_HW, film)
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
    values = _modality_values(np.arange(low, high + 1, dtype=np.int32), film)
    padded = "PixelPaddingValue" in film
    for unit in _voi_curves(values, film):
        grey = to_uint8(unit)
        # the ends are values of the film: if they differ there is contrast, and the others need no check
        if not padded and grey[0] != grey[-1]:
            return grey
        shown = _shown(pixels_HW, low, high, film)
        if np.ptp(grey[shown]) > 0 or np.ptp(values[shown]) == 0:
            return grey
    shown = _shown(pixels_HW, low, high, film)
    least, most = values[shown].min(), values[shown].max()
    return to_uint8((values - least) / max(most - least, 1e-9))


def _modality_values(stored: NDArray[np.int32], film: pydicom.Dataset) -> NDArray[np.float64]:
    """Stored values after the modality LUT or the rescale; a rescale that is empty, half empty or 0 is none, as in dcmtk."""
    for item in film.get("ModalityLUTSequence") or []:
        if not item.get("LUTData") and not item.get("LUTDescriptor"):
            continue  # as empty as no sequence
        table = _lookup(stored.astype(np.float64), item)
        if table is None:
            raise BadRow("DICOM ModalityLUTSequence (0028,3000) cannot be read; expected LUTDescriptor and LUTData")
        return table
    slope, intercept = (_rescale(film, name) for name in ("RescaleSlope", "RescaleIntercept"))
    if slope is None or intercept is None:
        return stored.astype(np.float64)
    if slope == 0:
        note("RescaleSlope 0 ignored")
        return stored.astype(np.float64)
    with np.errstate(all="ignore"):
        values = stored.astype(np.float64) * slope + intercept
    if not np.isfinite(values).all():
        raise BadRow(
            f"DICOM rescale gives values that are not finite: {tagged(film, 'RescaleSlope')}, {tagged(film, 'RescaleIntercept')}"
        )
    return values


def _rescale(film: pydicom.Dataset, name: str) -> float | None:
    """The number; None if there is none."""
    try:
        given = film.get(name)
    except (TypeError, ValueError, OverflowError):
        given = "not a number"
    if given is None or str(given).strip(" \0") == "":
        if name in film:
            note("empty rescale")
        return None
    numbers = set(_numbers(given))
    if len(numbers) != 1:
        raise BadRow(f"DICOM {tagged(film, name)}, expected one finite number")
    return numbers.pop()


def _shown(pixels_HW: NDArray[Any], low: int, high: int, film: pydicom.Dataset) -> NDArray[np.bool_]:
    """Which values from ``low`` to ``high`` occur on the film and are not padding; all values if none are left."""
    used = np.bincount(pixels_HW.ravel().astype(np.int32) - low, minlength=high - low + 1) > 0
    shown = used & ~_padding(np.arange(low, high + 1), film)
    return shown if shown.any() else np.ones_like(shown)


def _padding(values: NDArray[np.int64], film: pydicom.Dataset) -> NDArray[np.bool_]:
    """Which values are padding: from PixelPaddingValue to PixelPaddingRangeLimit, both with the sign of the pixels."""
    ends = [_padding_end(film, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return np.zeros(values.shape, np.bool_)
    first, last = sorted((ends[0], ends[0] if ends[1] is None else ends[1]))
    return (first <= values) & (values <= last)


def _padding_end(film: pydicom.Dataset, name: str) -> int | None:
    """The value as a pixel has it; devices write that of a signed film as unsigned, and the other way round."""
    value = film.get(name)
    if not isinstance(value, int):
        return None
    stored = number_of(film, "BitsStored")
    low = -(1 << stored - 1) if number_of(film, "PixelRepresentation") else 0
    if low <= value < low + (1 << stored):
        return value
    for size in (stored, number_of(film, "BitsAllocated")):
        other = (value - low) % (1 << size) + low
        if low <= other < low + (1 << stored):
            note(f"{name} of the wrong sign")
            return other
    return value


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
    """0 to 1, by the table's own range, because 8-bit tables declared as 16 bits are common; None if it cannot be read."""
    shown = _lookup(values, item)
    if shown is None:
        return None
    table = _table(item)
    assert table is not None
    low, high = table.min(), table.max()
    return np.asarray((shown - low) / max(high - low, 1e-9))


def _lookup(values: NDArray[np.float64], item: pydicom.Dataset) -> NDArray[np.float64] | None:
    """The entry of the LUT (PS3.3, C.11.1.1) for each value; None if it cannot be read."""
    table, descriptor = _table(item), _descriptor(item)
    if table is None or descriptor is None:
        return None
    first = descriptor[1]
    if first > 0x7FFF and values.min() < 0:
        first -= 0x10000  # a negative number written as unsigned
    elif first < 0 <= values.min() and first + 0x10000 <= values.max():
        first += 0x10000  # and the other way round
    return table[np.clip(np.rint(values) - first, 0, table.size - 1).astype(np.int64)]


def _descriptor(item: pydicom.Dataset) -> tuple[int, int, int] | None:
    """Entries, first value mapped and bits; devices write it as bytes, too."""
    try:
        given = item["LUTDescriptor"].value
        entries, first, bits = (
            np.frombuffer(given, "<u2").tolist() if isinstance(given, bytes) else (int(each) for each in given)
        )
    except Exception:  # an unreadable descriptor has no table
        return None
    # 0 stands for 65536, and a signed 16-bit number cannot hold more than 32767
    return entries % 0x10000 or 0x10000, first, bits


def _table(item: pydicom.Dataset) -> NDArray[np.float64] | None:
    """The entries of a LUT: words, or bytes if there is one for each; as many as there are, at most as declared."""
    descriptor = _descriptor(item)
    if descriptor is None or not 1 <= descriptor[2] <= 16:
        return None
    try:
        table = item["LUTData"].value
        if isinstance(table, bytes):
            table = np.frombuffer(table, dtype="u1" if len(table) <= descriptor[0] + 1 else "<u2")
        table = np.asarray(table, dtype=np.float64)[: descriptor[0]] % 0x10000
    except Exception:  # an unreadable table is skipped, like a width of 0
        return None
    return table if table.size >= 2 else None


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
        # some devices write the comma of their country
        numbers = [float(item.replace(",", ".") if isinstance(item, str) else item) for item in items]
    except (TypeError, ValueError):
        return []
    return [number for number in numbers if np.isfinite(number)]
