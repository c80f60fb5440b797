"""``chexpert``: labels by the published protocol, splits by patient."""

import logging
import shutil
from pathlib import Path

import pytest

from cmcgns.data.labelled import open_set
from cmcgns.data.labelled.base import first_by_hash
from tests.data.labelled.trees import rows, save, shots, splits, write

HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
    "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
COLUMN = {name: place for place, name in enumerate(HEADER.split(",")[5:])}
MEANING = {
    "Atelectasis": {"1.0": 1, "0.0": 0, "-1.0": 1, "": 0},
    "Cardiomegaly": {"1.0": 1, "0.0": 0, "-1.0": 0, "": 0},
    "Consolidation": {"1.0": 1, "0.0": 0, "-1.0": 0, "": 0},
    "Edema": {"1.0": 1, "0.0": 0, "-1.0": 1, "": 0},
    "Pleural Effusion": {"1.0": 1, "0.0": 0, "-1.0": 1, "": 0},
}
WORDS = ("1.0", "0.0", "-1.0", "")


def tree(folder: Path) -> dict[str, list[float]]:
    """CheXpert with 12 patients and 4 more in valid.csv; returns the labels of its frontal films."""
    tables: dict[str, list[str]] = {"train": [HEADER], "valid": [HEADER]}
    truth: dict[str, list[float]] = {}
    for i, shot in enumerate(shots()[:28]):
        part = "train" if i < 24 else "valid"
        frontal = i % 7 != 3
        words = [WORDS[(i + k * k) % 4] for k in range(14)]
        name = f"{part}/patient{i // 2:05d}/study{i % 2 + 1}/view1_{'frontal' if frontal else 'lateral'}.jpg"
        view = "Frontal,AP" if frontal else "Lateral,"
        tables[part].append(f"CheXpert-v1.0-small/{name},Female,{i},{view},{','.join(words)}")
        save(shot.scan_HW, folder / name)
        if frontal:
            truth[name] = [float(MEANING[label][words[COLUMN[label]]]) for label in MEANING]
    for part, lines in tables.items():
        write(folder / f"{part}.csv", lines)
    return truth


def test_labels_follow_the_published_protocol(tmp_path: Path) -> None:
    truth = tree(tmp_path)
    images = open_set("chexpert", str(tmp_path))
    assert images.classes == tuple(MEANING)
    assert {name: row["labels"] for name, row in rows(images).items()} == truth
    assert images.filtered == {"view LATERAL": 28 - len(truth)}
    assert "blank counts as 0" in images.rule
    assert images.source.reader([]).read_image(next(iter(truth))).grey_HW.size


def test_the_official_validation_set_is_test_and_patients_are_held_out(tmp_path: Path) -> None:
    tree(tmp_path)
    found = splits(images := open_set("chexpert", str(tmp_path), seed=3))
    assert found["test"] == {name for name in rows(images) if name.startswith("valid/")}
    assert len({row["group"] for row in rows(images).values() if row["split"] == "valid"}) == 1  # a tenth of 12


def test_another_patient_moves_no_other_into_validation() -> None:
    few = [f"patient{i:05d}" for i in range(300)]
    many = [f"patient{i:05d}" for i in range(900)]
    assert first_by_hash(many, 0, 30) & set(few) <= first_by_hash(few, 0, 30)
    assert first_by_hash(few, 0, 30) != first_by_hash(few, 1, 30)


def test_one_film_in_a_hundred_may_be_missing_and_is_counted(tmp_path: Path) -> None:
    tree(tmp_path)
    lines = (tmp_path / "train.csv").read_text().splitlines()
    row = lines[1].partition("/view1")[2]
    more = [f"CheXpert-v1.0-small/train/patient{i:05d}/study1/view1{row}" for i in range(100, 200)]
    write(tmp_path / "train.csv", [*lines, *more])
    for line in more[1:]:
        save(shots()[0].scan_HW, tmp_path / line.split(",")[0].removeprefix("CheXpert-v1.0-small/"))
    assert open_set("chexpert", str(tmp_path)).filtered["image missing"] == 1


BATCHES = ("CheXpert-v1.0 batch 2 (train 1)", "CheXpert-v1.0 batch 3 (train 2)", "CheXpert-v1.0 batch 4 (train 3)")
TABLES = "CheXpert-v1.0 batch 1 (validate & csv)"


def full_release(small: Path, full: Path, inside: str = "") -> None:
    """The films of the tree ``small`` in the batches of the full release."""
    for number, folder in enumerate(sorted((small / "train").iterdir())):
        target = full / BATCHES[number % 3] / inside / folder.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, target)
    for name in ("train.csv", "valid.csv"):
        text = (small / name).read_text().replace("CheXpert-v1.0-small/", "CheXpert-v1.0/")
        write(full / TABLES / name, text.splitlines())
    shutil.copytree(small / "valid", full / TABLES / "valid")


@pytest.mark.parametrize("given", ["", TABLES, BATCHES[0]], ids=["around", "tables", "a batch"])
@pytest.mark.parametrize("inside", ["", "train/"], ids=["as unpacked", "with their folder"])
def test_the_batches_of_the_full_release_are_the_same_set(tmp_path: Path, given: str, inside: str) -> None:
    small, full = tmp_path / "small", tmp_path / "full"
    tree(small)
    full_release(small, full, inside)
    one, other = open_set("chexpert", str(small)), open_set("chexpert", str(full / given))
    paths = other.table["path"].to_pylist()
    assert all(path.startswith("CheXpert-v1.0 batch ") for path in paths)
    assert other.table.drop_columns(["path"]) == one.table.drop_columns(["path"])
    for path, row in zip(paths, rows(one).values(), strict=True):
        assert (full / path).read_bytes() == (small / row["path"]).read_bytes()


def test_reading_prints_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(tmp_path)
    with caplog.at_level(logging.WARNING):
        open_set("chexpert", str(tmp_path))
    assert not caplog.records
