"""``covidx``: names with blanks, dots and parentheses; classes in any case; patients of the test set excluded from training."""

from pathlib import Path

import pytest

from cmcgns.data.labelled import open_set
from cmcgns.data.labelled.base import Folder
from cmcgns.data.labelled.classified import covidx_films
from tests.data.labelled.trees import rows, save, shots, splits, write

CLASSES = ("normal", "pneumonia", "COVID-19")
SPELT = ("Normal", "PNEUMONIA", "COVID-19", "normal", "Pneumonia", "covid-19")


def tree(folder: Path, spelt: tuple[str, ...], flat: bool = False) -> dict[str, str]:
    """24 films of 12 patients in train.txt, 4 of four in test.txt, one of them also in train.txt; returns their classes."""
    lines: dict[str, list[str]] = {"train": [], "test": []}
    truth = {}
    for i, shot in enumerate(shots()[:28]):
        part, patient = ("train", f"p{i // 2}") if i < 24 else ("test", f"p{i - 20}" if i == 24 else f"q{i}")
        name = (f"COVID-19({i}).png", f"a  b {i}.v1.png", f"{i}.png")[i % 3]
        word = spelt[i % len(spelt)]
        lines[part].append(f"{patient} {name} {word} rsna{' ' * (i % 2)}")
        save(shot.scan_HW, folder / ("" if flat else part) / name)
        truth[name] = word.lower()
    lines["train"].insert(3, "")
    for part, each in lines.items():
        write(folder / f"{part}.txt", each)
    return truth


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("spelt", "classes"), [(SPELT, CLASSES), (("negative", "Positive"), ("negative", "positive"))])
def test_every_film_has_the_class_its_line_says(
    tmp_path: Path, spelt: tuple[str, ...], classes: tuple[str, ...], flat: bool
) -> None:
    truth = tree(tmp_path, spelt, flat)
    images = open_set("covidx", str(tmp_path))
    assert images.classes == classes
    assert images.exclusive
    for name, row in rows(images).items():
        assert row["labels"] == [float(each.lower() == truth[name]) for each in classes]
        images.source.reader([]).read_image(row["path"])


def test_patients_of_the_test_set_are_excluded_from_training(tmp_path: Path) -> None:
    truth = tree(tmp_path, SPELT)
    images = open_set("covidx", str(tmp_path), seed=10)
    found = splits(images)
    assert found["test"] == set(list(truth)[24:])
    assert images.filtered == {"patient is in the test set": 2}
    assert len(images.table) == len(truth) - 2


def test_real_label_files_are_read(realdata: Path) -> None:
    folder = Folder("covidx", str(realdata / "labels"), frozenset())
    films = covidx_films(folder, "covidx5_train_excerpt.txt").set_index("image_id")
    assert set(films["class"]) == {"normal", "pneumonia", "covid-19"}
    assert films.loc["COVID-19(108).png"].to_dict() == {"group": "COVID-19(108)", "class": "covid-19"}
    assert films.loc["jkms-35-e79-g001-l-a.jpg", "group"] == "17"
