"""The elements of a DICOM file, also if a sequence in it does not end where it says: its pixels are then looked for."""

import io
import struct
from collections.abc import Callable

import pydicom
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset, read_partial
from pydicom.tag import BaseTag

from cmcgns.data.codestream import ITEM, SEQUENCE_END, UNDEFINED, BrokenItemsError, items
from cmcgns.data.repairs import note

PIXEL_TAG = b"\xe0\x7f\x10\x00"


def parse(data: bytes) -> pydicom.Dataset:
    """The elements of the file, its pixels among them if they are whole."""
    try:
        film = _parsed(data)
        is_damaged = "PixelData" not in film or _is_cut(film)
    except MemoryError:
        raise
    except Exception:  # a sequence without its end: what comes before it is read, and what is needed behind it
        film, is_damaged = _parsed_to_first_sequence(data), True
    return _rescued(data, film) if is_damaged else film


def _parsed(data: bytes) -> pydicom.Dataset:
    film = pydicom.dcmread(io.BytesIO(data), force=True)
    if not hasattr(film, "file_meta"):
        film.file_meta = FileMetaDataset()
    return film


def _parsed_to_first_sequence(data: bytes) -> pydicom.Dataset:
    ends = lambda tag, VR, length: VR == "SQ" or length == UNDEFINED
    return read_partial(io.BytesIO(data), stop_when=ends, force=True)


def _is_cut(film: pydicom.Dataset) -> bool:
    """Whether encapsulated pixels were read up to a delimiter that is not theirs."""
    pixels = film.PixelData
    return bool(pixels) and pixels[:4] == ITEM and not film["PixelData"].is_undefined_length


def _rescued(data: bytes, film: pydicom.Dataset) -> pydicom.Dataset:
    """The film with the pixels of the last element (7FE0,0010) in the file, whatever comes before; as it was if there is none.

    pydicom stops at the end of a file without a delimiter, and after a sequence whose length is wrong.
    """
    found = _last_pixels(data)
    if found is None:
        return film
    start, content, end, fragmented = found
    icons = [icon.get("PixelData") for icon in film.get("IconImageSequence") or []]
    if data[content:end] in icons:
        return film
    header = _header_before(data[:start], film)
    pixels = data[content:end]
    header.PixelData = pixels + SEQUENCE_END + bytes(4) if fragmented else pixels
    header["PixelData"].is_undefined_length = fragmented
    header["PixelData"].VR = "OB" if fragmented else "OW"
    note("a sequence without its delimiter or of a wrong length")
    return header


def _last_pixels(data: bytes) -> tuple[int, int, int, bool] | None:
    """Start of the last element of pixels that reaches to the end of the file, of its content, its end, and whether it has
    fragments."""
    place = data.rfind(PIXEL_TAG)
    while place >= 0:
        explicit = data[place + 4 : place + 6] in (b"OB", b"OW")
        content = place + (12 if explicit else 8)
        length = data[content - 4 : content]
        if len(length) == 4:
            if length == b"\xff\xff\xff\xff" and data[content : content + 4] == ITEM:
                end = _end_of_items(data, content)
                if end is not None:
                    return place, content, end, True
            elif struct.unpack("<I", length)[0] == len(data) - content > 0:
                return place, content, len(data), False
        place = data.rfind(PIXEL_TAG, 0, place)
    return None


def _end_of_items(data: bytes, start: int) -> int | None:
    """Where the last item ends; None if these are no items, or the last one is cut off before the end of its stream."""
    try:
        places = list(items(data, start))
    except BrokenItemsError:
        return None
    if len(places) < 2:
        return None
    first, end = places[-1]
    (length,) = struct.unpack_from("<I", data, first - 4)
    if end - first < length and not data[first:end].rstrip(b"\0").endswith(b"\xff\xd9"):
        return None
    # the length of a cut item is that of its content
    return end if end - first == length else None


def _header_before(data: bytes, film: pydicom.Dataset) -> pydicom.Dataset:
    """The elements of ``data``, which ends before the pixels; what a damaged sequence hides is looked for behind it."""
    header = pydicom.Dataset()
    header.file_meta = film.file_meta
    header.set_original_encoding(*film.original_encoding, None)
    for tag in list(film.keys()):
        if tag.group < 0x7FE0 and keyword_for_tag(tag):
            header[tag] = film.get_item(tag)
    for marks, group in ((_PIXEL_MODULE, 0x0028), (_PRESENTATION_SHAPE, 0x2050)):
        place = min((at for at in (data.find(mark) for mark in marks) if at >= 0), default=-1)
        if place >= 0 and not any(tag.group == group for tag in set(header.keys())):
            explicit = data[place + 4 : place + 6].isalpha()
            hidden = read_dataset(DicomBytesIO(data[place:]), not explicit, True, stop_when=_leaves(group))
            header.update({tag: hidden.get_item(tag) for tag in set(hidden.keys())})
    return header


_PIXEL_MODULE = (
    b"\x28\x00\x02\x00US\x02\x00",
    b"\x28\x00\x10\x00US\x02\x00",
    b"\x28\x00\x02\x00\x02\x00\x00\x00",
    b"\x28\x00\x10\x00\x02\x00\x00\x00",
)
"""How SamplesPerPixel and Rows begin in Explicit and in Implicit VR Little Endian."""


_PRESENTATION_SHAPE = (b"\x50\x20\x20\x00CS", b"\x50\x20\x20\x00\x08\x00\x00\x00")


def _leaves(group: int) -> Callable[[BaseTag, str | None, int], bool]:
    return lambda tag, VR, length: tag.group != group
