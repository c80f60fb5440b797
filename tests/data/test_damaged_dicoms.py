"""DICOM files whose sequences, lengths or file meta are damaged while their pixels are whole."""

import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from cmcgns.data.dicom import dicom_to_grey
from cmcgns.data.repairs import noted
from cmcgns.errors import BadRow
from tests.data.coded_films import LOSSLESS, baseline, coded, expected, shot
from tests.data.test_dicom import SECRET, film, stretched, written

COMPRESSED = (RLELossless, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless)
END = b"\xfe\xff\xdd\xe0\0\0\0\0"
ITEM_END = b"\xfe\xff\x0d\xe0\0\0\0\0"
NAMED = b"\x02\x00\x10\x00UI"
A_SEQUENCE = "a sequence without its delimiter or of a wrong length"


def read(data: bytes) -> tuple[NDArray[np.uint8], set[str]]:
    """The film, and the rules by which it was read."""
    with noted() as notes:
        return dicom_to_grey(data), set(notes)


def without_syntax(data: bytes) -> bytes:
    """The file without the element that names its transfer syntax."""
    start = data.index(NAMED)
    (length,) = struct.unpack_from("<H", data, start + 6)
    group = data.index(b"\x02\x00\x00\x00UL\x04\x00") + 8
    (size,) = struct.unpack_from("<I", data, group)
    data = data[:group] + struct.pack("<I", size - 8 - length) + data[group + 4 :]
    return data[:start] + data[start + 8 + length :]


def icon(element_vr: str = "OB") -> Dataset:
    """A small picture of its own, as JPEG in fragments."""
    item = Dataset()
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.Rows, item.Columns, item.BitsAllocated, item.BitsStored, item.HighBit = 16, 16, 8, 8, 7
    item.PixelRepresentation = 0
    if element_vr == "OB":
        item.PixelData = encapsulate([bytes(np.random.default_rng(0).integers(0, 256, 300, np.uint8))])
        item["PixelData"].is_undefined_length = True
    else:
        item.PixelData = bytes(256)
    item["PixelData"].VR = element_vr
    return item


def with_icon(data: Dataset) -> bytes:
    data.IconImageSequence = Sequence([icon()])
    return written(data)


# Delimiters and lengths


@pytest.mark.parametrize(
    "tail", [b"", bytes(8), END[:4], bytes(64), b"\0"], ids=["none", "zeros", "half", "many zeros", "one zero"]
)
@pytest.mark.parametrize("syntax", COMPRESSED)
def test_the_delimiter_after_the_pixels_may_be_missing_or_zeros(syntax: str, tail: bytes) -> None:
    whole = written(coded(shot(), syntax, 12))
    assert whole.endswith(END)
    grey, rules = read(whole.removesuffix(END) + tail)
    assert np.array_equal(grey, expected())
    assert rules <= {A_SEQUENCE}


@pytest.mark.parametrize("syntax", COMPRESSED)
def test_pixels_that_are_cut_off_are_refused(syntax: str) -> None:
    whole = written(coded(shot(), syntax, 12)).removesuffix(END)
    for lost in (200, len(whole) // 8):
        with pytest.raises(BadRow, match="truncated"):
            dicom_to_grey(whole[:-lost])


@pytest.mark.parametrize("off", [-24, -2, 2, 24, 100])
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_an_item_of_an_icon_may_have_the_wrong_length(syntax: str, off: int) -> None:
    raw = with_icon(coded(shot(), syntax, 12))
    start = raw.index(b"\x88\x00\x00\x02SQ")
    item = raw.index(b"\xfe\xff\x00\xe0", start)
    (length,) = struct.unpack_from("<I", raw, item + 4)
    if length == 0xFFFFFFFF:
        pytest.skip("written without a length")
    damaged = raw[: item + 4] + struct.pack("<I", length + off) + raw[item + 8 :]
    assert np.array_equal(read(damaged)[0], expected())


@pytest.mark.parametrize("damage", ["no item end", "no sequence end", "neither", "zeros"])
@pytest.mark.parametrize("where", ["before the header of the pixels", "icon"])
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_a_sequence_before_the_pixels_may_lack_its_delimiters(syntax: str, where: str, damage: str) -> None:
    data = coded(shot(), syntax, 12)
    if where == "icon":
        data.IconImageSequence = Sequence([icon("OW")])
        name = "IconImageSequence"
    else:
        item = Dataset()
        item.ReferencedSOPInstanceUID = "1.2.3.4"
        data.ReferencedImageSequence = Sequence([item])
        name = "ReferencedImageSequence"
    data[name].is_undefined_length = True
    data[name].value[0].is_undefined_length_sequence_item = True
    raw = written(data)
    ends = ITEM_END + END
    assert ends in raw
    left = {"no item end": END, "no sequence end": ITEM_END, "neither": b"", "zeros": bytes(16)}[damage]
    at = raw.index(ends)
    assert np.array_equal(read(raw[:at] + left + raw[at + 16 :])[0], expected())


def test_a_report_or_a_header_without_pixels_is_still_refused() -> None:
    data = film()
    del data.PixelData
    data.IconImageSequence = Sequence([icon()])
    with pytest.raises(BadRow, match="no PixelData") as error:
        dicom_to_grey(written(data))
    assert SECRET not in str(error.value)


# Transfer syntax


@pytest.mark.parametrize("syntax", [*LOSSLESS, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_a_missing_transfer_syntax_is_read_off_the_pixels(syntax: str) -> None:
    data = (
        film(shot(), syntax) if syntax in (ImplicitVRLittleEndian, ExplicitVRBigEndian) else coded(shot(), syntax, 12)
    )
    grey, rules = read(without_syntax(written(data)))
    assert np.array_equal(grey, expected())
    if syntax in COMPRESSED:
        assert rules == {"a missing TransferSyntaxUID, read off the codestream"}


def test_a_missing_transfer_syntax_of_a_baseline_jpeg() -> None:
    grey8 = (shot() // 16).astype(np.uint8)
    grey, _ = read(without_syntax(written(baseline(grey8))))
    assert abs(grey.astype(int) - stretched(grey8)).max() <= 6


@pytest.mark.parametrize("named", [ExplicitVRLittleEndian, JPEGBaseline8Bit, *COMPRESSED])
@pytest.mark.parametrize("syntax", COMPRESSED)
def test_a_wrong_transfer_syntax_is_read_off_the_pixels(syntax: str, named: str) -> None:
    data = coded(shot(), syntax, 12)
    raw, uid = without_syntax(written(data)), named.encode() + b"\0" * (len(named) % 2)
    element = NAMED + struct.pack("<H", len(uid)) + uid
    group = raw.index(b"\x02\x00\x00\x00UL\x04\x00") + 8
    (size,) = struct.unpack_from("<I", raw, group)
    end = group + 4 + size
    at = raw.index(b"\x02\x00\x12\x00UI", group)
    assert at < end
    raw = raw[:group] + struct.pack("<I", size + len(element)) + raw[group + 4 : at] + element + raw[at:]
    grey, rules = read(raw)
    assert np.array_equal(grey, expected())
    assert rules == (set() if named == syntax else {"a wrong TransferSyntaxUID, read off the codestream"})


def test_an_unknown_transfer_syntax_is_refused_by_its_value() -> None:
    data = written(film(shot())).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.113619.5.2\0\0")
    with pytest.raises(BadRow, match=r"TransferSyntaxUID \(0002,0010\) is 1\.2\.840\.113619\.5\.2; expected"):
        dicom_to_grey(data)
