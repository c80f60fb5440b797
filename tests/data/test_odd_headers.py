"""Films whose header and pixels disagree: read by what the pixels say, or refused by the tag that is wrong."""

import struct
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from cmcgns.data.dicom import dicom_to_grey
from cmcgns.data.repairs import noted
from cmcgns.errors import BadRow
from tests.data.coded_films import LOSSLESS, baseline, coded, encapsulated, expected, shot
from tests.data.jpeg_ls import encode_jpeg_ls
from tests.data.test_dicom import SECRET, film, stretched, written

GREY = (shot() // 16).astype(np.uint8)


def read(data: Dataset) -> tuple[NDArray[np.uint8], set[str]]:
    """The film, and the rules by which it was read."""
    with noted() as notes:
        return dicom_to_grey(written(data)), set(notes)


def refused(data: Dataset) -> str:
    """Why the film is refused; no patient is named."""
    with pytest.raises(BadRow) as error:
        dicom_to_grey(written(data))
    assert SECRET not in str(error.value)
    return str(error.value)


# Rescale and lookup tables


@pytest.mark.parametrize(
    "elements",
    [
        {"RescaleSlope": "", "RescaleIntercept": ""},
        {"RescaleSlope": 1, "RescaleIntercept": ""},
        {"RescaleSlope": "", "RescaleIntercept": -1024},
        {"RescaleSlope": None, "RescaleIntercept": None},
        {"RescaleSlope": 2},
        {"RescaleSlope": 0, "RescaleIntercept": 0},
        {"RescaleSlope": 0, "RescaleIntercept": -1024},
        {"ModalityLUTSequence": []},
        {"ModalityLUTSequence": [Dataset()]},
    ],
    ids=[
        "both empty",
        "intercept empty",
        "slope empty",
        "no value",
        "slope alone",
        "slope 0",
        "slope 0 and -1024",
        "no LUT",
        "empty LUT",
    ],
)
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 2048, "WindowWidth": 4096}], ids=["stretched", "in a window"])
def test_a_rescale_that_is_empty_half_empty_or_zero_is_none(elements: dict[str, Any], window: dict[str, Any]) -> None:
    grey, _ = read(film(shot(), **elements, **window))
    assert np.array_equal(grey, dicom_to_grey(written(film(shot(), **window))))
    if not window:
        assert np.array_equal(grey, expected())


def malformed(data: Dataset, **texts: str) -> bytes:
    """``data`` with decimal strings of any text, which pydicom would not write."""
    for name, text in texts.items():
        data.add_new(name, "LO", text)
    raw = written(data)
    for name in texts:
        tag = pydicom.tag.Tag(name)
        mark = struct.pack("<HH", tag.group, tag.element)
        raw = raw.replace(mark + b"LO", mark + b"DS")
    return raw


def test_numbers_with_a_comma_are_numbers() -> None:
    plain = film(shot(), RescaleSlope="2", RescaleIntercept="0.5", WindowCenter="4096.5", WindowWidth="1024")
    comma = {"RescaleSlope": "2,0", "RescaleIntercept": "0,5", "WindowCenter": "4096,5", "WindowWidth": "1024,0"}
    assert np.array_equal(dicom_to_grey(malformed(film(shot()), **comma)), dicom_to_grey(written(plain)))


@pytest.mark.parametrize(("centre", "width"), [("", ""), ("2048", "wide"), ("nan", "4096"), ("2048", "-4096")])
def test_a_window_that_is_no_window_is_none(centre: str, width: str) -> None:
    assert np.array_equal(dicom_to_grey(malformed(film(shot()), WindowCenter=centre, WindowWidth=width)), expected())


def test_a_rescale_that_is_no_number_is_refused_by_its_tag() -> None:
    assert "RescaleSlope (0028,1053)" in refused(film(shot(), RescaleSlope="1e400", RescaleIntercept=0))
    assert "RescaleSlope (0028,1053)" in refused(film(shot(), RescaleSlope=["1", "2"], RescaleIntercept=0))
    data = film(shot(), RescaleIntercept=0)
    data.add_new(0x00281053, "LO", SECRET)
    assert "RescaleSlope (0028,1053) is not valid, expected one finite number" in refused(data)


