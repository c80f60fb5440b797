"""A DICOM file read and its header made consistent with its pixels, or refused with the tag that is wrong."""

from typing import Any

import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from cmcgns.data.codestream import ITEM, BrokenItemsError, Codestream, read_codestream, start_of_stream
from cmcgns.data.dicom_elements import parse
from cmcgns.data.image import MAX_PIXELS
from cmcgns.data.repairs import note
from cmcgns.errors import BadRow

MAX_SPARE_BYTES = 4096
"""Bytes behind the last row of an uncompressed film that are padding."""


def tagged(film: pydicom.Dataset, name: str) -> str:
    """``Rows (0028,0010) is 0``: an element for a message. Its value is shown if it is a number, or a name of the standard."""
    tag = Tag(tag_for_keyword(name) or 0)
    try:
        value = film.get(name)
    except (TypeError, ValueError, OverflowError):
        return f"{name} ({tag.group:04X},{tag.element:04X}) is not valid"
    blank = value is None or str(value).strip() == ""
    shown = (
        "missing" if name not in film else "empty" if blank else f"is {value}" if _is_plain(value) else "is not valid"
    )
    return f"{name} ({tag.group:04X},{tag.element:04X}) {shown}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float) or str(value) in PHOTOMETRICS


PHOTOMETRICS = frozenset(
    {
        "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422",
        "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT", "HSV", "ARGB", "CMYK",
    }
)  # fmt: skip


def number_of(film: pydicom.Dataset, name: str) -> int:
    """The value of an element that is one integer; 0 if there is none."""
    try:
        return int(film.get(name) or 0)
    except (TypeError, ValueError):
        return 0


def read_film(data: bytes) -> pydicom.Dataset:
    """The elements of the file, with its pixels if it has any, and the transfer syntax that they are in."""
    film = parse(data)
    if "TransferSyntaxUID" not in film.file_meta:
        implicit, little = film.original_encoding if film.original_encoding[0] is not None else (True, True)
        named = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        film.file_meta.TransferSyntaxUID = named if little is not False else ExplicitVRBigEndian
        _take_syntax_of_pixels(film, "a missing TransferSyntaxUID")
    else:
        _take_syntax_of_pixels(film, "a wrong TransferSyntaxUID")
    if not film.file_meta.TransferSyntaxUID.is_transfer_syntax:
        raise BadRow(_unknown_syntax(film.file_meta.TransferSyntaxUID))
    if not len(film) and "MediaStorageSOPClassUID" not in film.file_meta:
        raise BadRow("not a DICOM file: no element could be read")
    return film


def _unknown_syntax(uid: UID) -> str:
    shown = f" is {uid}" if uid.replace(".", "").isdigit() else ""
    return f"DICOM file has an unknown transfer syntax: TransferSyntaxUID (0002,0010){shown}; expected one of PS3.5, A"


def _take_syntax_of_pixels(film: pydicom.Dataset, problem: str) -> None:
    """Set the transfer syntax to that of the pixels, if the one given is of another kind."""
    given = film.file_meta.TransferSyntaxUID
    if "PixelData" not in film or not film.PixelData:
        return
    if film["PixelData"].is_undefined_length or film.PixelData[:4] == ITEM:
        stream = _codestream(film)
        if stream is not None and stream.syntaxes and given not in stream.syntaxes:
            film.file_meta.TransferSyntaxUID = stream.syntaxes[0]
            note(f"{problem}, read off the codestream")
    elif given.is_transfer_syntax and given.is_encapsulated:
        # the pixels were unpacked, and the header was not told
        if len(film.PixelData) < max(_expected_bytes(film), 1):
            raise BadRow(
                f"DICOM pixels are not in fragments, as TransferSyntaxUID (0002,0010) {given.name} asks, and too few for an "
                "uncompressed film"
            )
        film.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        note(f"{problem}, as the pixels are not compressed")


def _codestream(film: pydicom.Dataset) -> Codestream | None:
    try:
        return read_codestream(start_of_stream(film.PixelData))
    except BrokenItemsError:
        return None


def codestream_of(film: pydicom.Dataset) -> Codestream | None:
    """What the compressed pixels say about themselves; None if they are not compressed or in no known format."""
    return _codestream(film) if film.file_meta.TransferSyntaxUID.is_encapsulated else None


