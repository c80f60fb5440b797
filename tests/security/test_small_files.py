"""Attacks by small files that take much memory or time once they are opened."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    SecondaryCaptureImageStorage,
)

from cmcgns.data.decode import Budget, decode_image
from cmcgns.data.image import stretch
from cmcgns.data.readers.base import FileSource
from cmcgns.data.reports import parse_report, sections, sentences
from cmcgns.data.scrub import identifiers, scrub
from cmcgns.errors import BadRow

MIB = 2**20


def test_a_large_film_in_16_bits_takes_a_small_multiple_of_its_size(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.fromarray(np.full((5_000, 5_000), 3000, np.uint16)).save(path, compress_level=1)
    assert path.stat().st_size < MIB
    measured = subprocess.run(
        [
            sys.executable, "-c",
            "import resource, sys; from cmcgns.data.decode import decode_image\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
            "before = peak(); decode_image(open(sys.argv[1], 'rb').read(), 'x.png'); print(peak() - before)",
            str(path),
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(measured.stdout) < 300  # 48 MiB as stored; with float64 copies it took 750


def test_a_film_in_strips_is_the_film_at_once() -> None:
    for pixels in (
        np.random.default_rng(0).normal(size=(1000, 30)).astype(np.float32),
        np.arange(70_000).reshape(700, 100),
    ):
        values = pixels.astype(np.float64)
        expected = np.rint((values - values.min()) * (255 / (values.max() - values.min())))
        assert np.array_equal(stretch(pixels), expected)
    with pytest.raises(BadRow, match="not finite"):
        stretch(np.array([[1.0, np.nan]]))


def test_large_films_take_turns() -> None:
    budget, inside, most, lock = Budget(500), [0], [0], threading.Lock()

    def decode(wanted: int) -> None:
        with budget.reserve(wanted):
            with lock:
                inside[0] += min(wanted, budget.total)
                most[0] = max(most[0], inside[0])
            threading.Event().wait(0.01)
            with lock:
                inside[0] -= min(wanted, budget.total)

    threads = [threading.Thread(target=decode, args=(wanted,)) for wanted in (200, 900, 100, 499, 2, 300, 500, 10) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < most[0] <= 500
    assert inside == [0]


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    decode_image(data, "x.jpg")
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(BadRow, match=r"JPEG has 10\d\d scans"):
        decode_image(data[:-2] + scan * 1000 + data[-2:], "x.jpg")


def dicom(syntax: str, pixels: bytes, rows: int = 64, columns: int = 64) -> bytes:
    """A DICOM file of 8-bit grey with ``pixels`` as they are."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    film = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
    film.Rows, film.Columns, film.SamplesPerPixel, film.PhotometricInterpretation = rows, columns, 1, "MONOCHROME2"
    film.BitsAllocated, film.BitsStored, film.HighBit, film.PixelRepresentation = 8, 8, 7, 0
    film.SOPClassUID, film.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    film.PixelData = pixels
    film["PixelData"].VR = "OB"
    file = io.BytesIO()
    film.save_as(file, enforce_file_format=True)
    return file.getvalue()


def test_a_deflated_dicom_is_read_and_one_that_inflates_to_8_gib_is_a_bad_row() -> None:
    good = dicom(DeflatedExplicitVRLittleEndian, bytes(range(64)) * 64)
    assert decode_image(good, "x.dcm").grey_HW.shape == (64, 64)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(64 * MIB)) + deflate.flush(zlib.Z_FULL_FLUSH)
    start = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFF0)
    head = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = meta_of(good) + head.compress(start) + head.flush(zlib.Z_FULL_FLUSH) + block * 128
    assert len(bomb) < 16 * MIB
    with pytest.raises(BadRow, match=r"truncated or broken|crashed or hung"):
        decode_image(bomb, "x.dcm")
    assert decode_image(good, "x.dcm").grey_HW.shape == (64, 64)  # the next film is not affected


def meta_of(data: bytes) -> bytes:
    """The part of a DICOM file that is never deflated: preamble and group 2."""
    (length,) = struct.unpack("<I", data[140:144])
    return data[: 144 + length]


def test_a_codestream_of_another_size_than_the_header_is_a_bad_row() -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((512, 512), np.uint8)).save(file, "JPEG2000", no_jp2=True, irreversible=False)
    encoded = pydicom.encaps.encapsulate([file.getvalue()])
    with pytest.raises(BadRow, match=r"codestream is for \(512, 512\) pixels, the header says 64 x 64"):
        decode_image(dicom(JPEG2000Lossless, encoded), "x.dcm")
    assert decode_image(dicom(JPEG2000Lossless, encoded, 512, 512), "x.dcm").grey_HW.shape == (512, 512)


@pytest.mark.parametrize(
    "text",
    [
        "[**" * 700_000,
        "FINDINGS: lungs are clear\n" * 80_000,
        "." * 2_000_000 + "x",
        "".join(f"HEADER {i}: lungs clear\n{'_' * 10}\n" for i in range(40_000)),
        "FINDINGS:" * 200_000,
        "\n " * 1_000_000 + "x",
        "1." * 1_000_000,
        '."' * 1_000_000 + "x",
        "(" * 2_000_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_long_repetitions_in_a_report_take_linear_time(text: str) -> None:
    """Two million letters: with a step for each pair of them this test would not end."""
    sections(text)
    sentences(text)
    with contextlib.suppress(BadRow):
        parse_report(text)


@pytest.mark.parametrize(
    "text", ["a-" * 500_000, "a." * 500_000, "1 " * 500_000, "Dr. " * 300_000, "Ab, " * 300_000, "[**" * 300_000]
)
def test_scrubbing_long_repetitions_takes_linear_time(text: str) -> None:
    scrub(text)
    list(identifiers(text))


def test_a_named_pipe_in_the_corpus_is_a_bad_row(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadRow, match="film file is not a regular file"):
        FileSource(str(tmp_path), "pairs-csv").read_image("pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(BadRow, match="film file is not a regular file"):
        FileSource(str(tmp_path), "pairs-csv", follow_links=True).read_image("zero.png")
