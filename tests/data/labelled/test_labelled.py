"""``labelled``: a user's own table with the findings of each film in one cell."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmcgns.data.labelled import ImageSet, OwnTable, open_set
from cmcgns.data.listed_findings import ListedFindings
from cmcgns.errors import UserError
from tests.data.labelled.trees import rows, save, shots, splits, write

PROBLEMS = ListedFindings(column="problems", separator=";", unknown=("No Indexing",))


def opened(folder: Path, findings: ListedFindings = PROBLEMS, **options: Any) -> ImageSet:
    return open_set("labelled", str(folder), own=OwnTable(findings=findings), **options)


def tree(folder: Path, lines: list[str], table: str = "pairs.csv") -> None:
    """A table with ``lines`` of which each names one film, a number."""
    header, *listed = lines
    write(folder / table, [header, *listed])
    for line in listed:
        save(shots()[0].grey_HW, folder / line.split(",")[0])


def of_problems(folder: Path) -> None:
    entries = ("Opacity;Edema", "normal", "Edema ; Opacity;Edema", "No Indexing", "", "Nodule", "NORMAL", "Edema")
    lines = [
        f"{i}.png,Clear {i},p{i // 2},{'train' if i < 32 else 'valid'},{entries[i % 8]}" for i in range(40)
    ]  # fmt: skip
    tree(folder, ["image,report,patient,split,problems", *lines])


def test_each_finding_of_a_cell_is_a_label(tmp_path: Path) -> None:
    of_problems(tmp_path)
    images = opened(tmp_path)
    assert images.classes == ("Edema", "Opacity", "Nodule")  # of most training films first
    found = [rows(images)[f"{i}.png"]["labels"] for i in range(8)]
    unknown, none = [np.nan] * 3, [0, 0, 0]
    np.testing.assert_array_equal(
        np.array(found, float), [[1, 1, 0], none, [1, 1, 0], unknown, none, [0, 0, 1], none, [1, 0, 0]]
    )


def test_without_test_films_the_given_valid_films_are_the_test(tmp_path: Path) -> None:
    of_problems(tmp_path)
    images = opened(tmp_path, seed=3)
    assert splits(images)["test"] == {f"{i}.png" for i in range(32, 40)}
    assert "without test films valid is test" in images.rule


def test_the_classes_are_the_commonest_or_those_that_are_named(tmp_path: Path) -> None:
    of_problems(tmp_path)
    most = opened(tmp_path, PROBLEMS.model_copy(update={"commonest": 2}))
    assert most.classes == ("Edema", "Opacity")
    named = opened(tmp_path, PROBLEMS.model_copy(update={"classes": ("Nodule",)}))
    assert named.classes == ("Nodule",)
    with pytest.raises(UserError, match="no training film has Mass in column problems, split at ';'; the commonest"):
        opened(tmp_path, PROBLEMS.model_copy(update={"classes": ("Nodule", "Mass")}))
    with pytest.raises(ValueError, match="give either classes or commonest 3, not both"):
        ListedFindings(classes=("Nodule",), commonest=3)


def test_columns_may_have_names_of_their_own_and_films_a_folder(tmp_path: Path) -> None:
    part = lambda i: ("train", "val", "test")[i % 10 % 3]
    lines = [f"{i}.png;x;p{i % 10};{part(i)};{'A|B' if i % 2 else 'No Finding'};{i}.png" for i in range(30)]
    write(tmp_path / "export.csv", ["File;patient;PatientID;Part;labels;lung_mask", *lines])
    for i in range(30):
        save(shots()[0].grey_HW, tmp_path / "films" / f"{i}.png")
        save(np.where(shots()[0].mask("heart"), np.uint8(255), np.uint8(0)), tmp_path / f"{i}.png")
    columns = {"image": "file", "patient": "PatientID", "split": "Part"}
    for films in ("films", str(tmp_path / "films")):
        images = open_set("labelled", str(tmp_path / "export.csv"), own=OwnTable(columns=columns, films=films))
        assert {row["image_id"]: (row["group"], row["split"]) for row in images.table.to_pylist()} == {
            f"{i}.png": (f"p{i % 10}", part(i).replace("val", "valid")) for i in range(30)
        }
        row = rows(images)["7.png"]
        assert row["labels"] == [1, 1]
        film = images.source.reader([]).read_image(row["path"])
        assert (film.grey_HW == shots()[0].grey_HW).all()  # not the mask of the same name
        assert (images.annotations(row, film).mask_KHW[0] == shots()[0].mask("heart")).all()


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (
            OwnTable(columns={"patient": "who"}),
            r"labels\.csv has no column who \(for patient\), which evaluate\.columns names",
        ),
        (OwnTable(), r"--evaluate\.columns='\{labelled: \{image: NAME\}\}'"),
        (
            OwnTable(columns={"image": "film"}),
            r"such as 1\.png; copy them there, give their folder in evaluate\.films, or",
        ),
    ],
)
def test_a_wrong_column_or_folder_names_the_setting(tmp_path: Path, own: OwnTable, says: str) -> None:
    write(tmp_path / "labels.csv", ["film,labels", "1.png,A"])
    with pytest.raises(UserError, match=says):
        open_set("labelled", str(tmp_path / "labels.csv"), own=own)


def test_a_table_with_masks_and_findings_is_one_set(tmp_path: Path) -> None:
    tree(tmp_path, ["image,labels,lung_mask", *(f"{i}.png,{'A' if i % 2 else ''},{i}.png" for i in range(20))])
    images = open_set("labelled", str(tmp_path))
    assert (images.classes, images.mask_classes) == (("A",), ("lung",))
    assert images.annotated(images.table, "masks").num_rows == 20
    assert open_set("masked", str(tmp_path)).classes == ()


@pytest.mark.parametrize("own", [{"findings": PROBLEMS}, {"columns": {"image": "File"}}, {"films": "films"}])
def test_a_published_set_is_read_as_it_is(tmp_path: Path, own: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=rf"nih is read as it is published; evaluate\.{next(iter(own))} is for masked and labelled"
    ):
        open_set("nih", str(tmp_path), own=OwnTable(**own))
