"""Published layouts and the phantom, on small hand-written trees."""

import pickle
from pathlib import Path

import pytest

from cmcgns.data.readers import detect_format, open_source
from cmcgns.data.reports import parse_report
from cmcgns.errors import BadRow, UserError
from tests.data.trees import REPORT, csv_file, picture, rows

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
        assert source.read_image(first["films"][0]["path"]).grey_HW.shape == (20, 30)


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
        source.read_image(first["films"][0]["path"])


def test_mimic_dicoms_without_tables_are_found_by_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    (folder / "8.xml").write_text('<?xml version="1.0" encoding="no-such-code"?><eCitation/>')
    (folder / "9.xml").symlink_to("gone.xml")
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
        "6.xml": "all images of the report are missing",
        "7.xml": "XML cannot be parsed (line 1)",
        "8.xml": "XML cannot be parsed (unknown or wrong encoding)",
        "9.xml": "report file is missing",
    }
    assert index.filtered == {"image file is missing": 1}
    assert source.read_image(first["films"][0]["path"]).grey_HW.shape == (20, 30)

    csv_file(tmp_path / "dicom_metadata.csv", "imageid,View Position", "CXR1_1_IM-0001-4001,LATERAL")
    index = source.index()
    assert len(rows(index)[0]["films"]) == 1
    assert index.filtered == {"image file is missing": 1, "view LATERAL": 1}


def open_i_dicom(folder: Path, reports: str = "ecgen-radiology") -> dict[int, str]:
    """A tree of Open-I's DICOM collection; names of its films by number of the report."""
    (folder / reports).mkdir(parents=True)
    films = {1: "1_IM-0001-{}001", 2: "2_IM-0652-{}001", 12: "12_IM-0133-{}001"}
    for number, name in films.items():
        ids = [f"CXR{number}_{name.format(place)}" if number == 1 else f"CXR{name.format(place)}" for place in (3, 4)]
        open_i_report(folder / reports, number, "The lungs are clear.", f"Number {number} is normal.", *ids)
        for place in (3, 4):
            picture(folder / f"{number}/{name.format(place)}.png")
            (folder / f"{number}/{name.format(place)}.png").rename(folder / f"{number}/{name.format(place)}.dcm")
    return films


@pytest.mark.parametrize("reports", ["ecgen-radiology", "NLMCXR_reports/ecgen-radiology"])
def test_the_dicom_tree_of_open_i_is_found_by_both_forms_of_its_ids(tmp_path: Path, reports: str) -> None:
    films = open_i_dicom(tmp_path, reports)
    source = open_source(str(tmp_path))
    assert source.format == "open-i"
    index = source.index()
    assert index.bad_rows == []
    assert index.filtered == {}
    found = {row["study_id"]: [film["path"] for film in row["films"]] for row in rows(index)}
    assert found == {
        str(number): [f"{number}/{name.format(place)}.dcm" for place in (3, 4)] for number, name in films.items()
    }
    for row in rows(index):
        assert f"Number {row['study_id']} is normal." in source.read_report(row)


def test_no_part_of_an_open_i_report_is_lost(tmp_path: Path) -> None:
    parts = [
        ("FINDINGS", "Clear lungs."),
        ("FINDINGS", "Normal heart."),
        ("", "Read twice."),
        ("TECHNIQUE", "Two views."),
    ]
    texts = "".join(f'<AbstractText Label="{name}">{text}</AbstractText>' for name, text in parts)
    (tmp_path / "1.xml").write_text(f'<eCitation><Abstract>{texts}</Abstract><parentImage id="CXR1_x"/></eCitation>')
    picture(tmp_path / "CXR1_x.png")
    source = open_source(str(tmp_path))
    report = source.read_report(rows(source.index())[0])
    assert report == "Read twice.\nTECHNIQUE: Two views.\nFINDINGS: Clear lungs. Normal heart."


def test_real_open_i_reports_without_their_films_are_bad_rows(realdata: Path) -> None:
    index = open_source(str(realdata / "reports_openi")).index()
    assert index.table.num_rows == 0
    assert len(index.bad_rows) == 120
    assert sum("both empty" in row["reason"] for row in index.bad_rows) == 3


# Detection of formats


def test_an_unknown_layout_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "notes.doc").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pairs-csv.*mimic-cxr-jpg.*open-i"):
        detect_format(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        detect_format(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"data\.format 'chexpert': no such module; known: phantom, pairs-csv"):
        open_source(str(tmp_path), format="chexpert")


@pytest.mark.parametrize("uri", ["phantom:0", "phantom:many", "phantom:1:2:3", "phantom:-4"])
def test_a_misspelt_phantom_raises(uri: str) -> None:
    with pytest.raises(UserError, match="phantom:STUDIES"):
        open_source(uri)


def test_the_phantom_is_a_source() -> None:
    pytest.importorskip("cmcgns.phantom")
    source = pickle.loads(pickle.dumps(open_source("phantom:12:3", phantom_size=64, crop_borders=False)))
    index = source.index()
    assert len(rows(index)) == 12
    assert open_source("phantom:12:3", phantom_size=64).index().table.equals(index.table)
    film = rows(index)[5]["films"][0]
    assert source.read_image(film["path"]).grey_HW.shape == (64, 64)
    assert source.read_report(rows(index)[5])


@pytest.mark.parametrize("layout", ["pairs-csv", "mimic-cxr-jpg", "mimic-cxr"])
def test_a_written_phantom_reads_back_as_itself(tmp_path: Path, layout: str) -> None:
    from cmcgns import phantom

    corpus = phantom.PhantomCorpus(studies=24, seed=5, height=96, width=80)
    getattr(phantom, f"write_{layout.replace('-', '_')}")(corpus, tmp_path)
    source = open_source(str(tmp_path), crop_borders=False)
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
            assert study.films[place].image_id in film["image_id"]  # in pairs the path is the image id
            assert film["view"] == study.films[place].view
            difference = source.read_image(film["path"]).grey_HW.astype(int) - corpus.render(number, place)
            assert abs(difference).mean() <= (2.5 if film["path"].endswith(".jpg") else 0.5)
