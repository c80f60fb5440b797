"""Published collections by their official file and column names: what the phantom wrote is given exactly back."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmcgns.data.labelled import open_set
from cmcgns.data.readers import open_source
from cmcgns.data.record import StudyIndex
from cmcgns.data.reports import report_text, sections
from cmcgns.errors import UserError
from cmcgns.phantom import write_mimic_cxr, write_mimic_cxr_jpg
from tests.data.published_trees import (
    CORPUS,
    PLUS_REPORT,
    READERS,
    SPANISH,
    VINBIGDATA,
    WRITERS,
    Shot,
    open_i_sections,
    open_i_uid,
    plus_patient,
    save,
    shots,
    vinbigdata_boxes,
    vindr_boxes,
    vindr_truth,
    write_brax,
    write_chexpert_plus,
    write_open_i_csv,
    write_padchest,
    write_table,
    write_vinbigdata,
)
from tests.data.trees import csv_file, picture, rows
from tests.s3 import S3Server

WITHOUT_REPORTS = ("brax", "vindr-cxr")


def opened(folder: Path | str, name: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The source that ``auto`` finds, and its films: the index row of each by path."""
    source = open_source(str(folder), crop_borders=False, reports=name not in WITHOUT_REPORTS)
    assert source.format == name
    index = source.index()
    assert index.bad_rows == []
    assert index.filtered == {}
    return source, {film["path"]: row | {"film": film} for row in rows(index) for film in row["films"]}


def check(name: str, source: Any, found: dict[str, dict[str, Any]]) -> None:
    """Each film with its pixels, ids, view, labels and report."""
    wanted = [shot for shot in shots() if name != "vindr-cxr" or not shot.film]
    if name == "vindr-cxr":
        wanted.sort(key=lambda shot: shot.study.split == "test")  # its test part comes last
    assert len(found) == len(wanted)
    for (path, row), shot in zip(found.items(), wanted, strict=True):
        level = source.read_image(path).grey_HW.astype(int)
        assert abs(level - expected_grey(name, shot)).mean() <= 0.5
        assert row["film"]["view"] == {"vindr-cxr": "PA", "open-i-csv": "FRONTAL"}.get(name, shot.view)
        assert row["group"] == row["patient_id"] == PATIENT[name](shot)
        labels, truth = dict(row["labels"]), LABELS[name](shot)
        assert {each: labels.get(each) for each in truth} == truth
        if name not in WITHOUT_REPORTS:
            assert source.read_report(row) == REPORT[name](shot)
    groups: dict[str, set[str]] = {}
    for row in found.values():
        groups.setdefault(row["group"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in groups.values())
    per_study: dict[str, int] = {}
    for row in found.values():
        per_study[row["study_id"]] = len(row["films"])
    assert sorted(per_study.values()) == sorted(
        1 if name == "vindr-cxr" else len(CORPUS.study(number).films) for number in range(CORPUS.studies)
    )


def expected_grey(name: str, shot: Shot) -> np.ndarray:
    """16-bit PNGs are stretched from their least to their greatest value."""
    grey = shot.grey().astype(float)
    return (grey - grey.min()) * 255 / np.ptp(grey) if name == "padchest" else grey


def plus_report(shot: Shot) -> str:
    if shot.number % 2:
        return PLUS_REPORT.format(shot.study.report)
    return f"FINDINGS:\nThe lungs of this film are seen.\n\nIMPRESSION:\nNumber {shot.number} is normal."


PATIENT = {
    "padchest": lambda shot: shot.study.patient_id,
    "chexpert-plus": plus_patient,
    "open-i-csv": open_i_uid,
    "brax": lambda shot: shot.study.patient_id,
    "vindr-cxr": lambda shot: shot.image_id,
}
LISTED = lambda shot: {name: value for name, value in shot.labels.items() if value} or {"normal": 1.0}
LABELS = {
    "padchest": LISTED,
    "open-i-csv": LISTED,
    "chexpert-plus": lambda shot: shot.labels,
    "brax": lambda shot: shot.labels,
    "vindr-cxr": lambda shot: {name: float(value) for name, value in vindr_truth(shot).items()},
}
REPORT = {
    "padchest": lambda shot: SPANISH.format(shot.number),
    "chexpert-plus": plus_report,
    "open-i-csv": lambda shot: "\n\n".join(f"{name.upper()}:\n{text}" for name, text in open_i_sections(shot).items()),
}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        *WRITERS.items(),
        ("padchest", partial(write_padchest, where="")),
        ("padchest", partial(write_padchest, where="images/")),
        ("chexpert-plus", partial(write_chexpert_plus, kind="dcm")),
        *(("open-i-csv", partial(write_open_i_csv, where=where)) for where in ("images_normalized/", "images/", "")),
        ("brax", partial(write_brax, kind="dcm")),
    ],
    ids=[
        *WRITERS,
        "padchest flat",
        "padchest images",
        "chexpert-plus dicom",
        "open-i-csv unpacked",
        "open-i-csv images",
        "open-i-csv flat",
        "brax dicom",
    ],
)
def test_a_collection_is_found_and_given_exactly_back(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path)
    check(name, *opened(tmp_path, name))


