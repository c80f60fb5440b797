"""DICOM files of each kind, written here, and real ones if available."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    MediaStorageDirectoryStorage,
    RLELossless,
)

from cmcgns.data.dicom import dicom_to_grey
from cmcgns.errors import BadRow

SECRET = "Doe^Jane"
RAMP = np.linspace(0, 4095, 40 * 50).reshape(40, 50).astype(np.uint16)
"""Dark at the top, bright at the bottom, as stored."""


def film(pixels: NDArray[Any] = RAMP, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> Dataset:
    """A film of ``pixels`` with ``elements`` set last."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, "1.2.3"
    data.PatientName, data.PatientID = SECRET, SECRET
    data.Modality, data.ViewPosition = "CR", "PA"
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    data.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.BitsAllocated = 8 * pixels.itemsize
    data.BitsStored = 8 if pixels.itemsize == 1 else 12
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    data.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    data["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def written(data: Dataset, preamble: bool = True) -> bytes:
    """``data`` as the bytes of a file."""
    buffer = io.BytesIO()
    syntax = data.file_meta.TransferSyntaxUID
    if preamble:
        pydicom.dcmwrite(buffer, data, enforce_file_format=True)
    else:
        del data.file_meta
        pydicom.dcmwrite(buffer, data, implicit_vr=syntax.is_implicit_VR, little_endian=True)
    return buffer.getvalue()


def stretched(values: NDArray[Any]) -> NDArray[np.uint8]:
    """The slow, obvious min-to-max stretch."""
    values = values.astype(np.float64)
    return np.rint((values - values.min()) / (values.max() - values.min()) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_uncompressed_films_are_stretched_from_min_to_max(syntax: str) -> None:
    grey = dicom_to_grey(written(film(syntax=syntax)))
    assert grey.dtype == np.uint8
    assert np.array_equal(grey, stretched(RAMP))


def compressed(syntax: str) -> Dataset:
    """The film of ``RAMP``, packed without loss."""
    data = film()
    if syntax == RLELossless:
        data.compress(RLELossless, generate_instance_uid=False)
        return data
    openjpeg = pytest.importorskip("openjpeg.utils")
    data.file_meta.TransferSyntaxUID = JPEG2000Lossless
    packed = openjpeg.encode_array(RAMP, bits_stored=12, photometric_interpretation=2, codec_format=0)
    data.PixelData = encapsulate([bytes(packed)])
    data["PixelData"].is_undefined_length = True
    return data


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_lossless_compression_changes_nothing(syntax: str) -> None:
    data = compressed(syntax)
    assert np.array_equal(dicom_to_grey(written(data)), stretched(RAMP))


def test_a_file_without_preamble_and_transfer_syntax_is_read() -> None:
    data = film(syntax=ImplicitVRLittleEndian)
    assert np.array_equal(dicom_to_grey(written(data, preamble=False)), stretched(RAMP))


def test_inverted_films_are_inverted_once() -> None:
    upright = dicom_to_grey(written(film()))
    for elements in (
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE"},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    ):
        assert np.array_equal(dicom_to_grey(written(film(**elements))), 255 - upright)


def test_signed_pixels_and_a_negative_rescale() -> None:
    signed = RAMP.astype(np.int16) - 2048
    assert np.array_equal(dicom_to_grey(written(film(signed))), stretched(signed))
    falling = film(signed, RescaleSlope=-1, RescaleIntercept=100)
    assert np.array_equal(dicom_to_grey(written(falling)), stretched(-signed))


@pytest.mark.parametrize(
    ("centre", "width"),
    [(2048, 1024), ([2048, 1000], [1024, 10]), ([100, 2048], [0, 1024]), ("2048.0", "1024")],
    ids=["one", "first of two", "width 0 passed over", "as text"],
)
def test_which_window_is_used(centre: Any, width: Any) -> None:
    grey = dicom_to_grey(written(film(WindowCenter=centre, WindowWidth=width)))
    # PS3.3 C.11.2.1.2.1, written out
    expected = np.clip(((RAMP.astype(float) - 2047.5) / 1023 + 0.5) * 255, 0, 255)
    assert np.array_equal(grey, np.rint(expected).astype(np.uint8))


@pytest.mark.parametrize(
    "elements",
    [
        {"WindowCenter": 2048, "WindowWidth": 0},
        {"WindowCenter": 60000, "WindowWidth": 10},
        {"WindowCenter": 2048},
        {"RescaleSlope": 1, "RescaleIntercept": 0},
    ],
    ids=["width 0", "window beside the pixels", "no width", "plain rescale"],
)
def test_a_useless_window_is_ignored(elements: dict[str, Any]) -> None:
    assert np.array_equal(dicom_to_grey(written(film(**elements))), stretched(RAMP))


def test_a_window_is_in_rescaled_values() -> None:
    plain = dicom_to_grey(written(film(WindowCenter=2048, WindowWidth=1024)))
    shifted = film(WindowCenter=1048, WindowWidth=1024, RescaleSlope=1, RescaleIntercept=-1000)
    assert np.array_equal(dicom_to_grey(written(shifted)), plain)


def test_a_voi_lut_is_preferred_to_a_window() -> None:
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 8]
    item.LUTData = (255 - np.arange(4096) // 16).astype(np.uint16).tobytes()
    item["LUTData"].VR = "OW"
    grey = dicom_to_grey(written(film(VOILUTSequence=[item], WindowCenter=2048, WindowWidth=1024)))
    assert np.array_equal(grey, 255 - RAMP // 16)


def test_padding_does_not_stretch() -> None:
    padded = RAMP // 2 + 100
    padded[0, :] = 0
    grey = dicom_to_grey(written(film(padded, PixelPaddingValue=0)))
    assert (grey[0] == 0).all()
    assert np.array_equal(grey[1:], stretched(padded[1:]))


def test_colour_becomes_luminance() -> None:
    rgb = np.zeros((4, 4, 3), np.uint8)
    rgb[0], rgb[1], rgb[2], rgb[3] = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
    assert dicom_to_grey(written(film(rgb)))[:, 0].tolist() == [76, 150, 29, 255]


def test_jpeg_in_ybr_becomes_luminance() -> None:
    from PIL import Image

    rgb = np.full((16, 16, 3), [200, 100, 50], np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(rgb).save(jpeg, "JPEG", quality=95)
    data = film(rgb, JPEGBaseline8Bit, PhotometricInterpretation="YBR_FULL_422")
    data.PixelData = encapsulate([jpeg.getvalue()])
    data["PixelData"].is_undefined_length = True
    assert abs(dicom_to_grey(written(data)).astype(int) - 124).max() <= 3


def _truncated(data: Dataset) -> bytes:
    return written(data)[:-1000]


def _frames() -> Dataset:
    return film(np.concatenate([RAMP, RAMP]), Rows=40, NumberOfFrames=2)


def _without_pixels(**elements: Any) -> Dataset:
    data = film(**elements)
    del data.PixelData
    return data


def _directory() -> bytes:
    data = _without_pixels()
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    return written(data)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _truncated(film()), "truncated"),
        (lambda: _truncated(film(syntax=DeflatedExplicitVRLittleEndian)) or b"", "truncated|PixelData"),
        (lambda: written(_frames()), "2 frames"),
        (lambda: written(_without_pixels()), "no PixelData"),
        (lambda: written(_without_pixels(Modality="SR")), "structured report"),
        (_directory, "DICOMDIR"),
        (lambda: written(film(PixelData=b"")), "empty"),
        (lambda: written(film(Rows=0)), "0 x 50"),
        (lambda: written(film(Rows=60000, Columns=60000)), "over the limit"),
        (lambda: written(film(RescaleSlope="1e400", RescaleIntercept=0)), "rescale|finite"),
        (lambda: written(film())[:200], "DICOM"),
        (lambda: b"\0" * 128 + b"DICM", "DICOM"),
        (lambda: b"", "DICOM"),
        (lambda: b"plain text, no film at all", "DICOM"),
    ],
)
def test_other_dicoms_are_rejected_with_a_reason_that_names_no_patient(make: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason) as error:
        dicom_to_grey(make())
    assert SECRET not in str(error.value)


@pytest.fixture(scope="module")
def real(realdata: Path) -> dict[str, NDArray[np.uint8] | str]:
    """Each real file's film, or why it is rejected."""
    found: dict[str, NDArray[np.uint8] | str] = {}
    for row in csv.DictReader((realdata / "dicom" / "index.csv").open()):
        try:
            found[row["file"]] = dicom_to_grey((realdata / "dicom" / row["file"]).read_bytes())
        except BadRow as error:
            found[row["file"]] = str(error)
    return found


def test_every_real_file_is_read_or_rejected_with_a_reason(realdata: Path, real: dict[str, Any]) -> None:
    for row in csv.DictReader((realdata / "dicom" / "index.csv").open()):
        film = real[row["file"]]
        if row["has_pixels"] == "True":
            assert film.shape == (int(row["Rows"]), int(row["Columns"])), row["file"]
            assert np.ptp(film) > 100, row["file"]
        else:
            assert "no PixelData" in film, row["file"]


def test_one_real_film_in_three_codings(real: dict[str, Any]) -> None:
    plain = real["RG1_UNCR.dcm"]
    assert np.array_equal(plain, real["RG1_J2KR.dcm"])
    assert abs(plain.astype(int) - real["RG1_J2KI"]).mean() <= 0.01 * 255
    # MONOCHROME1: the lung is darker than the spine after inversion
    assert plain[600:900, 400:600].mean() < plain[600:900, 850:1000].mean() - 20


def test_one_real_film_in_six_codings(real: dict[str, Any]) -> None:
    lossless = real["RG3_JPLL"].astype(int)
    for name, most in (("RG3_JLSL", 0), ("RG3_RLE", 0), ("RG3_J2KI", 8), ("RG3_JLSN", 8), ("RG3_JPLY", 16)):
        assert abs(lossless - real[name]).max() <= most, name
