"""What a compressed film says about itself in its first bytes: format, size, components, bits and sign."""

import struct
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

HEADER_BYTES = 2**20
"""Bytes in which a stream describes itself."""
ITEM, SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
UNDEFINED = 0xFFFFFFFF


class Codestream(NamedTuple):
    """The header of a compressed image."""

    name: str
    syntaxes: tuple[UID, ...]
    """Transfer syntaxes of DICOM that such a stream may have, the usual one first."""
    size: tuple[int, int] | None
    """Height and width; None if the format does not give them."""
    components: int | None
    bits: int | None
    signed: bool | None = None
    is_ycbcr: bool | None = None
    """Whether three components are luminance and colour differences; None if the stream does not say."""


class BrokenItemsError(ValueError):
    """Encapsulated pixels whose items do not follow each other."""


def items(pixels: bytes, start: int = 0) -> Iterator[tuple[int, int]]:
    """Where the content of each item of encapsulated pixels starts and ends: up to a delimiter, zeros, or the end of the file.

    The last item may be longer than what is left of the file: its end is then the end of the file.
    """
    while pixels[start : start + 4] == ITEM and len(pixels) >= start + 8:
        (length,) = struct.unpack_from("<I", pixels, start + 4)
        if length == UNDEFINED:
            raise BrokenItemsError("an item has no length")
        yield start + 8, min(start + 8 + length, len(pixels))
        start += 8 + length
    rest = pixels[start : start + 8]
    if rest and not rest.startswith(SEQUENCE_END) and rest.strip(b"\0"):
        raise BrokenItemsError("an item does not start where the one before ends")


def whole_stream(pixels: bytes) -> bytes:
    """The stream of a single film, which follows the table of offsets."""
    return b"".join(pixels[start:end] for start, end in islice(items(pixels), 1, None))


def start_of_stream(pixels: bytes) -> bytes:
    """The first bytes of the stream of a single film, which follows the table of offsets."""
    head = b""
    for start, end in islice(items(pixels), 1, None):
        head += pixels[start : min(end, start + HEADER_BYTES)]
        if len(head) >= HEADER_BYTES:
            break
    return head


def read_codestream(stream: bytes) -> Codestream | None:
    """What the stream says about itself; None if it is in no known format."""
    if stream.startswith(b"\xff\x4f\xff\x51"):
        return _jpeg2000(stream)
    if stream.startswith(b"\xff\xd8"):
        return _jpeg(stream)
    return _rle(stream)


def _jpeg2000(stream: bytes) -> Codestream | None:
    """The SIZ marker (ISO/IEC 15444-1, A.5.1); the high-throughput kind has a CAP marker behind it."""
    if len(stream) < 43:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", stream, 8)
    components, depth = struct.unpack_from(">HB", stream, 40)
    capable = stream[4 + struct.unpack_from(">H", stream, 4)[0] :][:2] == b"\xff\x50"
    syntaxes = (HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K) if capable else (JPEG2000, JPEG2000Lossless)
    size = (bottom - top, right - left)
    return Codestream("JPEG 2000", syntaxes, size, components, (depth & 0x7F) + 1, bool(depth & 0x80))


_LOSSY = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive"}
_BARE_MARKERS = frozenset([0x01, *range(0xD0, 0xD9)])


def _jpeg(stream: bytes) -> Codestream | None:
    """The frame header of JPEG (ITU-T T.81, B.2.2) and JPEG-LS (T.87, C.2.2)."""
    place, has_jfif, transform, frame = 2, False, None, None
    while place + 4 <= len(stream) and stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker == 0xFF or marker in _BARE_MARKERS:
            place += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", stream, place + 2)
        body = stream[place + 4 : place + 2 + length]
        if marker == 0xE0 and body.startswith(b"JFIF"):
            has_jfif = True
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            transform = body[11]
        elif (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            frame = (marker, body)
        elif marker == 0xDA:
            return None if frame is None else _jpeg_frame(*frame, body, has_jfif, transform)
        place += 2 + length
    return None


def _jpeg_frame(marker: int, frame: bytes, scan: bytes, has_jfif: bool, transform: int | None) -> Codestream | None:
    if len(frame) < 6 or len(frame) < 6 + 3 * frame[5] or len(scan) < 1 + 2 * scan[0] + 3:
        return None
    bits, height, width, components = struct.unpack_from(">BHHB", frame)
    size = (height, width) if height else None  # 0: the number of lines comes later
    parameter = scan[1 + 2 * scan[0]]  # predictor of lossless JPEG
    if marker == 0xF7:
        near = scan[1 + 2 * scan[0]]
        syntaxes = (JPEGLSNearLossless, JPEGLSLossless) if near else (JPEGLSLossless, JPEGLSNearLossless)
        return Codestream("JPEG-LS", syntaxes, size, components, bits)
    if marker not in _LOSSY:
        syntaxes = (JPEGLosslessSV1, JPEGLossless) if parameter == 1 else (JPEGLossless, JPEGLosslessSV1)
        return Codestream("lossless JPEG", syntaxes if marker == 0xC3 else (), size, components, bits)
    either: tuple[UID, ...] = (JPEGBaseline8Bit, JPEGExtended12Bit) if bits == 8 else (JPEGExtended12Bit,)
    is_ycbcr = _is_ycbcr(frame, has_jfif, transform) if components == 3 else None
    return Codestream(f"{_LOSSY[marker]} JPEG", either, size, components, bits, is_ycbcr=is_ycbcr)


def _is_ycbcr(frame: bytes, has_jfif: bool, transform: int | None) -> bool | None:
    """As decoders tell it: by Adobe's marker, by JFIF, by the names of the components, by coarser colour."""
    if transform is not None:
        return transform != 0
    if has_jfif:
        return True
    names, sampling = frame[6:15:3], frame[7:15:3]
    if names == b"RGB":
        return False
    return True if len(set(sampling)) > 1 else None


def _rle(stream: bytes) -> Codestream | None:
    """The header of RLE (PS3.5, G.5): a number of segments and where each begins."""
    if len(stream) < 64:
        return None
    segments, *offsets = struct.unpack_from("<16I", stream)
    used, unused = offsets[:segments], offsets[segments:]
    if not 1 <= segments <= 15 or used[0] != 64 or sorted(used) != used or any(unused) or used[-1] >= len(stream):
        return None
    return Codestream("RLE", (RLELossless,), None, None, 8 * segments)


def with_presets(stream: bytes) -> bytes:
    """A JPEG-LS stream of 6 or 7 bits that spells out its default thresholds (T.87, C.2.4.1.1.1), which GDCM gets wrong."""
    frame, scan = stream.find(b"\xff\xf7"), stream.find(b"\xff\xda")
    if b"\xff\xf8" in stream[:scan] or frame < 0 or scan < frame:
        return stream
    most, components = (1 << stream[frame + 4]) - 1, stream[frame + 9]
    near = stream[scan + 5 + 2 * components]
    factor, thresholds, least = 256 // (most + 1), [], near + 1
    for start, lossy, smallest in ((3, 3, 2), (7, 5, 3), (21, 7, 4)):
        wanted = max(smallest, start // factor + lossy * near)
        least = wanted if least <= wanted <= most else least
        thresholds.append(least)
    presets = struct.pack(">2sHB5H", b"\xff\xf8", 13, 1, most, *thresholds, 64)
    return stream[:scan] + presets + stream[scan:]