@pytest.mark.s3
@pytest.mark.parametrize("name", WRITERS)
def test_a_collection_on_s3_is_given_exactly_back(s3_server: S3Server, tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    bucket = s3_server.make_bucket(f"published-{name}")
    s3_server.upload(tmp_path, f"{bucket}/set")
    check(name, *opened(f"{bucket}/set", name))


def test_the_reports_of_chexpert_plus_keep_their_impression(tmp_path: Path) -> None:
    write_chexpert_plus(tmp_path)
    source, found = opened(tmp_path, "chexpert-plus")
    for row in found.values():
        text = source.read_report(row)
        assert "2-ABNORMAL" not in report_text(text)
        if "NARRATIVE" in text:
            own = next(shot.study.report for shot in shots() if PLUS_REPORT.format(shot.study.report) == text)
            assert sections(text).get("impression") == sections(own).get("impression")


def open_i_tables(folder: Path, films: list[str], reports: list[str]) -> StudyIndex:
    csv_file(folder / "indiana_projections.csv", "uid,filename,projection", *films)
    csv_file(
        folder / "indiana_reports.csv", "uid,MeSH,Problems,image,indication,comparison,findings,impression", *reports
    )
    for line in films:
        picture(folder / "images/images_normalized" / line.split(",")[1])
    return open_source(str(folder)).index()


def test_open_i_as_tables_leaves_out_lateral_films_and_reports_of_which_nothing_is_told(tmp_path: Path) -> None:
    films = ["1_F Frontal", "1_L Lateral", "2_L Lateral", "3_F Frontal", "3_L Lateral", "4_F Frontal", "5_F Frontal"]
    reports = [
        "1,normal,normal,x,,None.,,Normal chest.",
        "2,x,Opacity,x,Pain.,,Clear.,",
        "3,x,Opacity,x,Pain.,None.,,",
        '5,x,"Opacity;Pleural Effusion, Small ;Opacity",x,,,"Clear, dry.",',
        "6,x,Opacity,x,,,Clear.,",
    ]
    index = open_i_tables(tmp_path, [f"{each[0]},{each.replace(' ', '.dcm.png,')}" for each in films], reports)
    assert [(row["study_id"], row["report"], row["labels"]) for row in rows(index)] == [
        ("1", "COMPARISON:\nNone.\n\nIMPRESSION:\nNormal chest.", ONLY_NORMAL),
        ("5", "FINDINGS:\nClear, dry.", [("Opacity", 1.0), ("Pleural Effusion, Small", 1.0), ("normal", 0.0)]),
    ]
    assert index.filtered == {"view LATERAL": 2}
    # 3 has neither findings nor impression, 4 no report: one bad row each, however many films
    assert [row["source"].rpartition("/")[2] for row in index.bad_rows] == ["3_F.dcm.png", "4_F.dcm.png"]


ONLY_NORMAL = [("Opacity", 0.0), ("Pleural Effusion, Small", 0.0), ("normal", 1.0)]


def test_a_report_of_open_i_that_was_not_indexed_has_no_labels(tmp_path: Path) -> None:
    films = [f"{uid},{uid}.dcm.png,Frontal" for uid in (1, 2, 3)]
    problems = ["1,x,Opacity,x,,,Clear.,", "2,x,No Indexing,x,,,Clear.,", "3,x,,x,,,Clear.,"]
    index = open_i_tables(tmp_path, films, problems)
    assert [row["labels"] for row in rows(index)] == [[("Opacity", 1.0)], [], []]


def test_a_report_of_open_i_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"indiana_reports\.csv: uid 1 appears twice; download"):
        open_i_tables(tmp_path, ["1,1.dcm.png,Frontal"], ["1,x,x,x,,,Clear.,", "1,x,x,x,,,Dense.,"])


