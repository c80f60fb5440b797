"""Wrong names and wrong files: one clear message each, with the file and the fix."""

import re
from pathlib import Path

import pytest

from cmcgns.data.labelled import SETS, open_set
from cmcgns.data.labelled.base import split_by_hash
from cmcgns.errors import UserError
from tests.data.labelled.test_chexpert import HEADER as CHEXPERT
from tests.data.labelled.test_nih import HEADER as NIH
from tests.data.labelled.test_rsna import HEADER as RSNA
from tests.data.labelled.trees import save, shots, write

FIRST_FILE = {
    "chexpert": "train.csv",
    "nih": "Data_Entry_2017*.csv",
    "rsna": "stage_2_train_labels.csv",
    "siim": "train-rle.csv or stage_2_train.csv",
    "covidx": "train.txt",
    "object-cxr": "train.csv",
    "vindr-cxr": "annotations/image_labels_train.csv",
    "masked": "pairs.csv",
    "labelled": "pairs.csv",
}
BLANK = "," * 13
NIH_ROW = "a.png,Mass,0,1,57,M,PA,1,1,1,1"
COCO = '{"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "x"}], "annotations": [%s]}'

WRONG = [
    ("chexpert", {"train.csv": [CHEXPERT]}, "has no valid.csv, which chexpert needs"),
    ("chexpert", {"train.csv": ["Path,Sex"]}, "train.csv has no column Frontal/Lateral"),
    ("chexpert", {"train.csv": [CHEXPERT, f"t/x/1.jpg,M,1,Frontal,AP,{BLANK}"]}, "Path t/x/1.jpg names no patient"),
    ("chexpert", {"train.csv": [CHEXPERT, f"t/patient1/1.jpg,M,1,Frontal,AP,,,high{BLANK[2:]}"]},
     "train.csv: Cardiomegaly high in row 1 under the header is not a number"),
    ("chexpert", {"train.csv": [CHEXPERT, f"train/patient1/1.jpg,M,1,Frontal,AP,{BLANK}"], "valid.csv": [CHEXPERT]},
     "1 of the 1 images of train.csv are missing, such as train/patient1/1.jpg"),
    ("nih", {"Data_Entry_2017.csv": [NIH, NIH_ROW.replace("Mass", "Mess")]}, "finding 'Mess' in row 1"),
    ("nih", {"Data_Entry_2017.csv": [NIH, NIH_ROW]}, "images of Data_Entry_2017.csv are missing"),
    ("nih", {"Data_Entry_2017.csv": [NIH, NIH_ROW], "train_val_list.txt": ["b.png"], "test_list.txt": ["c.png"]},
     "1 images are in neither train_val_list.txt nor test_list.txt, such as a.png"),
    ("nih", {"Data_Entry_2017.csv": [NIH, NIH_ROW], "BBox_List_2017.csv": ["Image Index,Finding Label,Bbox [x,y,w,h],,,",
     "b.png,Mass,1,2,3,4"]}, "BBox_List_2017.csv: 1 of its images are not in Data_Entry_2017.csv, such as b.png"),
    ("nih", {"Data_Entry_2017.csv": [NIH, NIH_ROW], "BBox_List_2017.csv": ["Image Index,Finding Label,Bbox [x,y,w,h],,,",
     "a.png,Mass,1,2,3"]}, "not every row has x, y, w and h"),
    ("nih", {"Data_Entry_2017.csv": [NIH, NIH_ROW], "x/a.png": [], "y/a.png": []}, "image a.png exists twice, as x/a.png and"),
    ("rsna", {"stage_2_train_labels.csv": [RSNA, "p,1,2,3,,1"]}, "row 1 under the header, patientId p, is neither Target 1"),
    ("rsna", {"stage_2_train_labels.csv": [RSNA, "p,1,2,3,4,0"]}, "row 1 under the header"),
    ("rsna", {"stage_2_train_labels.csv": [RSNA, "p,1,2,3,4,1", "q,,,,,0", "p,,,,,0"]}, "row 1 under the header"),
    ("rsna", {"stage_2_train_labels.csv": [RSNA, "p,,,,,0"], "stage_2_test_images/p.png": []}, "are missing, such as p"),
    ("siim", {"train-rle.csv": ["ImageId,Pixels", "a,-1"]}, "train-rle.csv has no column EncodedPixels"),
    ("siim", {"train-rle.csv": ["ImageId, EncodedPixels", "a, -1", "a, 1 2"]}, "image a: its encoding"),
    ("covidx", {"train.txt": ["1 a.png normal rsna"]}, "has no test.txt"),
    ("covidx", {"train.txt": ["1 a.png normal"], "test.txt": []}, "train.txt: line 1 is not `patient file class source`"),
    ("covidx", {"train.txt": ["1 a.png normal x"], "test.txt": ["2 b.png positive x"]}, "have the classes normal, positive"),
    ("covidx", {"train.txt": ["1 a.png normal x"], "test.txt": ["2 b.png normal x"]}, "images of train.txt are missing"),
    ("object-cxr", {"train.csv": ["file,annotation"], "dev.csv": ["image_name,annotation"]}, "column image_name or image_path"),
    ("object-cxr", {"train.csv": ["image_name,annotation", "a.jpg,0 1 2 3"]}, "train.csv: image a.jpg: '0 1 2 3' is not a shape"),
    ("object-cxr", {"train.csv": ["image_name,annotation", "a.jpg,3 1 2 3 4"]}, "image a.jpg: '3 1 2 3 4' is not a rectangle"),
    ("object-cxr", {"train.csv": ["image_name,annotation", "a.jpg,2 1 2 3 4"]}, "image a.jpg: '2 1 2 3 4' is not a rectangle"),
    ("masked", {"pairs.csv": ["image,lungs", "a.png,"]}, "has no column whose name ends in _mask or _boxes"),
    ("masked", {"pairs.csv": ["image,x_mask", "a.png,m.png"]}, "1 files of column x_mask of pairs.csv are missing"),
    ("masked", {"pairs.csv": ["image,x_mask", "a.png,m.png"], "m.png": []}, "are missing, such as a.png"),
    ("masked", {"pairs.csv": ["image,x_mask,split", "a.png,m.png,later"], "m.png": []}, "unknown split later in 1 rows"),
    ("masked", {"pairs.csv": ["image,x_boxes", "a.png,b.json"]}, "b.json"),
    ("masked", {"pairs.csv": ["image,x_boxes", "a.png,b.json"], "b.json": ["{"]}, "b.json is not valid JSON"),
    ("masked", {"pairs.csv": ["image,x_boxes", "a.png,b.json"], "b.json": ["[]"]}, "b.json is not a COCO file with boxes"),
    ("masked", {"pairs.csv": ["image,x_boxes", "a.png,b.json"],
     "b.json": [COCO % '{"image_id": 2, "category_id": 1, "bbox": [1, 2, 3, 4]}']}, "b.json is not a COCO file with boxes"),
    ("masked", {"pairs.csv": ["image,x_boxes", "c.png,b.json"], "b.json": [COCO % ""]}, "its tables have no rows"),
    ("labelled", {"pairs.csv": ["image,problems", "a.png,Edema"]},
     "no column labels among its 2 columns, separated by commas: image, problems; name"),
    ("labelled", {"pairs.csv": ["image,labels,split", "a.png,normal,train"]},
     "no training film has any finding in column labels, split at '|'; the commonest entries are blank"),
    ("labelled", {"pairs.csv": ["image,labels,split", "a.png,Edema,train"]}, "are missing, such as a.png"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "files", "says"), WRONG, ids=[f"{name}: {says}" for name, _, says in WRONG])
