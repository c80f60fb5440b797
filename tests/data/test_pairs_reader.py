"""A user's pairs as CSV: what is read, what is rejected, and why."""

import pickle
from pathlib import Path

import pandas as pd
import pytest

from cmcgns.bad_rows import too_many_bad
from cmcgns.data.readers import PairsSource, open_source
from cmcgns.data.readers.base import canonical_view, draw_split, draw_splits, escapes
from cmcgns.errors import BadRow, UserError
from tests.data.trees import csv_file, index_of, picture, rows


def test_pairs_use_every_known_column(tmp_path: Path) -> None:
    picture(tmp_path / "films/a b.png", 50)
    index = index_of(
        tmp_path,
        "image,report,patient,group,split,view,Edema,Nodule,age,note",
        'films/a b.png,"Clear lungs, no effusion.\nSecond line.",p1,g1,valid,AP Supine,1,,61,left',
        "films/c.png,Effusion on the left.,p2,,train,PA,0,-1,0,1 of 2",
    )
    first, second = rows(index)
    assert first == {
        "study_id": "films/a b.png",
        "patient_id": "p1",
        "group": "g1",
        "split": "valid",
        "films": [{"image_id": "films/a b.png", "path": "films/a b.png", "view": "AP"}],
        "report": "Clear lungs, no effusion.\nSecond line.",
        "report_path": None,
        "labels": [("Edema", 1.0)],
    }
    assert second["group"] == "p2"
    assert second["labels"] == [("Edema", 0.0), ("Nodule", -1.0)]
    source = open_source(str(tmp_path))
    assert (source.read_image("films/a b.png").grey_HW == 50).all()
    assert source.read_report(first) == first["report"]
    assert index.split("valid").num_rows == 1


def test_the_folder_and_its_csv_are_the_same_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv_file(tmp_path / "pairs.csv", "image,report", "a.png,Clear lungs.")
    csv_file(tmp_path / "others.csv", "image,report", "b.png,Clear lungs.")
    assert open_source(str(tmp_path / "pairs.csv")).index() == open_source(str(tmp_path)).index()
    assert rows(open_source(str(tmp_path / "others.csv")).index())[0]["study_id"] == "b.png"
    monkeypatch.chdir(tmp_path)
    assert open_source("pairs.csv").index() == open_source(str(tmp_path)).index()
    assert PairsSource.at("s3://bucket/pairs.csv", ("PA",), 0).uri == "s3://bucket"


def test_sources_can_be_pickled(tmp_path: Path) -> None:
    csv_file(tmp_path / "pairs.csv", "image,report", "a.png,Clear lungs.")
    picture(tmp_path / "a.png")
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path))))
    assert source == open_source(str(tmp_path))
    assert source.read_image("a.png").grey_HW.shape == (20, 30)


def test_views_are_filtered_and_counted_separately(tmp_path: Path) -> None:
    views = ["PA", "AP", "AP Supine", "ap erect", "AP AXIAL", "", "?", "unknown", "LATERAL", "L", "lateral", "LL"]
    lines = [f"{number}.png,Clear lungs.,{view}" for number, view in enumerate(views)]
    index = index_of(tmp_path, "image,report,view", *lines)
    assert [row["films"][0]["view"] for row in rows(index)] == ["PA", "AP", "AP", "AP", "AP", "", "", ""]
    assert index.filtered == {"view L": 1, "view LATERAL": 2, "view LL": 1}
    assert index.bad_rows == []
    lateral = open_source(str(tmp_path), views=("LATERAL",)).index()
    assert lateral.table.num_rows == 5
    assert canonical_view("Antero-Posterior") == "AP"


