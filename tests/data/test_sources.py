"""Each corpus layout on a small tree written by hand."""

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmcgns.data.index import INDEX_SCHEMA, StudyIndex
from cmcgns.data.reports import parse_report
from cmcgns.data.sources import PairsSource, detect_format, open_source
from cmcgns.data.sources.base import canonical_view, draw_split, escapes
from cmcgns.errors import BadRow, UserError

REPORT = "FINDINGS: The lungs are clear.\nIMPRESSION: No effusion."


def picture(path: Path, level: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30), level, np.uint8)).save(path, "JPEG" if path.suffix == ".jpg" else "PNG")


def csv_file(path: Path, *lines: str, end: str = "\n", encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (end.join(lines) + end).encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def rows(index: StudyIndex) -> list[dict[str, Any]]:
    assert index.table.schema == INDEX_SCHEMA
    index.table.validate(full=True)
    return index.table.to_pylist()


def index_of(folder: Path, *lines: str, **options: Any) -> StudyIndex:
    csv_file(folder / "pairs.csv", *lines)
    return open_source(str(folder), **options).index()


# pairs-csv


def test_pairs_carry_every_column_that_is_known(tmp_path: Path) -> None:
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
    assert (source.read_film("films/a b.png") == 50).all()
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


def test_sources_travel(tmp_path: Path) -> None:
    csv_file(tmp_path / "pairs.csv", "image,report", "a.png,Clear lungs.")
    picture(tmp_path / "a.png")
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path))))
    assert source == open_source(str(tmp_path))
    assert source.read_film("a.png").shape == (20, 30)


def test_views_are_filtered_and_counted_apart(tmp_path: Path) -> None:
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
        ("pairs.csv row 1", "film path leaves the corpus's folder"),
        ("pairs.csv row 2", "film path leaves the corpus's folder"),
        ("pairs.csv row 3", "row names no image"),
        ("pairs.csv row 4", "row has no report"),
    ]
    assert index.table.num_rows == 1
    source = open_source(str(tmp_path))
    for path, reason in (("b.png", "missing"), ("../pairs.csv", "leaves"), ("pairs.csv", "neither")):
        with pytest.raises(BadRow, match=reason):
            source.read_film(path)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/x", "~/x", "C:\\x", "\\\\host\\x", "s3://b/x", "file:///x"])
def test_paths_that_escape(path: str) -> None:
    assert escapes(path)


@pytest.mark.parametrize("path", ["x.png", "a/b c/x.png", "a..b/x.png", "..a/x.png", "a/é.png"])
def test_paths_that_stay(path: str) -> None:
    assert not escapes(path)


def test_splits_are_taken_as_written_else_drawn_by_group(tmp_path: Path) -> None:
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


def test_a_group_in_two_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"group g1 \(3 rows: 1, 2, 4\) is in test and train"):
        index_of(tmp_path, "image,report,group,split", *(f"{n}.png,Text,g{n // 3},{s}" for n, s in
                 ((3, "train"), (4, "test"), (9, ""), (5, ""))))  # fmt: skip
    with pytest.raises(UserError, match="a patient") as error:
        index_of(tmp_path, "image,report,patient,split", "a.png,Text,Doe,train", "b.png,Text,Doe,test")
    assert "Doe" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no readable CSV"),
        (b"\x89PNG\r\n\0\0", "zero bytes"),
        (b"a.png,Clear lungs.\n", "no column image and no column report"),
        (b"image;report\na.png;Clear lungs.\n", "seems to use semicolons"),
        (b"image,text\na.png,Clear lungs.\n", "no column report"),
        (b"image,report,Report\na.png,x,y\n", "column report appears twice"),
        (b'image,report\na.png,"never closed\n', "no readable CSV"),
        (
            b"image,report,split\na.png,Clear lungs.,tarin\n",
            "split tarin is unknown in 1 rows, the first of them row 1",
        ),
        (b"image,split,report\na.png,Clear lungs,train\n", "split is unknown in 1 rows"),
        (b"\x1f\x8b broken gzip", "broken gzip"),
    ],
)
def test_a_table_that_cannot_be_read_says_what_would_do(tmp_path: Path, content: bytes, says: str) -> None:
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
    assert ("Latin-1" in caplog.text) == (encoding == "latin-1")


def test_the_real_pairs_are_all_read(realdata: Path) -> None:
    source = open_source(str(realdata))
    index = source.index()
    assert index.table.num_rows + sum(index.filtered.values()) == 94
    assert index.bad_rows == []
    for row in rows(index)[::8]:
        assert source.read_film(row["films"][0]["path"]).ndim == 2


# MIMIC-CXR

DICOM_IDS = [f"{number:08x}-0000" for number in range(5)]