def test_both_releases_of_open_i_give_the_same_sentences(tmp_path: Path) -> None:
    write_open_i_csv(tmp_path / "csv")
    (tmp_path / "xml").mkdir()
    for shot in shots():
        name = f"CXR{open_i_uid(shot)}_IM-{shot.film}"
        parts = (
            f'<AbstractText Label="{each.upper()}">{text}</AbstractText>'
            for each, text in open_i_sections(shot).items()
        )
        save(shot, tmp_path / "xml" / f"{name}.png")
        parent = f'<parentImage id="{name}"/>'
        (tmp_path / "xml" / f"{open_i_uid(shot)}.xml").write_text(f"<x><a>{''.join(parts)}</a>{parent}</x>")
    found = []
    for folder in ("xml", "csv"):
        source = open_source(str(tmp_path / folder))
        studies = rows(source.index())
        found.append({row["study_id"]: (row["split"], source.read_sentences(row, "").sentences) for row in studies})
    assert found[0] == found[1]
    assert len(found[0]) == CORPUS.studies


@pytest.mark.parametrize("name", WITHOUT_REPORTS)
def test_a_collection_without_reports_says_so(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    with pytest.raises(UserError, match=r"is published without reports; for films alone set data\.reports=false"):
        open_source(str(tmp_path)).index()


@pytest.mark.parametrize("name", WRITERS)
def test_a_wrong_table_or_films_elsewhere_are_one_message(tmp_path: Path, name: str) -> None:
    reports = name not in WITHOUT_REPORTS
    with pytest.raises(UserError, match=r"has no \S+, which|does not exist|is missing|no such"):
        open_source(str(tmp_path / "nothing"), format=name, reports=reports).index()
    WRITERS[name](tmp_path)
    table = next(path for path in tmp_path.rglob("*.csv*") if "annotations_" not in path.name)
    for path in [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".dicom")]:
        path.unlink()
    with pytest.raises(UserError, match="has none of the first 20 films of its table, tried as") as error:
        open_source(str(tmp_path), format=name, reports=reports).index()
    assert "\n" not in str(error.value)
    write_table(table, ["some", "columns"], [])
    with pytest.raises(UserError, match=rf"{table.name} has no column \w+; .* download the published file again"):
        open_source(str(tmp_path), format=name, reports=reports).index()


def test_vindr_has_the_boxes_of_every_reader(tmp_path: Path) -> None:
    WRITERS["vindr-cxr"](tmp_path)
    images = open_set("vindr-cxr", str(tmp_path))
    found = {row["image_id"]: row for row in images.table.to_pylist()}
    wanted = {shot.image_id: shot for shot in shots() if not shot.film}
    assert set(found) == set(wanted)
    assert "No finding" not in images.classes
    for image, shot in wanted.items():
        row = found[image]
        readers = len(READERS) if shot.study.split != "test" else 1
        own = [[each[side] for side in ("x0", "y0", "x1", "y1")] for each in row["boxes"]]
        assert own == [corners for _, corners in vindr_boxes(shot)] * readers or sorted(own) == sorted(
            [corners for _, corners in vindr_boxes(shot)] * readers
        )
        truth = vindr_truth(shot)
        assert {name: row["labels"][images.classes.index(name)] for name in truth} == truth
        assert (row["split"] == "test") == (shot.study.split == "test")


def check_vinbigdata(uri: str) -> None:
    """Films, labels of most readers and boxes of all of them, in training and in evaluation."""
    wanted = {shot.image_id: shot for shot in shots() if not shot.film}
    truth = {
        image: {name: float(any(name == kind for kind, _ in vinbigdata_boxes(shot))) for name in VINBIGDATA.values()}
        for image, shot in wanted.items()
    }
    assert 0 < sum(each["Cardiomegaly"] for each in truth.values()) < len(truth)
    source, found = opened(uri, "vindr-cxr")
    assert {row["film"]["image_id"] for row in found.values()} == set(wanted)
    for path, row in found.items():
        shot = wanted[row["study_id"]]
        assert abs(source.read_image(path).grey_HW.astype(int) - shot.grey()).mean() <= 0.5
        assert dict(row["labels"]) == truth[shot.image_id] | {"No finding": float(not vinbigdata_boxes(shot))}
    assert {row["split"] for row in found.values()} == {"train", "valid", "test"}
    images = open_set("vindr-cxr", uri)
    for row in images.table.to_pylist():
        shot = wanted.pop(row["image_id"])
        assert dict(zip(images.classes, row["labels"], strict=True)) == truth[shot.image_id]
        drawn = vinbigdata_boxes(shot) * 2 + vinbigdata_boxes(shot, errs=True)
        own = [
            [images.box_classes[each["kind"]], *(each[side] for side in ("x0", "y0", "x1", "y1"))]
            for each in row["boxes"]
        ]
        assert sorted(own) == sorted([name, *corners] for name, corners in drawn)
    assert not wanted
    assert images.rule.startswith("70/10/20 by image, drawn with seed 0, because its test films have no labels")