def test_wrong_files_are_named(tmp_path: Path, name: str, files: dict[str, list[str]], says: str) -> None:
    for path, lines in files.items():
        if path.endswith(".png"):
            save(shots()[0].grey_HW, tmp_path / path)
        else:
            write(tmp_path / path, lines)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        open_set(name, str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SETS)
def test_a_missing_label_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} has no {FIRST_FILE[name]}, which {name} needs")):
        open_set(name, str(tmp_path))
    with pytest.raises(UserError, match="nowhere"):
        open_set(name, str(tmp_path / "nowhere"))


def test_an_unknown_set_suggests_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"unknown downstream set 'chexper'; did you mean chexpert\? give one of chexpert, nih"
    ):
        open_set("chexper", "anywhere")
    with pytest.raises(UserError, match="unknown downstream set 'zzz'; give one of"):
        open_set("zzz", "anywhere")


def test_drawn_splits_have_their_shares_and_depend_on_the_group_alone() -> None:
    import pandas as pd

    shares = {"train": 70, "valid": 10, "test": 20}
    groups = pd.Series([f"g{i}" for i in range(4000)])
    drawn = split_by_hash(groups, 0, shares)
    for name, share in shares.items():
        assert (drawn == name).mean() * 100 == pytest.approx(share, abs=2.5)
    assert (split_by_hash(groups[::-1][:100], 0, shares).sort_index() == drawn[-100:]).all()
    assert (split_by_hash(groups, 1, shares) != drawn).any()
