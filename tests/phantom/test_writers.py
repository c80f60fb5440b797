"""The phantom on disk, read back with the usual libraries."""

import csv
import filecmp
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

from cmcgns.phantom import FINDINGS, PhantomCorpus, contact_sheet, write_mimic_cxr, write_mimic_cxr_jpg, write_pairs_csv

CORPUS = PhantomCorpus(24, seed=2, height=96, width=96)
FILMS = [(i, k) for i in range(24) for k in range(len(CORPUS.study(i).films))]
WRITERS = {"pairs": write_pairs_csv, "jpg": write_mimic_cxr_jpg, "dicom": write_mimic_cxr}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The corpus written once in each layout, by one process."""
    cv2.setNumThreads(1)
    folder = tmp_path_factory.mktemp("phantom")
    for name, write in WRITERS.items():
        write(CORPUS, folder / name)
    return {name: folder / name for name in WRITERS}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def mimic_path(i: int, suffix: str) -> str:
    study = CORPUS.study(i)
    return f"files/{study.patient_id[:3]}/{study.patient_id}/{study.study_id}{suffix}"


def table(tree: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(tree / f"mimic-cxr-2.0.0-{name}.csv.gz")


@pytest.mark.parametrize("name", WRITERS)
def test_two_processes_write_the_bytes_of_one(name: str, trees: dict[str, Path], tmp_path: Path) -> None:
    WRITERS[name](CORPUS, tmp_path, workers=2)
    assert files(tmp_path) == files(trees[name])
    assert filecmp.cmpfiles(tmp_path, trees[name], files(tmp_path), shallow=False)[1:] == ([], [])


def test_pairs_csv_has_every_film_with_its_report_and_labels(trees: dict[str, Path]) -> None:
    with (trees["pairs"] / "pairs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(FILMS)
    assert len(files(trees["pairs"])) == len(FILMS) + 1
    assert {Path(row["image"]).suffix for row in rows} == {".png", ".jpg"}
    for row, (i, k) in zip(rows, FILMS, strict=True):
        study = CORPUS.study(i)
        assert row["report"] == study.report
        assert (row["patient"], row["group"]) == (study.patient_id, study.patient_id)
        assert (row["study"], row["split"], row["view"]) == (study.study_id, study.split, study.films[k].view)
        assert {name: float(row[name]) for name in FINDINGS} == study.labels
        seen = np.asarray(Image.open(trees["pairs"] / row["image"])).astype(int)
        error = np.abs(seen - CORPUS.render(i, k))
        assert error.max() == 0 if row["image"].endswith("png") else error.mean() < 2


def test_mimic_tables_agree_with_the_corpus(trees: dict[str, Path]) -> None:
    for tree in (trees["jpg"], trees["dicom"]):
        metadata, split = table(tree, "metadata"), table(tree, "split")
        assert list(metadata["dicom_id"]) == list(split["dicom_id"])
        assert list(metadata["dicom_id"]) == [CORPUS.study(i).films[k].image_id for i, k in FILMS]
        assert list(metadata["ViewPosition"]) == [CORPUS.study(i).films[k].view for i, k in FILMS]
        assert list(metadata["study_id"]) == [int(CORPUS.study(i).study_id[1:]) for i, _ in FILMS]
        assert set(metadata["Rows"]) == {96}
        names = {"train": "train", "valid": "validate", "test": "test"}
        assert list(split["split"]) == [names[CORPUS.study(i).split] for i, _ in FILMS]
        assert split.groupby("subject_id")["split"].nunique().max() == 1


def test_mimic_dates_keep_the_order_of_a_patients_studies(trees: dict[str, Path]) -> None:
    for _, studies in table(trees["jpg"], "metadata").groupby("subject_id"):
        assert list(studies["StudyDate"]) == sorted(studies["StudyDate"])


def test_chexpert_labels_follow_the_truth_and_use_all_four_values(trees: dict[str, Path]) -> None:
    chexpert, negbio = table(trees["jpg"], "chexpert"), table(trees["jpg"], "negbio")
    assert chexpert.shape == negbio.shape == (24, 16)
    renamed = {"effusion": "Pleural Effusion", "nodule": "Lung Lesion", "device": "Support Devices"}
    for i in range(24):
        labels = CORPUS.study(i).labels
        for name in FINDINGS:
            assert (chexpert[renamed.get(name, name.capitalize())][i] == 1) == bool(labels[name])
        diseased = any(value for name, value in labels.items() if name != "device")
        assert (chexpert["No Finding"][i] == 1) == (not diseased)
    values = chexpert.iloc[:, 2:].to_numpy()
    assert set(values[~np.isnan(values)]) == {1.0, 0.0, -1.0}
    assert np.isnan(values).any()
    assert not (negbio.iloc[:, 2:] == -1).any().any()


def test_report_files_look_like_those_of_mimic(trees: dict[str, Path]) -> None:
    for tree in (trees["jpg"], trees["dicom"]):
        for i in range(24):
            text = (tree / mimic_path(i, ".txt")).read_text(encoding="utf-8")
            head, *lines = text.rstrip("\n").split("\n")
            assert head == " " * 33 + "FINAL REPORT"
            assert all(line.startswith(" ") and len(line) <= 79 for line in lines)
            assert text.split()[2:] == CORPUS.study(i).report.split()


def test_dicom_films_show_what_the_jpegs_show(trees: dict[str, Path]) -> None:
    seen = set()
    for i, k in FILMS:
        name = mimic_path(i, f"/{CORPUS.study(i).films[k].image_id}")
        data = pydicom.dcmread(trees["dicom"] / f"{name}.dcm")
        assert (data.BitsStored, data.BitsAllocated, data.file_meta.TransferSyntaxUID) == (
            12,
            16,
            "1.2.840.10008.1.2.1",
        )
        assert f"p{data.PatientID}" == CORPUS.study(i).patient_id
        low = data.WindowCenter - 0.5 - (data.WindowWidth - 1) / 2
        grey = np.clip((data.pixel_array - low) / (data.WindowWidth - 1), 0, 1) * 255
        grey = 255 - grey if data.PhotometricInterpretation == "MONOCHROME1" else grey
        assert np.abs(grey - CORPUS.render(i, k)).max() < 1
        jpeg = np.asarray(Image.open(trees["jpg"] / f"{name}.jpg")).astype(float)
        assert np.abs(grey - jpeg).mean() < 2
        seen.add(data.PhotometricInterpretation)
    assert seen == {"MONOCHROME1", "MONOCHROME2"}


def test_a_contact_sheet_is_a_picture_of_the_asked_size(tmp_path: Path) -> None:
    sheet = Image.open(contact_sheet(CORPUS, tmp_path / "sheet.png", rows=2, cols=3))
    assert sheet.width == 3 * 96
    assert sheet.height > 2 * 96
    films = np.asarray(sheet)[:96, :96]
    assert np.array_equal(films, CORPUS.render(0))