def test_rows_of_one_study_are_its_films(tmp_path: Path) -> None:
    index = index_of(
        tmp_path,
        "image,report,study,patient,view",
        "a.png,Clear lungs.,s1,p1,PA",
        "b.png,Effusion seen.,s2,p1,PA",
        "c.png,Clear lungs.,s1,p1,AP",
        "d.png,Clear lungs.,,p2,PA",
        "e.png,One text.,s3,p3,PA",
        "f.png,Another text.,s3,p3,PA",
    )
    assert [(row["study_id"], len(row["films"])) for row in rows(index)] == [("s1", 2), ("s2", 1), ("d.png", 1)]
    assert [row["source"] for row in index.bad_rows] == ["pairs.csv row 5", "pairs.csv row 6"]
    assert "different reports" in index.bad_rows[0]["reason"]


def test_the_same_film_twice_is_two_studies(tmp_path: Path) -> None:
    index = index_of(tmp_path, "image,report", "a.png,Clear lungs.", "a.png,Same again.")
    assert [row["study_id"] for row in rows(index)] == ["a.png", "a.png#2"]
    assert [row["films"][0]["path"] for row in rows(index)] == ["a.png", "a.png"]


def test_bad_rows_have_a_source_and_a_reason(tmp_path: Path) -> None:
    lines = [
        "../../etc/passwd,Clear lungs.",
        "/etc/passwd,Clear lungs.",
        ",Clear lungs.",
        "a.png,  ",
        "b.png,Fine lungs.",
    ]
    index = index_of(tmp_path, "image,report", *lines)
    assert [(row["source"], row["reason"]) for row in index.bad_rows] == [
        ("pairs.csv row 1", "film path is outside the corpus folder"),
        ("pairs.csv row 2", "film path is outside the corpus folder"),
        ("pairs.csv row 3", "row names no image"),
        ("pairs.csv row 4", "row has no report"),
    ]
    assert index.table.num_rows == 1
    source = open_source(str(tmp_path))
    for path, reason in (("b.png", "missing"), ("../pairs.csv", "outside"), ("pairs.csv", "neither")):
        with pytest.raises(BadRow, match=reason):
            source.read_image(path)


def test_shifted_columns_print_no_word_of_a_report(tmp_path: Path) -> None:
    report = "The heart of John Doe is enlarged. " * 40
    index = index_of(tmp_path, "image,report,view", f"{report},Clear lungs.,PA", "a.png,Clear lungs,JOHN DOE IS WELL")
    assert index.filtered == {"other view": 1}
    for name in (report, report[:300], "x\0y.png"):
        with pytest.raises(BadRow) as caught:
            open_source(str(tmp_path)).read_image(name)
        assert len(str(caught.value)) < 60
        assert "John" not in str(caught.value)
    reasons = {f"{name}.png": "film file is missing" for name in "JKL"} | {"M.png": "row has no report"}
    complaint = too_many_bad(4, 10, 0.1, reasons.values())
    assert complaint is not None
    assert complaint.endswith("Most common reasons: 3 x film file is missing; 1 x row has no report")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/x", "~/x", "C:\\x", "\\\\host\\x", "s3://b/x", "file:///x"])
def test_paths_that_escape(path: str) -> None:
    assert escapes(path)


@pytest.mark.parametrize("path", ["x.png", "a/b c/x.png", "a..b/x.png", "..a/x.png", "a/é.png", "~t.png"])
def test_paths_that_stay(path: str) -> None:
    assert not escapes(path)


