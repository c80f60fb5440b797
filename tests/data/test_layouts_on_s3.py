"""Trees of collections are the same on S3 as in a folder, which other tests hold against what was written."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from cmcgns.data.labelled import open_set
from cmcgns.data.readers import open_source
from cmcgns.phantom import write_mimic_cxr, write_mimic_cxr_jpg
from tests.data.labelled import test_chexpert, test_nih, test_siim
from tests.data.published_trees import CORPUS
from tests.data.test_published import RELEASES, write_challenge
from tests.data.test_readers import open_i_dicom
from tests.data.trees import rows
from tests.s3 import S3Server

pytestmark = pytest.mark.s3


def mimic_with_challenge(release: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        write_mimic_cxr_jpg(CORPUS, folder)
        write_challenge(folder, release, RELEASES[release])

    return write


PAIRS: dict[str, Callable[[Path], object]] = {
    "mimic-cxr": lambda folder: write_mimic_cxr(CORPUS, folder),
    **{release: mimic_with_challenge(release) for release in RELEASES},
    "open-i-dicom": open_i_dicom,
}


def chexpert_in_batches(folder: Path) -> None:
    small = folder.with_name("small")
    test_chexpert.tree(small)
    test_chexpert.full_release(small, folder)


def second_siim(folder: Path) -> None:
    test_siim.tree(folder, zoom=1)
    test_siim.as_second_stage(folder)


LABELLED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "chexpert": ("chexpert", chexpert_in_batches),
    "siim": ("siim", second_siim),
    "nih": ("nih", test_nih.tree),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_on_s3_are_those_of_the_folder(s3_server: S3Server, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    PAIRS[name](folder)
    bucket = s3_server.make_bucket(f"layout-{name}")
    s3_server.upload(folder, f"{bucket}/set")
    local, remote = open_source(str(folder)), open_source(f"{bucket}/set")
    assert remote.format == local.format
    index = remote.index()
    assert rows(index) == rows(local.index())
    assert index.bad_rows == local.index().bad_rows
    for row in rows(index):
        path = row["films"][0]["path"]
        assert remote.read_report(row) == local.read_report(row)
        np.testing.assert_array_equal(remote.read_image(path).grey_HW, local.read_image(path).grey_HW)


@pytest.mark.parametrize("name", LABELLED)
def test_labels_on_s3_are_those_of_the_folder(s3_server: S3Server, tmp_path: Path, name: str) -> None:
    format, write = LABELLED[name]
    folder = tmp_path / name
    write(folder)
    bucket = s3_server.make_bucket(f"labels-{name}")
    s3_server.upload(folder, f"{bucket}/set")
    local, remote = open_set(format, str(folder)), open_set(format, f"{bucket}/set")
    assert remote.table == local.table
    for row in remote.table.slice(0, 3).to_pylist():
        film, local_film = (images.source.reader([]).read_image(row["path"]) for images in (remote, local))
        np.testing.assert_array_equal(film.grey_HW, local_film.grey_HW)
        np.testing.assert_equal(asdict(remote.annotations(row, film)), asdict(local.annotations(row, local_film)))
