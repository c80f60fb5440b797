"""Numbers with decimal commas, as Excel writes them in German or Spanish: read as with points, or refused with the cell."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmcgns.data.labelled import open_set
from cmcgns.data.readers import open_source
from cmcgns.data.repairs import noted
from cmcgns.errors import UserError
from tests.data.labelled import test_chexpert, test_nih, test_rsna
from tests.data.published_trees import write_brax, write_vinbigdata, write_vindr
from tests.data.trees import csv_file, index_of, rows

HEAD = ("image", "report", "Edema", "Nodule", "age")


def saved_by_excel(path: Path, sign: str = ";") -> None:
    """Write the table again as Excel does where the comma is decimal."""
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    with path.open("w", newline="") as file:
        cells = ([re.sub(r"^(-?\d+)\.(\d+)$", r"\1,\2", cell) for cell in line] for line in lines)
        csv.writer(file, delimiter=sign).writerows(cells)


SETS: dict[str, Callable[[Path], Any]] = {
    "chexpert": test_chexpert.tree,
    "nih": test_nih.tree,
    "rsna": test_rsna.tree,
    "vindr-cxr": write_vindr,
    "vinbigdata": write_vinbigdata,
}


@pytest.mark.parametrize("sign", [";", "\t"], ids=["semicolons", "tabs"])
@pytest.mark.parametrize("name", SETS)
def test_labels_and_boxes_of_a_set_are_those_with_points(tmp_path: Path, name: str, sign: str) -> None:
    SETS[name](tmp_path)
    name = name.replace("vinbigdata", "vindr-cxr")
    with_points = open_set(name, str(tmp_path)).table
    tables = list(tmp_path.rglob("*.csv"))
    for path in tables:
        saved_by_excel(path, sign)
    assert any(re.search(rf"{sign}-?\d+,\d+", path.read_text()) for path in tables)
    assert open_set(name, str(tmp_path)).table == with_points


def test_labels_of_a_corpus_are_those_with_points(tmp_path: Path) -> None:
    write_brax(tmp_path)
    source = open_source(str(tmp_path), reports=False)
    with_points = rows(source.index())
    assert any(row["labels"] for row in with_points)
    saved_by_excel(tmp_path / "master_spreadsheet_update.csv")
    assert rows(source.index()) == with_points


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_label_probabilities_of_a_pairs_table(tmp_path: Path, sign: str) -> None:
    cells = [("a.png", "Clear lungs.", "0,25", "1", "61,5"), ("b.png", "Some edema.", "-1,0", "", "7,25")]
    with noted() as notes:
        index = index_of(tmp_path, *map(sign.join, (HEAD, *cells)))
    assert [row["labels"] for row in rows(index)] == [[("Edema", 0.25), ("Nodule", 1.0)], [("Edema", -1.0)]]
    assert notes["decimal commas"] == 2


def test_each_column_of_a_pairs_table_is_read_by_its_own_commas(tmp_path: Path) -> None:
    cells = ["a.png;Clear lungs.;0,5;0.25;61", "b.png;Clear lungs.;;1;61"]
    index = index_of(tmp_path, ";".join(HEAD), *cells)
    assert [row["labels"] for row in rows(index)] == [[("Edema", 0.5), ("Nodule", 0.25)], [("Nodule", 1.0)]]


def test_words_and_lists_with_commas_are_no_labels(tmp_path: Path) -> None:
    lines = ["a.png;Clear lungs.;0,5,1;1,5", "b.png;Clear lungs.;0,1;2"]
    index = index_of(tmp_path, "image;report;codes;grade", *lines)
    assert [row["labels"] for row in rows(index)] == [[], []]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            ['a.png,Clear lungs.,1,"0,5",61', 'b.png,Clear lungs.,"0,25",1,61'],
            "Nodule 0,5 in row 1 under the header can be read in two ways: its comma may be decimal, or stand before "
            "thousands, as the cells are separated by commas; write numbers with a point and no other sign",
        ),
        (["a.png;Clear lungs.;0.5;1;61", "b.png;Clear lungs.;0,5;1;61"], "Edema 0,5 in row 2 .* as other numbers have points"),
    ],
    ids=["commas between cells", "both in a column"],
)  # fmt: skip
def test_a_column_that_can_be_read_in_two_ways_is_no_label_and_is_named(
    tmp_path: Path, lines: list[str], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be anything, such as a pixel spacing, and a user could not leave it out."""
    sign = ";" if ";" in lines[0] else ","
    index = index_of(tmp_path, sign.join(HEAD), *lines)
    assert not {"Nodule", "Edema"} <= {name for row in rows(index) for name, _ in row["labels"]}
    assert re.search(rf"pairs\.csv: {says}.* The column is not taken as a label", caplog.text)


def boxes_of_rsna(folder: Path, sign: str, *lines: tuple[str, ...]) -> list[Any]:
    """The boxes of one film whose table has ``lines``."""
    test_rsna.tree(folder)
    head = test_rsna.HEADER.split(",")
    film = next((folder / "stage_2_train_images").iterdir()).stem
    csv_file(
        folder / "stage_2_train_labels.csv", *(sign.join(line) for line in (head, *((film, *each) for each in lines)))
    )
    boxes: list[Any] = open_set("rsna", str(folder)).table["boxes"][0].as_py()
    return boxes


def test_three_digits_after_a_comma_between_tabs_may_be_thousands(tmp_path: Path) -> None:
    box = ("1,024", "512,125", "3,5", "4", "1")
    expected = [{"kind": 0, "x0": 1.024, "y0": 512.125, "x1": 4.524, "y1": 516.125}]
    assert boxes_of_rsna(tmp_path, "\t", box) == expected  # 3,5 shows what a comma is
    assert boxes_of_rsna(tmp_path, ";", box) == expected
    assert (
        boxes_of_rsna(tmp_path, ";", ("1,024", "5", "3", "4", "1"))[0]["x0"] == 1.024
    )  # as where the comma is decimal
    with pytest.raises(UserError, match=r"labels\.csv: y 1,024 in row 2 .* as the cells are separated by tabs"):
        boxes_of_rsna(tmp_path, "\t", ("7", "8", "3", "4", "1"), ("5", "1,024", "3", "4", "1"))


def test_a_number_with_two_signs_is_refused_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels\.csv: x 1\.024,5 in row 1 under the header is not a number"):
        boxes_of_rsna(tmp_path, ";", ("1.024,5", "2", "3", "4", "1"))


def test_the_row_of_a_bad_box_counts_the_rows_without_boxes(tmp_path: Path) -> None:
    write_vinbigdata(tmp_path)
    path = tmp_path / "train.csv"
    path.write_text(path.read_text().replace("\r\n", "\n") + "x,Cardiomegaly,0,R8,1,2,3,four\n")
    count = len(path.read_text().splitlines()) - 1
    assert "No finding" in path.read_text()
    with pytest.raises(UserError, match=rf"train\.csv: y_max four in row {count} under the header is not a number"):
        open_set("vindr-cxr", str(tmp_path))
