"""``nih``: the broken header, the official lists or none, and boxes of some images."""

from pathlib import Path

import pytest

from cmcgns.data.labelled import open_set
from cmcgns.data.labelled.base import Folder
from cmcgns.data.labelled.classified import nih_boxes, nih_entries
from tests.data.labelled.trees import rows, save, seen, shots, splits, write

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
NAMES = {"atelectasis": "Atelectasis", "consolidation": "Infiltration", "effusion": "Effusion", "nodule": "Nodule"}
BOX_NAMES = {**NAMES, "consolidation": "Infiltrate"}
PLACES = ("", "images/", "images_001/images/", "images_012/images/")


def tree(folder: Path, table: str = "Data_Entry_2017_v2020.csv", comma: str = "") -> dict[str, set[str]]:
    """NIH with 30 films in ``table``; returns the findings of each image."""
    entries, boxes, truth = [HEADER + comma], ["Image Index,Finding Label,Bbox [x,y,w,h],,,"], {}
    for i, shot in enumerate(shots()):
        image = f"{i // 2:08d}_{i % 2:03d}.png"
        truth[image] = {NAMES[name] for name in NAMES if shot.truth.labels[name]}
        labels = "|".join(sorted(truth[image])) or "No Finding"
        entries.append(f"{image},{labels},{i % 2},{i // 2},57,M,PA,2682,2749,0.143,0.143{comma}")
        save(shot.scan_HW, folder / f"{PLACES[i % 4]}{image}")
        for name in NAMES if i % 3 else ():
            boxes += [f"{image},{BOX_NAMES[name]},{','.join(map(str, each))}" for each in shot.scan_xywh(name)]
    write(folder / table, entries)
    write(folder / "BBox_List_2017.csv", boxes)
    return truth


@pytest.mark.parametrize(("table", "comma"), [("Data_Entry_2017.csv", ","), ("Data_Entry_2017_v2020.csv", "")])
def test_findings_are_read_under_the_broken_header(tmp_path: Path, table: str, comma: str) -> None:
    truth = tree(tmp_path, table, comma)
    images = open_set("nih", str(tmp_path))
    assert len(images.classes) == 14
    for image, row in rows(images).items():
        assert {name for name, value in zip(images.classes, row["labels"], strict=True) if value} == truth[image]
    assert list(rows(images)) == list(truth)


def test_boxes_are_read_for_annotated_images(tmp_path: Path) -> None:
    tree(tmp_path)
    images = open_set("nih", str(tmp_path))
    assert images.box_classes == ("Atelectasis", "Effusion", "Infiltration", "Nodule")
    for i, (row, shot) in enumerate(zip(rows(images).values(), shots(), strict=True)):
        truth = [(NAMES[name], each) for name in NAMES for each in shot.boxes(name)]
        found, _ = seen(images, row)
        if i % 3 and truth:
            assert found == truth
        else:
            assert row["boxes"] is None
            assert not found


def test_without_the_lists_splits_are_drawn_by_patient(tmp_path: Path) -> None:
    tree(tmp_path)
    images = open_set("nih", str(tmp_path), seed=1)
    splits(images)
    assert "70/10/20" in images.rule
    (tmp_path / "BBox_List_2017.csv").unlink()
    assert open_set("nih", str(tmp_path)).box_classes == ()


def test_official_lists_are_kept_and_some_patients_held_out(tmp_path: Path) -> None:
    names = list(tree(tmp_path))
    write(tmp_path / "train_val_list.txt", names[:24])
    write(tmp_path / "test_list.txt", names[24:])
    found = splits(images := open_set("nih", str(tmp_path), seed=3))
    assert found["test"] == set(names[24:])
    assert "test_list.txt is test" in images.rule


def test_real_label_files_are_read(realdata: Path) -> None:
    folder = Folder("nih", str(realdata / "labels"), frozenset())
    entries = nih_entries(folder, "nih_Data_Entry_2017_v2020_sample.csv")
    assert len(entries) > 100
    assert entries["group"].nunique() < len(entries)
    assert 0 < sum(not any(labels) for labels in entries["labels"]) < len(entries)
    boxes, classes = nih_boxes(folder, "nih_BBox_List_2017_sample.csv")
    assert classes == ("Atelectasis",)  # of the sample
    first = boxes["00013118_008.png"][0]
    assert (first["x0"], first["y0"]) == pytest.approx((225.0847, 547.0192), abs=1e-3)
    assert (first["x1"] - first["x0"], first["y1"] - first["y0"]) == pytest.approx((86.7797, 79.1864), abs=1e-3)
    assert all(0 <= each["x0"] < each["x1"] <= 1024 for found in boxes.values() for each in found)
