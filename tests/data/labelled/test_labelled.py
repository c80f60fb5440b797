"""``labelled``: a user's own table with the findings of each film in one cell."""

from pathlib import Path

import numpy as np
import pytest

from cmcgns.data.labelled import open_set
from cmcgns.data.listed_findings import ListedFindings
from cmcgns.errors import UserError
from tests.data.labelled.trees import rows, save, shots, splits, write

PROBLEMS = ListedFindings(column="problems", separator=";", unknown=("No Indexing",))


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
    images = open_set("labelled", str(tmp_path), findings=PROBLEMS)
    assert images.classes == ("Edema", "Opacity", "Nodule")  # of most training films first
    found = [rows(images)[f"{i}.png"]["labels"] for i in range(8)]
    unknown, none = [np.nan] * 3, [0, 0, 0]
    np.testing.assert_array_equal(
        np.array(found, float), [[1, 1, 0], none, [1, 1, 0], unknown, none, [0, 0, 1], none, [1, 0, 0]]
    )


def test_without_test_films_the_given_valid_films_are_the_test(tmp_path: Path) -> None:
    of_problems(tmp_path)
    images = open_set("labelled", str(tmp_path), findings=PROBLEMS, seed=3)
    assert splits(images)["test"] == {f"{i}.png" for i in range(32, 40)}
    assert "without test films valid is test" in images.rule


def test_the_classes_are_the_commonest_or_those_that_are_named(tmp_path: Path) -> None:
    of_problems(tmp_path)
    most = open_set("labelled", str(tmp_path), findings=PROBLEMS.model_copy(update={"commonest": 2}))
    assert most.classes == ("Edema", "Opacity")
    named = open_set("labelled", str(tmp_path), findings=PROBLEMS.model_copy(update={"classes": ("Nodule",)}))
    assert named.classes == ("Nodule",)
    with pytest.raises(UserError, match="no training film has Mass in column problems, split at ';'; the commonest"):
        open_set("labelled", str(tmp_path), findings=PROBLEMS.model_copy(update={"classes": ("Nodule", "Mass")}))
    with pytest.raises(ValueError, match="give either classes or commonest 3, not both"):
        ListedFindings(classes=("Nodule",), commonest=3)


def test_columns_may_have_names_of_their_own(tmp_path: Path) -> None:
    lines = [
        f"{i}.png,{i},p{i % 10},{('train', 'val', 'test')[i % 10 % 3]},{'A|B' if i % 2 else 'No Finding'}"
        for i in range(30)
    ]
    tree(tmp_path, ["image,patient,person,part,labels", *lines], "labels.csv")
    own = ListedFindings(patient="person", split="part")
    images = open_set("labelled", str(tmp_path / "labels.csv"), findings=own)
    assert {row["group"] for row in rows(images).values()} == {f"p{i}" for i in range(10)}
    assert len(splits(images)["test"]) == 9
    assert images.rule == "by the column split, otherwise 60/20/20 by group, drawn with seed 0"
    with pytest.raises(UserError, match=r"labels\.csv has no column who, which is to name the patient"):
        open_set("labelled", str(tmp_path / "labels.csv"), findings=ListedFindings(patient="who"))


def test_a_table_with_masks_and_findings_is_one_set(tmp_path: Path) -> None:
    tree(tmp_path, ["image,labels,lung_mask", *(f"{i}.png,{'A' if i % 2 else ''},{i}.png" for i in range(20))])
    images = open_set("labelled", str(tmp_path))
    assert (images.classes, images.mask_classes) == (("A",), ("lung",))
    assert images.annotated(images.table, "masks").num_rows == 20
    assert open_set("masked", str(tmp_path)).classes == ()


def test_a_published_set_keeps_its_own_labels(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="nih has its published labels; how a table lists findings is for masked and labelled"
    ):
        open_set("nih", str(tmp_path), findings=PROBLEMS)