@pytest.mark.parametrize("groups", [3, 5, 20, 50])
def test_a_small_corpus_has_every_split_whatever_the_seed(groups: int, tmp_path: Path) -> None:
    written = [f"{number}.png,Text of it.,g{number}" for number in range(groups)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,report,patient", *written]))
    empty = 0
    for seed in range(60):
        found = {row["group"]: row["split"] for row in rows(open_source(str(tmp_path), seed=seed).index())}
        assert set(found.values()) == {"train", "valid", "test"}
        drawn = {group: draw_split(seed, group) for group in found}
        missing = {"train", "valid", "test"} - set(drawn.values())
        assert sum(found[group] != drawn[group] for group in found) == len(missing)  # no other group moves
        empty += bool(missing)
    assert empty > 0 or groups == 50


def test_only_what_is_drawn_moves_into_a_split_that_is_empty() -> None:
    groups = pd.Series([f"g{number}" for number in range(12)])
    given = pd.Series(["test", "train", "train", "train", *[None] * 8], dtype=object)
    for seed in range(200):
        found = draw_splits(seed, groups, given)
        assert set(found) == {"train", "valid", "test"}
        assert found[:4].tolist() == given[:4].tolist()
        drawn = [draw_split(seed, group) for group in groups[4:]]
        moved = sum(ours != own for ours, own in zip(found[4:], drawn, strict=True))
        assert moved == ("valid" not in drawn)  # the given ones fill the others


def test_given_splits_are_kept_and_others_drawn_by_group(tmp_path: Path) -> None:
    written = [f"{number}.png,Text of it.,g{number % 3},{name}" for number, name in enumerate(["val", "TRAIN", "test"])]
    unset = [f"{number}.png,Text of it.,g{number % 500}," for number in range(3, 2000)]
    index = index_of(tmp_path, "image,report,group,split", *written, *unset)
    by_group: dict[str, set[str]] = {}
    for row in rows(index):
        by_group.setdefault(row["group"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in by_group.values())
    assert [by_group[group] for group in ("g0", "g1", "g2")] == [{"valid"}, {"train"}, {"test"}]
    assert 0.75 < sum(splits == {"train"} for splits in by_group.values()) / 500 < 0.85
    assert draw_split(0, "g77") == by_group["g77"].pop()
    again = open_source(str(tmp_path), seed=1).index()
    assert again.table["split"] != index.table["split"]


def test_a_group_in_two_splits_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"group g1 \(3 rows: 1, 2, 4\) is in test and train"):
        index_of(tmp_path, "image,report,group,split", *(f"{n}.png,Text,g{n // 3},{s}" for n, s in
                 ((3, "train"), (4, "test"), (9, ""), (5, ""))))  # fmt: skip
    with pytest.raises(UserError, match="a patient") as error:
        index_of(tmp_path, "image,report,patient,split", "a.png,Text,Doe,train", "b.png,Text,Doe,test")
    assert "Doe" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a valid CSV"),
        (b"\x89PNG\r\n\0\0", "zero bytes"),
        (b"a.png,Clear lungs.\n", "no column image and no column report"),
        (b"image,text\na.png,Clear lungs.\n", "no column report"),
        (b"image,report,Report\na.png,x,y\n", "column report appears twice"),
        (b'image,report\na.png,"never closed\n', "not a valid CSV"),
        (
            b"image,report,split\na.png,Clear lungs.,tarin\n",
            "unknown split tarin in 1 rows, first in row 1",
        ),
        (b"image,split,report\na.png,Clear lungs,train\n", "unknown split in 1 rows"),
        (b"\x1f\x8b broken gzip", "broken gzip"),
    ],
)
def test_an_unreadable_table_raises_with_the_fix(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        open_source(str(tmp_path)).index()
    assert "pairs.csv" in str(error.value)
    assert "Clear lungs" not in str(error.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_tables_of_any_editor(tmp_path: Path, encoding: str, end: str, caplog: pytest.LogCaptureFixture) -> None:
    csv_file(tmp_path / "pairs.csv", "Image, Report", "a.png,Épanchement à gauche.", end=end, encoding=encoding)
    assert rows(open_source(str(tmp_path)).index())[0]["report"] == "Épanchement à gauche."
    assert ("lines in Windows-1252" in caplog.text) == (encoding == "latin-1")


def test_the_real_pairs_are_all_read(realdata: Path) -> None:
    source = open_source(str(realdata))
    index = source.index()
    assert index.table.num_rows + sum(index.filtered.values()) == 94
    assert index.bad_rows == []
    for row in rows(index)[::8]:
        assert source.read_image(row["films"][0]["path"]).grey_HW.ndim == 2