def lut(entries: int, first: int, bits: int, table: NDArray[Any], vr: str = "OW", descriptor: str = "US") -> Dataset:
    item = Dataset()
    if descriptor == "OW":
        item.add_new(0x00283002, "OW", np.array([entries, first, bits], "<u2").tobytes())
    else:
        item.add_new(0x00283002, descriptor, [entries, first, bits])
    item.add_new(0x00283006, vr, table.tobytes() if vr == "OW" else [int(each) for each in table])
    return item


FALLING = (65535 - 16 * np.arange(4096)).astype("<u2")
"""A table that inverts 12 bits."""


@pytest.mark.parametrize(
    "item",
    [
        lut(4096, 0, 16, FALLING),
        lut(4096, 0, 16, FALLING, "US"),
        lut(4096, 0, 16, FALLING, descriptor="OW"),
        lut(4096, 0, 12, FALLING // 16),
        lut(4096, 0, 16, FALLING[:4000]),
        lut(0, 0, 16, np.pad(FALLING, (0, 65536 - 4096), "edge")),
        lut(4096, 0, 8, (FALLING // 257).astype("u1")),
    ],
    ids=["words", "as US", "descriptor as bytes", "12 bits", "too short", "0 for 65536", "bytes"],
)
@pytest.mark.parametrize("sequence", ["ModalityLUTSequence", "VOILUTSequence"])
def test_lookup_tables_as_devices_write_them(item: Dataset, sequence: str) -> None:
    grey, _ = read(film(shot(), **{sequence: [item]}))
    if sequence == "ModalityLUTSequence":  # then the values of the film are stretched
        assert abs(grey.astype(int) - stretched(65535 - 16 * shot().astype(int))).max() <= 1
    else:  # the range of the table is that of the grey levels
        last = 3999 if item["LUTData"].VM == 1 and len(item["LUTData"].value) == 8000 else 4095
        assert abs(grey - np.clip(255 * (1 - shot() / last), 0, 255)).max() <= 1


def test_the_first_value_of_a_table_may_have_the_wrong_sign() -> None:
    signed = shot().astype(np.int16) - 2048
    item = lut(4096, 65536 - 2048, 16, FALLING)
    grey, _ = read(film(signed, VOILUTSequence=[item]))
    assert abs(grey - 255 * (1 - shot() / 4095)).max() <= 1


# Bits


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_left_justified_values_are_moved_to_the_right(syntax: str) -> None:
    grey, rules = read(coded(shot() << 4, syntax, 16, BitsStored=12, HighBit=15))
    assert np.array_equal(grey, expected())
    assert "left-justified values (HighBit)" in rules


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_left_justified_values_of_any_depth_show_their_window(bits: int) -> None:
    values = (shot() >> 2) << (bits - 10)
    plain = film(values, BitsStored=bits, HighBit=bits - 1, WindowCenter=2 ** (bits - 1), WindowWidth=2 ** (bits - 1))
    moved = film(
        values << (16 - bits), BitsStored=bits, HighBit=15, WindowCenter=2 ** (bits - 1), WindowWidth=2 ** (bits - 1)
    )
    assert np.array_equal(read(moved)[0], dicom_to_grey(written(plain)))


def test_left_justified_signed_values_keep_their_sign() -> None:
    signed = shot().astype(np.int16) - 2048
    data = film((signed.astype(np.int32) << 4).astype(np.int16), BitsStored=12, HighBit=15, PixelRepresentation=1)
    assert np.array_equal(read(data)[0], expected())


@pytest.mark.parametrize("high", [15, 10, 7])
def test_a_high_bit_that_the_values_contradict_is_ignored(high: int) -> None:
    grey, rules = read(film(shot(), BitsStored=12, HighBit=high))
    assert np.array_equal(grey, expected())
    assert rules == {"HighBit other than BitsStored - 1"}


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_overlay_bits_are_not_part_of_the_film(syntax: str) -> None:
    marked = shot().copy()
    marked[20:40, 10:60] |= 1 << 12
    marked[50:60, 30:35] |= 1 << 15
    grey, rules = read(coded(marked, syntax, 16, BitsStored=12, HighBit=11))
    assert np.array_equal(grey, expected())
    assert rules == {"bits above BitsStored cut off (overlays)"}


def test_an_overlay_may_cover_most_of_a_film_if_the_header_has_it() -> None:
    marked = shot() | (np.indices(shot().shape).sum(0) % 2 << 12).astype(np.uint16)
    data = film(marked, BitsStored=12, HighBit=11)
    data.add_new(0x60000100, "US", 16)
    data.add_new(0x60000102, "US", 12)
    assert np.array_equal(read(data)[0], expected())


def test_values_that_need_more_than_bits_stored_are_refused_by_it() -> None:
    deep = shot() * 16
    reason = refused(film(deep, BitsStored=12, HighBit=11))
    assert f"BitsStored (0028,0101) is 12, but pixels reach {deep.max()}; expected at most 4095" in reason


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless])
def test_a_codestream_with_more_bits_than_bits_stored_counts(syntax: str) -> None:
    deep = shot() * 16
    grey, rules = read(coded(deep, syntax, 16, BitsStored=12, HighBit=11))
    assert np.array_equal(grey, stretched(deep))
    assert rules == {"BitsStored of the codestream"}


def test_values_with_the_other_sign_or_byte_order_are_refused_by_their_tag() -> None:
    wide = (shot().astype(np.uint32) * 16).astype(np.uint16)
    as_signed = film(wide, BitsStored=16, HighBit=15, PixelRepresentation=1)
    assert "PixelRepresentation (0028,0103) is 1" in refused(as_signed)
    signed = shot().astype(np.int16) - 2048
    as_unsigned = film(signed.astype(np.uint16) & 0xFFF, BitsStored=12, HighBit=11)
    assert "PixelRepresentation (0028,0103) is 0" in refused(as_unsigned)
    for bits in (12, 16):
        assert "bytes swapped" in refused(film(shot().byteswap(), BitsStored=bits, HighBit=bits - 1))


# Padding


@pytest.mark.parametrize(
    ("value", "limit"),
    [(-2000, None), (63536, None), (-2000, -1990), (63536, 63546), (-1990, -2000)],
    ids=["right sign", "as unsigned", "range", "range as unsigned", "range upside down"],
)
def test_padding_of_a_signed_film_may_be_written_with_the_wrong_sign(value: int, limit: int | None) -> None:
    pixels = shot().astype(np.int16)
    pixels[:9] = -2000 if limit is None else -1995
    data = film(pixels, BitsStored=16, HighBit=15, PixelRepresentation=1)
    for tag, padding in ((0x00280120, value), (0x00280121, limit)):
        if padding is not None:
            data.add_new(tag, "SS" if padding < 0 else "US", padding)
    raw = written(data)
    for tag in (b"\x28\x00\x20\x01", b"\x28\x00\x21\x01"):
        assert (tag in raw) == (tag == b"\x28\x00\x20\x01" or limit is not None)
    assert np.array_equal(dicom_to_grey(raw)[9:], stretched(shot()[9:]))


def test_padding_of_an_unsigned_film_may_be_written_as_signed() -> None:
    pixels = shot().copy()
    pixels[:9] = 63536
    data = film(pixels, BitsStored=16, HighBit=15)
    data.add_new(0x00280120, "SS", -2000)
    assert np.array_equal(dicom_to_grey(written(data))[9:], stretched(shot()[9:]))


def test_padding_outside_of_the_stored_bits_is_no_value_of_the_film() -> None:
    pixels = shot().copy()
    pixels[:9] = 63536
    data = film(pixels, BitsStored=12, HighBit=11)
    data.add_new(0x00280120, "US", 63536)
    assert np.array_equal(read(data)[0][9:], stretched(shot()[9:]))


# Components and colour


COLOUR = np.dstack([GREY, GREY // 2 + 60, 255 - GREY])
LUMINANCE = np.rint(COLOUR @ [0.299, 0.587, 0.114])


@pytest.mark.parametrize("subsampling", [0, 2], ids=["4:4:4", "4:2:0"])
def test_a_colour_jpeg_under_a_grey_header_is_the_film(subsampling: int) -> None:
    picture, options = np.dstack([GREY] * 3), {"subsampling": subsampling}
    data = baseline(picture, options, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2")
    del data.PlanarConfiguration
    grey, rules = read(data)
    assert abs(grey.astype(int) - GREY).max() <= 6
    assert rules == {"SamplesPerPixel of the codestream"}


@pytest.mark.parametrize("syntax", [JPEG2000Lossless])
def test_a_colour_codestream_of_other_kinds_under_a_grey_header_is_the_film(syntax: str) -> None:
    data = coded(np.dstack([GREY] * 3), syntax, 8, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2")
    assert np.array_equal(read(data)[0], GREY)


@pytest.mark.parametrize("colour", ["RGB", "YBR_FULL_422", "YBR_FULL"])
def test_a_grey_codestream_under_a_colour_header_is_the_film(colour: str) -> None:
    data = baseline(GREY, SamplesPerPixel=3, PhotometricInterpretation=colour, PlanarConfiguration=0)
    assert abs(read(data)[0].astype(int) - stretched(GREY)).max() <= 6
    data = coded(GREY, JPEG2000Lossless, 8, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    assert np.array_equal(read(data)[0], stretched(GREY))


@pytest.mark.parametrize("label", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize("keep_rgb", [False, True], ids=["YCbCr", "RGB"])
def test_the_stream_says_whether_a_jpeg_is_rgb(label: str, keep_rgb: bool) -> None:
    data = baseline(COLOUR, {"subsampling": 0, "keep_rgb": keep_rgb}, PhotometricInterpretation=label)
    assert abs(read(data)[0].astype(int) - LUMINANCE).max() <= 6


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_uncompressed_ybr_labelled_rgb_is_told_by_its_planes(syntax: str) -> None:
    ybr = np.dstack([GREY, np.full_like(GREY, 128), np.full_like(GREY, 127)])
    grey, rules = read(coded(ybr, syntax, 8))
    assert np.array_equal(grey, GREY)
    assert rules == {"YBR labelled RGB"}


@pytest.mark.parametrize("written_as", ["MONOCHROME1", "MONOCHROME1\0", " MONOCHROME1", "monochrome1", "MONOCHROME 1"])
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_polarity_is_kept_in_every_syntax_and_spelling(syntax: str, written_as: str) -> None:
    data = coded(shot(), syntax, 12)
    data.PhotometricInterpretation = written_as
    assert np.array_equal(read(data)[0], 255 - expected())


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_polarity_is_kept_at_every_depth(bits: int) -> None:
    values = (shot().astype(np.uint32) << 4 >> (16 - bits)).astype(np.uint8 if bits == 8 else np.uint16)
    data = film(values, BitsStored=bits, HighBit=bits - 1, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(read(data)[0], 255 - stretched(values))
    if bits == 8:
        lossy = baseline(values, PhotometricInterpretation="MONOCHROME1")
        assert abs(read(lossy)[0].astype(int) - (255 - stretched(values))).max() <= 6


def test_an_unknown_colour_space_is_refused_by_its_tag() -> None:
    assert "PhotometricInterpretation (0028,0004)" in refused(film(shot(), PhotometricInterpretation="GREYISH"))


# Depth and missing elements


def test_a_baseline_jpeg_under_16_bits_allocated_is_8_bits() -> None:
    for bits in ({"BitsStored": 12, "HighBit": 11}, {"BitsStored": 16, "HighBit": 15}, {"BitsStored": 8, "HighBit": 7}):
        for syntax in (JPEGBaseline8Bit, JPEGExtended12Bit):
            data = baseline(GREY, BitsAllocated=16, **bits)
            data.file_meta.TransferSyntaxUID = syntax
            grey, rules = read(data)
            assert abs(grey.astype(int) - stretched(GREY)).max() <= 6
            assert rules == {"BitsAllocated of the codestream"}


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_the_depth_of_a_codestream_counts(syntax: str, bits: int) -> None:
    values = (shot().astype(np.uint32) << 4 >> (16 - bits)).astype(np.uint8 if bits == 8 else np.uint16)
    wrong = 24 - 8 * values.itemsize
    data = coded(values, syntax, bits, BitsAllocated=wrong, BitsStored=wrong, HighBit=wrong - 1)
    assert np.array_equal(read(data)[0], stretched(values))


@pytest.mark.parametrize("bits", range(2, 17))
def test_jpeg_ls_of_any_depth_is_read(bits: int) -> None:
    values = (shot().astype(np.uint32) << 4 >> (16 - bits)).astype(np.uint8 if bits <= 8 else np.uint16)
    data = film(values, BitsStored=bits, HighBit=bits - 1)
    grey, _ = read(encapsulated(data, encode_jpeg_ls(values, bits), JPEGLSLossless))
    assert np.array_equal(grey, stretched(values))


ATTRIBUTES = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
)


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize("missing", [*((name,) for name in ATTRIBUTES), ATTRIBUTES], ids="+".join)
def test_elements_that_the_pixels_show_may_be_missing(syntax: str, missing: tuple[str, ...]) -> None:
    data = coded(shot(), syntax, 12)
    for name in missing:
        delattr(data, name)
    grey, rules = read(data)
    assert np.array_equal(grey, expected())
    assert rules


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless])
def test_the_size_of_a_codestream_is_taken_or_must_agree(syntax: str) -> None:
    data = coded(shot(), syntax, 12)
    del data.Rows, data.Columns
    assert np.array_equal(read(data)[0], expected())
    reason = refused(coded(shot(), syntax, 12, Rows=80, Columns=96))
    assert "is for (96, 80) pixels, the header says 80 x 96: Rows (0028,0010), Columns (0028,0011)" in reason


@pytest.mark.parametrize(
    ("elements", "says"),
    [
        ({"BitsAllocated": 12}, "BitsAllocated (0028,0100) is 12, expected 8 or 16"),
        (
            {"BitsStored": 17, "HighBit": 16},
            "BitsStored (0028,0101) is 17, expected at most BitsAllocated (0028,0100)",
        ),
        ({"Rows": 40}, "PixelData (7FE0,0010) has 15360 bytes, the header asks for 6400: Rows (0028,0010) is 40"),
        ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "has 15360 bytes, the header asks for 7680"),
        ({"Rows": None}, "Rows (0028,0010) empty"),
    ],
)
def test_a_header_that_the_pixels_contradict_is_refused_by_its_tag(elements: dict[str, Any], says: str) -> None:
    assert says in refused(film(shot(), **elements))


def test_bits_allocated_8_with_12_stored_is_16() -> None:
    grey, rules = read(film(shot(), BitsAllocated=8))
    assert np.array_equal(grey, expected())
    assert rules == {"BitsAllocated of the number of bytes"}


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLosslessSV1, RLELossless])
def test_unpacked_pixels_under_the_syntax_of_packed_ones_are_read(syntax: str) -> None:
    raw = written(film(shot()))
    element = b"\x02\x00\x10\x00UI"
    before, after = (
        element + struct.pack("<H", len(uid)) + uid for uid in map(padded, (ExplicitVRLittleEndian, syntax))
    )
    assert raw.count(before) == 1
    length = b"\x02\x00\x00\x00UL\x04\x00"
    (old,) = struct.unpack_from("<I", raw, raw.index(length) + 8)
    new = struct.pack("<I", old + len(after) - len(before))
    raw = raw.replace(before, after).replace(length + struct.pack("<I", old), length + new)
    with noted() as notes:
        assert np.array_equal(dicom_to_grey(raw), expected())
    assert set(notes) == {"a wrong TransferSyntaxUID, as the pixels are not compressed"}


def padded(uid: str) -> bytes:
    return uid.encode() + b"\0" * (len(uid) % 2)
