"""Inputs after public bug reports, where they are at hand, and the films that come with pydicom, read as they always were."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from numpy.typing import NDArray
from PIL import Image

from cmcgns.data.decode import decode_image
from cmcgns.data.labelled import open_set
from cmcgns.data.readers import open_source
from cmcgns.data.reports import sections
from cmcgns.errors import BadRow, UserError
from tests.data.trees import rows

AS_BEFORE = json.loads(Path(__file__).with_name("films_of_pydicom.json").read_text())
"""Size and hash of the grey levels of each film that was read before headers were held against pixels (2026-11-30)."""


def grey(path: Path) -> NDArray[np.uint8]:
    return decode_image(path.read_bytes(), path.name).grey_HW


def test_the_films_that_come_with_pydicom_are_read_as_before_bit_for_bit() -> None:
    root = Path(pydicom.data.__file__).parent / "test_files"
    found = {}
    for name in AS_BEFORE:
        film = grey(root / name)
        found[name] = f"{film.shape} {hashlib.blake2b(film.tobytes(), digest_size=10).hexdigest()}"
    assert found == AS_BEFORE
    others = [
        path for path in sorted(root.rglob("*")) if path.is_file() and str(path.relative_to(root)) not in AS_BEFORE
    ]
    assert len(others) > 50
    for path in others:
        with pytest.raises(BadRow):
            grey(path)


def test_each_film_of_a_case_is_its_picture(cases: Path) -> None:
    pictures = sorted(cases.rglob("*.right.png"))
    assert len(pictures) >= 11
    for right in pictures:
        with Image.open(right) as picture:
            expected = np.asarray(picture).astype(int)
        film = grey(right.with_name(right.name.removesuffix(".right.png")))
        assert film.shape == expected.shape, right
        most = 4 if right.parent.name.startswith("jpeg") else 0
        assert abs(film - expected).max() <= most, right


def test_a_film_behind_an_icon_of_a_wrong_length_is_read(cases: Path) -> None:
    film = grey(cases / "icon-length-short" / "film.dcm")
    assert film.shape == (96, 80)
    assert np.ptp(film) > 200


def test_tables_and_reports_of_the_cases(cases: Path) -> None:
    with pytest.raises(UserError, match=r"row 1 under the header \(line 2\) has 4 cells, the header has 3"):
        open_source(str(cases / "csv-unquoted-commas" / "set")).index()
    source = open_source(str(cases / "excel-x000d" / "set"))
    for row in rows(source.index()):
        assert "x000" not in source.read_report(row).lower()
        assert set(sections(source.read_report(row))) == {"findings", "impression"}
    source = open_source(str(cases / "mimic-header-typos" / "set"))
    studies = rows(source.index())
    control = sections(source.read_report(studies[-1]))
    assert len(studies) == 7
    for row in studies:
        assert sections(source.read_report(row)) == control


def test_layouts_of_the_cases(cases: Path) -> None:
    source = open_source(str(cases / "open-i-dicom" / "set"))
    assert source.format == "open-i"
    assert [len(row["films"]) for row in rows(source.index())] == [2, 2]
    batches = cases / "chexpert-full-batches" / "set"
    for folder in (batches, batches / "CheXpert-v1.0 batch 1 (validate & csv)"):
        assert len(open_set("chexpert", str(folder)).table) == 5
    assert len(open_set("siim", str(cases / "siim-stage-2" / "set")).table) == 10
