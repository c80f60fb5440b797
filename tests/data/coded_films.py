"""DICOM films for tests: a phantom of 12 bits, in every coding that an encoder is at hand for."""

import io
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from cmcgns.phantom import PhantomCorpus
from tests.data.test_dicom import film, stretched

LOSSLESS = (ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless)
HEIGHT, WIDTH = 96, 80


@cache
def shot() -> NDArray[np.uint16]:
    """A film of 12 bits; its lowest bits are used, too."""
    grey_HW = PhantomCorpus(1, seed=6, height=HEIGHT, width=WIDTH).render(0)
    return (grey_HW.astype(np.uint16) * 16 + np.arange(WIDTH, dtype=np.uint16) % 16).astype(np.uint16)


@cache
def expected() -> NDArray[np.uint8]:
    """What the film looks like: its least value black, its greatest white."""
    return stretched(shot())


def encapsulated(data: Dataset, stream: bytes, syntax: str) -> Dataset:
    """``data`` with its pixels replaced by ``stream``."""
    data.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    data.PixelData = encapsulate([stream])
    data["PixelData"].is_undefined_length = True
    data["PixelData"].VR = "OB"
    return data


def coded(pixels: NDArray[Any], syntax: str, bits: int = 16, **elements: Any) -> Dataset:
    """``pixels`` coded without loss with ``bits`` bits; then ``elements`` are set, whether they fit or not."""
    data = film(pixels, BitsStored=bits, HighBit=bits - 1)
    if syntax == ExplicitVRLittleEndian:
        pass
    elif syntax == RLELossless:
        data.compress(RLELossless, generate_instance_uid=False)
    elif syntax == JPEG2000Lossless:
        openjpeg = pytest.importorskip("openjpeg.utils")
        colour = 2 if pixels.ndim == 2 else 1
        stream = openjpeg.encode_array(pixels, bits_stored=bits, photometric_interpretation=colour, codec_format=0)
        encapsulated(data, bytes(stream), syntax)
    else:
        encapsulated(data, by_gdcm(data, syntax), syntax)
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def by_gdcm(data: Dataset, syntax: str) -> bytes:
    """The stream of an uncompressed film, coded by GDCM."""
    gdcm = pytest.importorskip("gdcm")
    kinds = {
        JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
        JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
    }
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = (str(Path(folder) / name) for name in ("plain.dcm", "packed.dcm"))
        pydicom.dcmwrite(plain, data, enforce_file_format=True)
        reader = gdcm.ImageReader()
        reader.SetFileName(plain)
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(kinds[syntax]))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(packed)
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        read = pydicom.dcmread(packed)
        return next(pydicom.encaps.generate_frames(read.PixelData, number_of_frames=1))


def jpeg(picture: NDArray[np.uint8] | Image.Image, **options: Any) -> bytes:
    """A baseline JPEG of nearly no loss."""
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, "JPEG", quality=98, **options)
    return buffer.getvalue()


def baseline(
    picture: NDArray[np.uint8] | Image.Image, options: dict[str, Any] | None = None, **elements: Any
) -> Dataset:
    """A film of 8 bits as baseline JPEG; then ``elements`` are set."""
    shape = np.asarray(picture).shape
    data = film(np.zeros(shape, np.uint8), BitsStored=8, HighBit=7)
    encapsulated(data, jpeg(picture, **(options or {})), JPEGBaseline8Bit)
    for name, value in elements.items():
        setattr(data, name, value)
    return data