# --- the header against the pixels ---


def check_is_film(film: pydicom.Dataset) -> None:
    """Raise ``BadRow`` if the file is no single film, or too large for one."""
    storage = film.file_meta.get("MediaStorageSOPClassUID")
    if storage == MediaStorageDirectoryStorage or "DirectoryRecordSequence" in film:
        raise BadRow("DICOMDIR: a directory of films, not a film")
    if "PixelData" not in film:
        report = film.get("Modality") == "SR" or "ContentSequence" in film
        raise BadRow("DICOM structured report, not a film" if report else "DICOM file has no PixelData or is truncated")
    if not film.PixelData:
        raise BadRow("DICOM PixelData is empty")
    frames = number_of(film, "NumberOfFrames")
    if frames > 1:
        raise BadRow(f"DICOM file has {frames} frames, not one film")
    _match_size(film, codestream_of(film))
    height, width = number_of(film, "Rows"), number_of(film, "Columns")
    if height < 1 or width < 1:
        raise BadRow(
            f"DICOM header gives a size of {height} x {width} pixels: {tagged(film, 'Rows')}, {tagged(film, 'Columns')}"
        )
    if height * width > MAX_PIXELS:
        raise BadRow(f"DICOM film of {height} x {width} pixels is over the limit of {MAX_PIXELS}")


def _match_size(film: pydicom.Dataset, stream: Codestream | None) -> None:
    """Take the size of the stream where the header has none; raise if they differ."""
    if stream is None or stream.size is None:
        return
    for name, coded in zip(("Rows", "Columns"), stream.size, strict=True):
        if film.get(name) is None:
            setattr(film, name, coded)
            note(f"a missing {name}, read off the codestream")
    given = number_of(film, "Rows"), number_of(film, "Columns")
    if given != stream.size:
        raise BadRow(
            f"{stream.name} codestream is for {stream.size} pixels, the header says {given[0]} x {given[1]}: Rows (0028,0010), "
            "Columns (0028,0011)"
        )


def complete_header(film: pydicom.Dataset) -> Codestream | None:
    """Set what the header lacks or has wrong and the pixels show; the codestream if they are compressed."""
    stream = codestream_of(film)
    if stream is not None and stream.name != "RLE":
        _match_stream(film, stream)
    samples = number_of(film, "SamplesPerPixel")
    photometric = _photometric(film)
    if not samples:
        samples = 3 if photometric.startswith(("RGB", "YBR")) else 1
        _derive(film, "SamplesPerPixel", samples)
    if not photometric:
        _derive(film, "PhotometricInterpretation", "MONOCHROME2" if samples == 1 else "RGB")
    elif photometric not in PHOTOMETRICS:
        raise BadRow(f"DICOM {tagged(film, 'PhotometricInterpretation')}, expected MONOCHROME1 or MONOCHROME2")
    elif photometric != film.PhotometricInterpretation:
        film.PhotometricInterpretation = photometric
    if samples == 3 and film.get("PlanarConfiguration") is None:
        _derive(film, "PlanarConfiguration", 0)
    if film.get("PixelRepresentation") is None:
        _derive(film, "PixelRepresentation", int(bool(stream and stream.signed)))
    _match_bits(film, stream)
    return stream


def _photometric(film: pydicom.Dataset) -> str:
    """The colour space as the standard writes it; devices add blanks and zeros, and use small letters."""
    given = " ".join(str(film.get("PhotometricInterpretation") or "").replace("\0", " ").upper().split())
    return given.replace(" ", "") if given.startswith("MONOCHROME") else given


def _derive(film: pydicom.Dataset, name: str, value: int | str) -> None:
    setattr(film, name, value)
    note(f"a missing {name}")


