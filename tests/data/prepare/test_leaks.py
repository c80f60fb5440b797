"""Leaks between splits are found, similar films are not."""

import cv2
import numpy as np
import pyarrow as pa
import pytest

from cmcgns.data.prepare import leaks as module
from cmcgns.data.prepare.check import facts_of
from cmcgns.data.prepare.leaks import FACT_SCHEMA, MAX_BITS, MAX_LEVELS, THUMBNAIL, Finding, facts_on_disk, leaks
from cmcgns.data.record import PREPARED_SCHEMA
from cmcgns.errors import UserError
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


def leaks_of(*rows: dict[str, object]) -> list[Finding]:
    """The leaks of a set of these rows, which are in two shards."""
    with facts_on_disk(len(rows)) as facts:
        for part in (rows[:3], rows[3:]):
            found, broken = facts_of(pa.Table.from_pylist(list(part), schema=PREPARED_SCHEMA))
            assert broken == []
            facts.add(found)
        return leaks(facts)


def test_forty_films_in_three_splits_are_forty_pictures() -> None:
    splits = ("train", "valid", "test")
    assert leaks_of(*(row(number, splits[number % 3]) for number in range(40))) == []


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
    (found,) = leaks_of(*others, row(30, "test", **copies[how]))
    assert (found.kind, found.ids) == ("film in two splits", ["s3/i3", "s30/i30"])
    assert found.is_fault


def test_one_image_twice_in_one_split_is_not_a_leak() -> None:
    assert leaks_of(row(1, "train"), row(2, "train", image=encoded(CORPUS.render(1), ".png")), row(3, "test")) == []


def test_a_patient_and_a_group_in_two_splits_are_found_with_their_films() -> None:
    found = leaks_of(
        row(1, "train", patient_id="p7", group="p7"),
        row(2, "valid", patient_id="p7", group="p7"),
        row(3, "train", group="hospital"),
        row(4, "test", group="hospital"),
    )
    assert [(finding.kind, finding.ids) for finding in found] == [
        ("patient in two splits", ["s1/i1", "s2/i2"]),
        ("group in two splits", ["s3/i3", "s4/i4"]),
    ]
    assert all(finding.is_fault for finding in found)


def test_a_row_whose_split_was_changed_to_another_word_is_compared_too() -> None:
    (found,) = leaks_of(row(1, "train", patient_id="p7", group="p7"), row(2, "trian", patient_id="p7", group="p7"))
    assert found.what == "patient p7 in train and no split (2 films)"


def test_equal_reports_are_listed_but_pass() -> None:
    normal = {"sentences": ["no acute process"]}
    (found,) = leaks_of(row(1, "train", **normal), row(2, "test", **normal), row(3, "test", **normal))
    assert (found.kind, found.ids, found.is_fault) == ("report in two splits", ["s1/i1", "s2/i2"], False)
    assert "acute" not in found.what


def made_facts(rows: int) -> pa.Table:
    """Rows whose patients, groups, pictures and reports often repeat."""
    random = np.random.default_rng(5)
    kinds = random.integers(0, 2**63, 40, np.uint64)
    flips = np.uint64(1) << random.integers(0, 64, (rows, 4)).astype(np.uint64)
    flipped = np.where(np.arange(4) < random.integers(0, 5, rows)[:, None], flips, np.uint64(0))
    picture = random.choice(kinds, rows) ^ np.bitwise_xor.reduce(flipped, axis=1)
    shades = [np.full(THUMBNAIL**2, 3 * shade, np.uint8).tobytes() for shade in random.integers(0, 5, rows)]
    patients = [f"p{number}" for number in random.integers(0, rows, rows)]
    groups = [f"g{number % 9}" if number % 11 == 0 else patient for number, patient in enumerate(patients)]
    return pa.table(
        {
            "study_id": [f"s{number}" for number in range(rows)], "image_id": [f"i{number}" for number in range(rows)],
            "patient_id": patients, "group": groups, "split": random.choice(["train", "valid", "test"], rows, p=[0.8, 0.1, 0.1]),
            "report_hash": random.integers(-300, 300, rows), "picture_hash": picture, "thumbnail": shades,
        },
        schema=FACT_SCHEMA,
    )  # fmt: skip


def test_parts_on_disk_find_what_comparing_every_row_with_every_other_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    table = made_facts(400)
    rows = table.to_pylist()
    order = ("train", "valid", "test")
    shown: dict[tuple[str, str], str] = {}
    levels = np.array([np.frombuffer(row["thumbnail"], np.uint8) for row in rows], float)
    for one, levels_one in zip(rows, levels, strict=True):
        apart = np.abs(levels_one - levels).mean(axis=1)
        for other, distance in zip(rows, apart, strict=True):
            if (
                order.index(one["split"]) < order.index(other["split"])
                and bin(one["picture_hash"] ^ other["picture_hash"]).count("1") <= MAX_BITS
                and distance <= MAX_LEVELS
            ):
                shown.setdefault((one["split"], other["image_id"]), one["image_id"])
    expected = {(f"s{one[1:]}/{one}", f"s{other[1:]}/{other}") for (_, other), one in shown.items()}
    assert len(expected) > 30
    shared = {
        (kind, value)
        for kind, column in (("patient", "patient_id"), ("group", "group"), ("report", "report_hash"))
        for value in {row[column] for row in rows if column != "group" or row["group"] != row["patient_id"]}
        if len({row["split"] for row in rows if row[column] == value}) > 1
    }
    for at_once in (10**9, 130):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", at_once)
        with facts_on_disk(len(table)) as facts:
            for start in range(0, len(table), 250):
                facts.add(table.slice(start, 250))
            found = leaks(facts)
            assert facts.distinct("study") == len(table)
        assert {tuple(each.ids) for each in found if each.kind.startswith("film")} == expected
        assert len([each for each in found if each.kind.startswith("film")]) == len(expected)
        others = [each for each in found if not each.kind.startswith("film")]
        assert len(others) == len(shared)
        assert {(each.kind.split()[0], each.what.split()[1]) for each in others if each.kind[0] != "r"} == {
            each for each in shared if each[0] != "report"
        }


def test_a_set_whose_facts_do_not_fit_on_the_disk_is_refused_before_it_is_read() -> None:
    with (
        pytest.raises(UserError, match=r"10,000,000,000,000 films needs 3725290\.3 GiB in .*set TMPDIR"),
        facts_on_disk(10**13),
    ):
        pass
