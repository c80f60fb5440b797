"""Damaged files: each file without a film is one bad row with its reason; unusual files with a film are read."""

import json
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cmcgns import storage
from cmcgns.data.prepare.config import PrepareConfig
from cmcgns.data.prepare.shard import Maker, Pseudonyms
from cmcgns.data.readers import open_source
from cmcgns.phantom import PhantomCorpus
from tests.benchmarks.measure import peak_mib
from tests.data.prepare.sets import prepare_here, rows

FILM_HW = cv2.normalize(PhantomCorpus(1, seed=8, height=240, width=200).render(0), None, 0, 255, cv2.NORM_MINMAX)
"""From black to white, like 16-bit images without a window."""
MOST_MIB = 300
"""MB; decoding the bomb of 400 million pixels would take 400."""
REASONS = {
    "truncated.jpg": "film file is truncated or broken",
    "empty.png": "film file is empty (0 bytes)",
    "wrong.jpg": "film file is neither JPEG, PNG, TIFF, BMP, WebP nor DICOM",
    "bomb.png": "film is over the limit of 100000000 pixels",
    "loop.png": "film file is a circular symbolic link",
    "dangling.png": "film file is missing",
    "folder.png": "film file is missing",
    "../escape.png": "film path is outside the corpus folder",
}


def bomb() -> bytes:
    """A PNG of 20000 x 20000 black pixels in 400 KB."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    squeeze = zlib.compressobj(9)
    line = bytes(20001)
    packed = b"".join(squeeze.compress(line) for _ in range(20000)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    film = Image.fromarray(FILM_HW)
    film.save(folder / "whole.png")
    film.save(folder / "truncated.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "truncated.jpg").read_bytes()[:2000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "wrong.jpg").write_bytes(b"GIF89a" + bytes(100))
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nothing.png")
    (folder / "folder.png").mkdir()
    (folder / "again").symlink_to(folder)  # a link to its own folder
    Image.fromarray(FILM_HW.astype(np.uint16) * 257).save(folder / "sixteen.png")
    film.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    film.rotate(90, expand=True).save(folder / "turned.jpg", quality=95, exif=exif)
    names = ["whole.png", "sixteen.png", "cmyk.jpg", "turned.jpg", *REASONS]
    lines = [f"{name},The lungs are clear of {number} things.,train" for number, name in enumerate(names)]
    (folder / "pairs.csv").write_text("\n".join(["image,report,split", *lines]) + "\n")
    return folder


@pytest.mark.ray
def test_each_damaged_file_is_one_bad_row_with_its_reason(local_ray: None, damaged: Path, tmp_path: Path) -> None:
    assert prepare_here(damaged, tmp_path / "set", "--data.max_bad_fraction=1", "--prepare.image_size=512") == 0
    bad = [json.loads(line) for line in (tmp_path / "set" / "bad_rows.jsonl").read_text().splitlines()]
    assert len(bad) == len(REASONS)
    found = {row["source"].rpartition("/")[2]: row["reason"] for row in bad}
    for name, reason in REASONS.items():
        key = "pairs.csv row 12" if "escape" in name else name
        assert found.pop(key).startswith(reason), name
    assert not found
    odd = {
        row["image_id"]: cv2.imdecode(np.frombuffer(row["image"], np.uint8), 0) for row in rows(str(tmp_path / "set"))
    }
    assert set(odd) == {"whole.png", "sixteen.png", "cmyk.jpg", "turned.jpg"}
    for name, film_HW in odd.items():
        assert film_HW.shape == odd["whole.png"].shape
        assert np.abs(film_HW.astype(int) - odd["whole.png"]).mean() < 3, name


def test_damaged_files_take_no_more_memory_than_a_film(damaged: Path, tmp_path: Path) -> None:
    source = open_source(str(damaged))
    studies = source.index().table.to_pylist()
    maker = Maker(source, PrepareConfig(out=str(tmp_path)), Pseudonyms())
    maker.rows(studies[:1])
    assert peak_mib(lambda: maker.rows(studies)) < MOST_MIB


def test_a_link_to_its_own_folder_is_not_followed(damaged: Path) -> None:
    names = storage.list_files(str(damaged))
    assert len(names) == len(set(names)) == len([path for path in damaged.iterdir() if not path.is_dir()])