def mimic(folder: Path, suffix: str = ".jpg", tables: bool = True) -> Path:
    """Two patients, three studies, five films of which one is lateral and one has no view."""
    facts = list(
        zip(
            DICOM_IDS,
            [10000032] * 4 + [10000764],
            [501, 501, 502, 502, 503],
            ["PA", "LATERAL", "AP", "", "PA"],
            strict=True,
        )
    )
    for dicom, patient, study, _ in facts:
        place = folder / f"files/p10/p{patient}/s{study}"
        place.mkdir(parents=True, exist_ok=True)
        if suffix == ".jpg":
            picture(place / f"{dicom}.jpg")
        else:
            (place / f"{dicom}.dcm").write_bytes(b"\0" * 128 + b"DICM")
        place.with_suffix(".txt").write_text(REPORT)
    if tables:
        head = "dicom_id,subject_id,study_id"
        lines = [f"{dicom},{patient},{study},{view}" for dicom, patient, study, view in facts]
        csv_file(folder / "mimic-cxr-2.0.0-metadata.csv.gz", f"{head},ViewPosition", *lines)
        splits = [
            f"{dicom},{study},{patient},{'validate' if patient == 10000764 else 'train'}"
            for dicom, patient, study, _ in facts
        ]
        csv_file(folder / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split", *splits)
        csv_file(
            folder / "mimic-cxr-2.0.0-chexpert.csv.gz",
            "subject_id,study_id,Edema,No Finding", "10000032,501,1.0,", "10000764,503,-1.0,0.0",
        )  # fmt: skip
    return folder


@pytest.mark.parametrize(("suffix", "name"), [(".jpg", "mimic-cxr-jpg"), (".dcm", "mimic-cxr")])
def test_mimic_with_its_tables(tmp_path: Path, suffix: str, name: str) -> None:
    source = open_source(str(mimic(tmp_path, suffix)))
    assert source.format == name
    index = source.index()
    first, second, third = rows(index)
    assert first == {
        "study_id": "s501",
        "patient_id": "p10000032",
        "group": "p10000032",
        "split": "train",
        "films": [{"image_id": DICOM_IDS[0], "path": f"files/p10/p10000032/s501/{DICOM_IDS[0]}{suffix}", "view": "PA"}],
        "report": None,
        "report_path": "files/p10/p10000032/s501.txt",
        "labels": [("Edema", 1.0)],
    }
    assert second["labels"] == []
    assert (third["split"], third["labels"]) == ("valid", [("Edema", -1.0), ("No Finding", 0.0)])
    assert index.filtered == {"view LATERAL": 1, "view unknown": 1}
    assert source.read_report(first) == REPORT
    if suffix == ".jpg":
        assert source.read_film(first["films"][0]["path"]).shape == (20, 30)


def test_mimic_reports_unpacked_into_their_own_folder(tmp_path: Path) -> None:
    mimic(tmp_path)
    for report in sorted((tmp_path / "files").rglob("*.txt")):
        target = tmp_path / "mimic-cxr-reports" / report.relative_to(tmp_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        report.rename(target)
    source = open_source(str(tmp_path))
    assert source.read_report(rows(source.index())[0]) == REPORT


def test_a_mimic_study_without_report_or_film_is_a_bad_row(tmp_path: Path) -> None:
    source = open_source(str(mimic(tmp_path)))
    first = rows(source.index())[0]
    (tmp_path / first["report_path"]).unlink()
    (tmp_path / first["films"][0]["path"]).write_bytes(b"")
    with pytest.raises(BadRow, match="report file is missing"):
        source.read_report(first)
    with pytest.raises(BadRow, match="empty"):
        source.read_film(first["films"][0]["path"])


def test_mimic_dicoms_without_tables_are_walked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mimic(tmp_path, ".dcm", tables=False)
    (tmp_path / "files/p10/p10000764/s503.txt").unlink()
    source = open_source(str(tmp_path))
    assert source.format == "mimic-cxr"
    index = source.index()
    assert [(row["study_id"], row["patient_id"], len(row["films"])) for row in rows(index)] == [
        ("s501", "p10000032", 2),
        ("s502", "p10000032", 2),
    ]
    assert len({row["split"] for row in rows(index)}) == 1
    assert index.bad_rows == [{"source": "files/p10/p10000764/s503", "reason": "study has no report file"}]
    assert "views are unknown" in caplog.text
    assert source.read_report(rows(index)[0]) == REPORT


def test_a_mimic_table_that_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    mimic(tmp_path, tables=False)
    with pytest.raises(UserError, match=r"metadata\.csv\.gz is missing"):
        open_source(str(tmp_path), format="mimic-cxr-jpg").index()
    csv_file(tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz", "dicom_id,subject_id,study_id", "a,1,2")
    with pytest.raises(UserError, match="no column ViewPosition"):
        open_source(str(tmp_path)).index()


# Open-I


def open_i_report(folder: Path, number: int, findings: str, impression: str, *images: str) -> None:
    parents = "".join(f'<parentImage id="{image}"/>' for image in images)
    (folder / f"{number}.xml").write_text(
        "<eCitation><Abstract>"
        '<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION"/>'
        f'<AbstractText Label="FINDINGS">{findings}</AbstractText>'
        f'<AbstractText Label="IMPRESSION">{impression}</AbstractText>'
        f"</Abstract>{parents}</eCitation>"
    )


def open_i(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    open_i_report(folder, 1, "Lungs &lt;clear&gt;.", "Normal XXXX.", "CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001")
    open_i_report(folder, 2, "", "Effusion.", "CXR2_IM-0652-1001")
    open_i_report(folder, 3, "", "", "CXR3_IM-0001-1001")
    open_i_report(folder, 4, "Clear.", "Normal.")
    open_i_report(folder, 5, "Clear.", "Normal.", "CXR5_IM-0001-1001", "CXR5_IM-0001-2001")
    open_i_report(folder, 6, "Clear.", "Normal.", "CXR6_IM-0001-1001")
    (folder / "7.xml").write_text("<eCitation><Abstract>")
    picture(folder / "images/CXR1_1_IM-0001-3001.png")
    picture(folder / "images/CXR1_1_IM-0001-4001.png")
    picture(folder / "CXR2_IM-0652-1001.jpg")
    (folder / "5_IM-0001-1001.dcm").write_bytes(b"")
    return folder


def test_open_i_with_and_without_its_table_of_views(tmp_path: Path) -> None:
    source = open_source(str(open_i(tmp_path)))
    assert source.format == "open-i"
    index = source.index()
    first, second, fifth = rows(index)
    assert first["report"] == "COMPARISON: None.\nFINDINGS: Lungs <clear>.\nIMPRESSION: Normal XXXX."
    assert [film["path"] for film in first["films"]] == [
        "images/CXR1_1_IM-0001-3001.png",
        "images/CXR1_1_IM-0001-4001.png",
    ]
    assert second["films"][0]["image_id"] == "CXR2_IM-0652-1001"
    assert fifth["films"][0]["path"] == "5_IM-0001-1001.dcm"
    assert {row["source"]: row["reason"] for row in index.bad_rows} == {
        "3.xml": "FINDINGS and IMPRESSION are both empty",
        "4.xml": "report names no image",
        "6.xml": "no image of the report lies in the folder",
        "7.xml": "XML cannot be parsed (line 1)",
    }
    assert index.filtered == {"image file is missing": 1}
    assert source.read_film(first["films"][0]["path"]).shape == (20, 30)

    csv_file(tmp_path / "dicom_metadata.csv", "imageid,View Position", "CXR1_1_IM-0001-4001,LATERAL")
    index = source.index()
    assert len(rows(index)[0]["films"]) == 1
    assert index.filtered == {"image file is missing": 1, "view LATERAL": 1}


def test_real_open_i_reports_without_their_films_are_bad_rows(realdata: Path) -> None:
    index = open_source(str(realdata / "reports_openi")).index()
    assert index.table.num_rows == 0
    assert len(index.bad_rows) == 120
    assert sum("both empty" in row["reason"] for row in index.bad_rows) == 3


# What lies there


def test_an_unknown_layout_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "notes.doc").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pairs-csv.*mimic-cxr-jpg.*open-i"):
        detect_format(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        detect_format(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"data\.format chexpert is unknown"):
        open_source(str(tmp_path), format="chexpert")


@pytest.mark.parametrize("uri", ["phantom:0", "phantom:many", "phantom:1:2:3", "phantom:-4"])
def test_a_misspelt_phantom_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="phantom:STUDIES"):
        open_source(uri)


def test_the_phantom_is_a_source() -> None:
    pytest.importorskip("cmcgns.data.phantom")
    source = pickle.loads(pickle.dumps(open_source("phantom:12:3", phantom_size=64)))
    index = source.index()
    assert len(rows(index)) == 12
    assert open_source("phantom:12:3", phantom_size=64).index().table.equals(index.table)
    film = rows(index)[5]["films"][0]
    assert source.read_film(film["path"]).shape == (64, 64)
    assert source.read_report(rows(index)[5])


@pytest.mark.parametrize("layout", ["pairs-csv", "mimic-cxr-jpg", "mimic-cxr"])
def test_a_phantom_written_out_reads_back_as_itself(tmp_path: Path, layout: str) -> None:
    from cmcgns.data import phantom

    corpus = phantom.PhantomCorpus(studies=24, seed=5, height=96, width=80)
    getattr(phantom, f"write_{layout.replace('-', '_')}")(corpus, tmp_path)
    source = open_source(str(tmp_path))
    assert source.format == layout
    index = source.index()
    assert index.bad_rows == []
    assert index.filtered == {}
    assert len(rows(index)) == 24
    for number, row in enumerate(rows(index)):
        study = corpus.study(number)
        assert row["split"] == study.split
        assert row["patient_id"].lstrip("p") == study.patient_id.lstrip("p")
        assert parse_report(source.read_report(row)) == parse_report(study.report)
        assert len(row["films"]) == len(study.films)
        for place, film in enumerate(row["films"]):
            assert study.films[place].image_id in film["image_id"]  # pairs know a film by its path
            assert film["view"] == study.films[place].view
            difference = source.read_film(film["path"]).astype(int) - corpus.render(number, place)
            assert abs(difference).mean() <= (2.5 if film["path"].endswith(".jpg") else 0.5)