def _match_stream(film: pydicom.Dataset, stream: Codestream) -> None:
    """Components and depth of the stream count, not those of the header (PS3.5, 8.2.1)."""
    if stream.components not in (1, 3):
        raise BadRow(f"DICOM codestream ({stream.name}) has {stream.components} components, a film has 1 or 3")
    if number_of(film, "SamplesPerPixel") != stream.components:
        film.SamplesPerPixel = stream.components
        if stream.components == 3:
            film.PhotometricInterpretation = "RGB" if stream.is_ycbcr is False or "2000" in stream.name else "YBR_FULL"
            film.PlanarConfiguration = 0
        elif not _photometric(film).startswith(("MONOCHROME", "PALETTE")):
            film.PhotometricInterpretation = "MONOCHROME2"
        note("SamplesPerPixel of the codestream")
    elif stream.components == 3 and stream.is_ycbcr is not None:
        is_ycbcr = _photometric(film).startswith("YBR")
        if stream.is_ycbcr and not is_ycbcr:
            film.PhotometricInterpretation = "YBR_FULL"
            note("YBR labelled RGB")
    if stream.bits is None:
        return
    container = 8 if stream.bits <= 8 else 16
    if stream.bits > 16:
        raise BadRow(f"DICOM codestream ({stream.name}) has {stream.bits} bits, a film has at most 16")
    given = number_of(film, "BitsAllocated")
    if given != container:
        film.BitsAllocated = container
        note("BitsAllocated of the codestream")
        if given < container or not 0 < number_of(film, "BitsStored") <= container or container == 8:
            film.BitsStored, film.HighBit = stream.bits, stream.bits - 1


def _expected_bytes(film: pydicom.Dataset) -> int:
    """Bytes of the uncompressed film, by its header."""
    bits = number_of(film, "Rows") * number_of(film, "Columns") * max(number_of(film, "SamplesPerPixel"), 1)
    bits *= number_of(film, "BitsAllocated") or 8
    if _photometric(film) == "YBR_FULL_422":
        bits = bits * 2 // 3
    return -(-bits // 8)


def _match_bits(film: pydicom.Dataset, stream: Codestream | None) -> None:
    """BitsAllocated, BitsStored and HighBit, from the number of bytes where they are missing."""
    values = number_of(film, "Rows") * number_of(film, "Columns") * number_of(film, "SamplesPerPixel")
    if not film.file_meta.TransferSyntaxUID.is_encapsulated:
        per_value, spare = divmod(len(film.PixelData), values)
        if not number_of(film, "BitsAllocated") and per_value in (1, 2) and spare <= 1:
            _derive(film, "BitsAllocated", 8 * per_value)
        elif (
            number_of(film, "BitsAllocated") == 8
            and per_value == 2
            and spare <= 1
            and 8 < number_of(film, "BitsStored") <= 16
        ):
            film.BitsAllocated = 16
            note("BitsAllocated of the number of bytes")
    elif not number_of(film, "BitsAllocated") and stream is not None and stream.bits is not None:
        _derive(
            film,
            "BitsAllocated",
            stream.bits // number_of(film, "SamplesPerPixel") if stream.name == "RLE" else stream.bits,
        )
    allocated, stored = number_of(film, "BitsAllocated"), number_of(film, "BitsStored")
    if allocated not in (1, 8, 16, 32):
        raise BadRow(f"DICOM {tagged(film, 'BitsAllocated')}, expected 8 or 16")
    if not stored:
        depth = stream.bits if stream is not None and stream.bits and stream.name != "RLE" else allocated
        _derive(film, "BitsStored", depth)
        stored = depth
    if stored > allocated:
        raise BadRow(
            f"DICOM {tagged(film, 'BitsStored')}, expected at most BitsAllocated (0028,0100), which is {allocated}"
        )
    if film.get("HighBit") is None:
        _derive(film, "HighBit", stored - 1)
    if not film.file_meta.TransferSyntaxUID.is_encapsulated:
        _check_length(film)


def _check_length(film: pydicom.Dataset) -> None:
    """Raise if there are far more bytes than the header has pixels for; too few are found by the decoder."""
    expected, given = _expected_bytes(film), len(film.PixelData)
    row = max(expected // number_of(film, "Rows"), 1)
    if given > expected + max(row, MAX_SPARE_BYTES) or (given >= 2 * expected and expected > MAX_SPARE_BYTES):
        raise BadRow(
            f"DICOM PixelData (7FE0,0010) has {given} bytes, the header asks for {expected}: {tagged(film, 'Rows')}, "
            f"{tagged(film, 'Columns')}, {tagged(film, 'SamplesPerPixel')}, {tagged(film, 'BitsAllocated')}"
        )