def test_vinbigdata_is_read_by_most_of_its_readers(tmp_path: Path) -> None:
    write_vinbigdata(tmp_path)
    check_vinbigdata(str(tmp_path))


@pytest.mark.s3
def test_vinbigdata_on_s3_is_read_by_most_of_its_readers(s3_server: S3Server, tmp_path: Path) -> None:
    write_vinbigdata(tmp_path)
    bucket = s3_server.make_bucket("published-vinbigdata")
    s3_server.upload(tmp_path, f"{bucket}/set")
    check_vinbigdata(f"{bucket}/set")


def test_boxes_of_vinbigdata_are_not_read_onto_resized_copies(tmp_path: Path) -> None:
    write_vinbigdata(tmp_path)
    for path in (tmp_path / "train").iterdir():
        path.unlink()
        picture(path.with_suffix(".png"))
    with pytest.raises(UserError, match=r"unpack train/\*\.dicom \(boxes do not fit resized copies\)"):
        open_set("vindr-cxr", str(tmp_path))
    assert len(opened(tmp_path, "vindr-cxr")[1]) == CORPUS.studies  # labels fit


def test_another_train_csv_is_not_taken_for_vinbigdata(tmp_path: Path) -> None:
    csv_file(tmp_path / "train.csv", "Path,Sex,Age,Frontal/Lateral", "train/a.jpg,M,50,Frontal")
    picture(tmp_path / "train/a.jpg")
    with pytest.raises(UserError, match="no known format found"):
        open_source(str(tmp_path))


# MIMIC-CXR


def write_challenge(folder: Path, name: str, tables: dict[str, str]) -> None:
    """CXR-LT beside the tables of MIMIC-CXR-JPG: its own splits and findings."""
    head = [
        "dicom_id",
        "subject_id",
        "study_id",
        "ViewPosition",
        "ViewCodeSequence_CodeMeaning",
        "fpath",
        "Hernia",
        "Nodule",
    ]
    parts: dict[str, list[dict[str, Any]]] = {part: [] for part in tables}
    for shot in shots():
        line = {"dicom_id": shot.image_id, "Hernia": shot.number % 2, "Nodule": int(shot.study.labels["nodule"])}
        parts[PART[shot.study.split]].append(line | {"fpath": f"files/{shot.image_id}.jpg", "ViewPosition": shot.view})
    for part, table in tables.items():
        write_table(folder / name / table, head, parts[part])


PART = {"train": "test", "valid": "train", "test": "development"}
"""The challenge's part of each split of the phantom: another one."""
GIVEN = {"train": "test", "valid": "train", "test": "valid"}
RELEASES = {
    "cxr-lt-2023": {"train": "train.csv", "development": "development.csv", "test": "test.csv"},
    "cxr-lt-2024": {
        "train": "train_labeled.csv",
        "development": "development_labeled_task1.csv",
        "test": "test_labeled_task1.csv",
    },
}


@pytest.mark.parametrize(("release", "tables"), RELEASES.items(), ids=list(RELEASES))
def test_splits_and_findings_of_cxr_lt_are_used(tmp_path: Path, release: str, tables: dict[str, str]) -> None:
    write_mimic_cxr_jpg(CORPUS, tmp_path)
    write_challenge(tmp_path, release, tables)
    source = open_source(str(tmp_path))
    assert source.format == "mimic-cxr-jpg"
    by_study = {shot.study.study_id: shot for shot in reversed(shots())}
    for row in rows(source.index()):
        shot = by_study[row["study_id"]]
        assert row["split"] == GIVEN[shot.study.split]
        assert dict(row["labels"]) == {"Hernia": shot.number % 2, "Nodule": shot.study.labels["nodule"]}
    for path in (tmp_path / release).iterdir():
        path.unlink()
    with pytest.raises(UserError, match=rf"{release} has no train_labeled"):
        source.index()


def test_the_list_of_records_stands_in_for_the_metadata(tmp_path: Path) -> None:
    write_mimic_cxr(CORPUS, tmp_path)
    whole = rows(open_source(str(tmp_path)).index())
    lines = [
        {
            "subject_id": shot.study.patient_id[1:],
            "study_id": shot.study.study_id[1:],
            "dicom_id": shot.image_id,
            "path": "x",
        }
        for shot in shots()
    ]
    write_table(tmp_path / "cxr-record-list.csv.gz", ["subject_id", "study_id", "dicom_id", "path"], lines)
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    source = open_source(str(tmp_path))
    assert source.format == "mimic-cxr"
    without_views = [row | {"films": [film | {"view": ""} for film in row["films"]]} for row in whole]
    assert rows(source.index()) == without_views
