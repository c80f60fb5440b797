"""Leaks between splits are found, similar films are not."""

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from cmcgns.data.prepare.check import facts_of, leaks
from cmcgns.data.record import PREPARED_SCHEMA
from cmcgns.phantom import PhantomCorpus

CORPUS = PhantomCorpus(40, seed=4, height=128, width=112)


def row(number: int, split: str, image: bytes | None = None, **changes: object) -> dict[str, object]:
    """A row of a prepared set with study ``number`` of the phantom, one patient per study."""
    grey_HW = CORPUS.render(number)
    facts = {
        "patient_id": f"p{number}", "group": f"p{number}", "study_id": f"s{number}", "image_id": f"i{number}", "view": "PA",
        "split": split, "image": image or encoded(grey_HW, ".png"), "height": 128, "width": 112, "crop": [0, 0, 112, 128],
        "report": "", "sentences": [f"finding number {number}"], "labels": [], "source": "",
    }  # fmt: skip
    return facts | changes


def encoded(grey_HW: np.ndarray, suffix: str, *options: int) -> bytes:
    return bytes(cv2.imencode(suffix, grey_HW, options)[1].tobytes())


def facts(*rows: dict[str, object]) -> pd.DataFrame:
    found, broken = facts_of(pa.Table.from_pylist(list(rows), schema=PREPARED_SCHEMA))
    assert broken == []
    return found.to_pandas()


def test_forty_films_in_three_splits_are_forty_pictures() -> None:
    splits = ("train", "valid", "test")
    assert leaks(facts(*(row(number, splits[number % 3]) for number in range(40)))) == []


@pytest.mark.parametrize("how", ["the same file", "a JPEG of it", "a smaller copy"])
def test_one_image_in_two_splits_is_found_in_any_encoding(how: str) -> None:
    grey_HW = CORPUS.render(3)
    small_HW = cv2.resize(grey_HW, (84, 96), interpolation=cv2.INTER_AREA)
    copies = {
        "the same file": {"image": encoded(grey_HW, ".png")},
        "a JPEG of it": {"image": encoded(grey_HW, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 75)},
        "a smaller copy": {"image": encoded(small_HW, ".png"), "height": 96, "width": 84},
    }
    others = [row(number, "train") for number in range(20)]
    (found,) = leaks(facts(*others, row(30, "test", **copies[how])))
    assert (found.kind, found.ids) == ("film in two splits", ["s3/i3", "s30/i30"])
    assert found.is_fault


def test_one_image_twice_in_one_split_is_not_a_leak() -> None:
    assert leaks(facts(row(1, "train"), row(2, "train", image=encoded(CORPUS.render(1), ".png")), row(3, "test"))) == []


def test_a_patient_and_a_group_in_two_splits_are_found_with_their_films() -> None:
    found = leaks(
        facts(
            row(1, "train", patient_id="p7", group="p7"),
            row(2, "valid", patient_id="p7", group="p7"),
            row(3, "train", group="hospital"),
            row(4, "test", group="hospital"),
        )
    )
    assert [(finding.kind, finding.ids) for finding in found] == [
        ("patient in two splits", ["s1/i1", "s2/i2"]),
        ("group in two splits", ["s3/i3", "s4/i4"]),
    ]
    assert all(finding.is_fault for finding in found)


def test_equal_reports_are_listed_but_pass() -> None:
    normal = {"sentences": ["no acute process"]}
    (found,) = leaks(facts(row(1, "train", **normal), row(2, "test", **normal), row(3, "test", **normal)))
    assert (found.kind, found.ids, found.is_fault) == ("report in two splits", ["s1/i1", "s2/i2"], False)
    assert "acute" not in found.what
