"""Writers of the phantom corpus as files: pairs CSV, MIMIC-CXR and MIMIC-CXR-JPG."""

import csv
import gzip
import io
import multiprocessing
import re
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cmcgns.phantom import phrases
from cmcgns.phantom.canvas import Draws, digest
from cmcgns.phantom.corpus import BLOCK, PhantomCorpus, PhantomStudy
from cmcgns.phantom.findings import FINDINGS

_DX_FOR_PRESENTATION = "1.2.840.10008.5.1.4.1.1.1.1"
_EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"


def write_dicom(
    path: Path,
    pixels: npt.NDArray[np.uint16],
    *,
    photometric: str,
    window: tuple[float, float],
    patient_id: str,
    study_id: str,
    image_id: str,
    view: str,
) -> None:
    """Write ``pixels``, 12 bits stored in 16, as a digital X-ray in Explicit VR Little Endian.

    ``photometric`` is MONOCHROME1 or MONOCHROME2, ``window`` is (center, width).
    """
    # imported here: only tests write DICOM
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = _DX_FOR_PRESENTATION
    meta.MediaStorageSOPInstanceUID = _uid(image_id)
    meta.TransferSyntaxUID = _EXPLICIT_VR_LITTLE_ENDIAN
    meta.ImplementationClassUID = _uid("cmcgns phantom")
    data = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID = _uid(study_id), _uid(study_id, view)
    data.PatientID, data.StudyID, data.PatientName = patient_id, study_id, ""
    data.Modality, data.BodyPartExamined, data.ViewPosition = "DX", "CHEST", view
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, photometric
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.WindowCenter, data.WindowWidth = window
    data.PixelData = pixels.astype("<u2").tobytes()
    data["PixelData"].VR = "OW"
    data.save_as(path, enforce_file_format=True)


def _uid(*key: object) -> str:
    """A UID under the root for UUIDs, derived from ``key``."""
    return f"2.25.{int.from_bytes(digest(*key)[:15], 'big')}"


LINE = 79
"""Longest line of a report file."""
SPLITS = {"train": "train", "valid": "validate", "test": "test"}
CHEXPERT = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)

LABEL_OF = {
    "cardiomegaly": "Cardiomegaly",
    "effusion": "Pleural Effusion",
    "pneumothorax": "Pneumothorax",
    "consolidation": "Consolidation",
    "edema": "Edema",
    "atelectasis": "Atelectasis",
    "nodule": "Lung Lesion",
    "device": "Support Devices",
}

METADATA = (
    "dicom_id",
    "subject_id",
    "study_id",
    "PerformedProcedureStepDescription",
    "ViewPosition",
    "Rows",
    "Columns",
    "StudyDate",
    "StudyTime",
    "ProcedureCodeSequence_CodeMeaning",
    "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)

_WRAP = textwrap.TextWrapper(LINE - 1, break_on_hyphens=False, break_long_words=False)
_VIEW_MEANING = {"PA": "postero-anterior", "AP": "antero-posterior"}
Row = dict[str, Any]


def study_folder(root: Path, study: PhantomStudy) -> Path:
    """``root/files/p10/p10000032/s50414267``; the report is next to it with ``.txt``."""
    return root / "files" / study.patient_id[:3] / study.patient_id / study.study_id


def report_file(report: str, d: Draws) -> str:
    """The report in the layout of MIMIC-CXR: a centered title, one space before every line, at most 79 characters."""
    lines = [" " * 33 + "FINAL REPORT"]
    roomy = d.chance(0.3)  # some put the heading on a line of its own
    for paragraph in report.split("\n\n"):
        if roomy:
            paragraph = re.sub(r"^(FINDINGS|IMPRESSION):  (?=\S)", r"\1: \n\n", paragraph)
        for line in paragraph.split("\n"):
            lines += [line] if line.endswith(": ") else _WRAP.wrap(line) or [""]
        lines.append("")
    head, *rest = lines
    return "\n".join([head, *(" " + line for line in rest)]) + "\n"


def write_tables(corpus: PhantomCorpus, folder: Path, films: list[Row]) -> None:
    """Metadata and split, one row per film; CheXpert and NegBio labels, one row per study."""
    studies = [corpus.study(i) for i in range(corpus.studies)]
    splits = [
        {**_ids(studies[f["index"]]), "dicom_id": f["dicom_id"], "split": SPLITS[studies[f["index"]].split]}
        for f in films
    ]
    _write_table(folder, "metadata", METADATA, [_metadata(corpus, studies[f["index"]], f) for f in films])
    _write_table(folder, "split", ("dicom_id", "study_id", "subject_id", "split"), splits)
    chexpert = [{**_ids(study), **chexpert_labels(study)} for study in studies]
    negbio = [{name: value for name, value in row.items() if value != -1.0} for row in chexpert]
    _write_table(folder, "chexpert", ("subject_id", "study_id", *CHEXPERT), chexpert)
    _write_table(folder, "negbio", ("subject_id", "study_id", *CHEXPERT), negbio)


def chexpert_labels(study: PhantomStudy) -> dict[str, float]:
    """Labels as a labeler would extract them: 1 present, 0 denied, -1 uncertain; labels not mentioned are missing."""
    labels: dict[str, float] = {}
    for name, label in LABEL_OF.items():
        if study.labels[name]:
            labels[label] = 1.0
        elif any(phrase in study.report for phrase in phrases.ABSENT.get(name, ())):
            labels[label] = 0.0
    if "Cardiomegaly" not in labels and any(phrase in study.report for phrase in phrases.HEART_NORMAL):
        labels["Cardiomegaly"] = 0.0
    if study.labels["consolidation"]:
        labels["Lung Opacity"] = 1.0
        hedged = re.search(r"likely pneumonia|concerning for pneumonia", study.report)
        if hedged or "pneumonia." in study.report:
            labels["Pneumonia"] = -1.0 if hedged else 1.0
    if re.search("rib (fractures|deformities)", study.report):
        labels["Fracture"] = 1.0
    if not any(value for name, value in study.labels.items() if name != "device"):
        labels["No Finding"] = 1.0
    return labels


def _ids(study: PhantomStudy) -> Row:
    """Ids of subject and study without their letters, as in the tables."""
    return {"subject_id": study.patient_id[1:], "study_id": study.study_id[1:]}


def _metadata(corpus: PhantomCorpus, study: PhantomStudy, film: Row) -> Row:
    """The row of one film; dates of a patient are shifted far into the future and keep their order."""
    d = Draws(study.patient.key, "dates")
    day = date(2110, 1, 1) + timedelta(days=d.integer(30000) + 40 * (film["index"] % BLOCK))
    clock = Draws(study.study_id, "clock")
    return {
        **_ids(study),
        "dicom_id": film["dicom_id"],
        "PerformedProcedureStepDescription": "CHEST (PORTABLE AP)" if film["view"] == "AP" else "CHEST (PA)",
        "ViewPosition": film["view"],
        "Rows": corpus.height,
        "Columns": corpus.width,
        "StudyDate": day.strftime("%Y%m%d"),
        "StudyTime": f"{clock.integer(24):02d}{clock.integer(60):02d}{clock.integer(60):02d}.{clock.integer(1000):03d}",
        "ProcedureCodeSequence_CodeMeaning": "CHEST (PORTABLE AP)" if film["view"] == "AP" else "CHEST (PA)",
        "ViewCodeSequence_CodeMeaning": _VIEW_MEANING[film["view"]],
        "PatientOrientationCodeSequence_CodeMeaning": "Recumbent" if film["view"] == "AP" else "Erect",
    }


def _write_table(folder: Path, name: str, columns: tuple[str, ...], rows: list[Row]) -> None:
    """``mimic-cxr-2.0.0-NAME.csv.gz``, without a time stamp, so that equal tables are equal bytes."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    packed = gzip.compress(text.getvalue().encode(), mtime=0)
    (folder / f"mimic-cxr-2.0.0-{name}.csv.gz").write_bytes(packed)


JPEG_QUALITY = 95
StudyWriter = Callable[[PhantomCorpus, Path, int], list[Row]]


def write_pairs_csv(corpus: PhantomCorpus, folder: str | Path, workers: int = 1) -> Path:
    """Write ``folder/pairs.csv``, one row per film, with the films in ``folder/images``; returns the table's path."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    table = folder / "pairs.csv"
    columns = ["image", "report", "patient", "group", "study", "split", "view", *FINDINGS]
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_each_study(_write_pairs, corpus, folder, workers))
    return table


def write_mimic_cxr_jpg(corpus: PhantomCorpus, folder: str | Path, workers: int = 1) -> Path:
    """Write ``folder`` in the layout of MIMIC-CXR-JPG: JPEGs, reports and the four gzip tables."""
    return _write_mimic(_write_jpg_study, corpus, Path(folder), workers)


def write_mimic_cxr(corpus: PhantomCorpus, folder: str | Path, workers: int = 1) -> Path:
    """Write ``folder`` in the layout of MIMIC-CXR: 12-bit DICOM films, reports and the same tables."""
    return _write_mimic(_write_dicom_study, corpus, Path(folder), workers)


def _write_mimic(write_study: StudyWriter, corpus: PhantomCorpus, folder: Path, workers: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(corpus, folder, list(_each_study(write_study, corpus, folder, workers)))
    return folder


def _each_study(write_study: StudyWriter, corpus: PhantomCorpus, folder: Path, workers: int) -> Iterator[Row]:
    """Write the files of every study, and yield its rows in order."""
    work = partial(write_study, corpus, folder)
    if workers <= 1:
        for i in range(corpus.studies):
            yield from work(i)
        return
    # spawn: a fork of a process with threads (torch, gRPC, OpenCV) may hang
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _single_thread) as pool:
        for rows in pool.map(work, range(corpus.studies), chunksize=max(1, min(64, corpus.studies // (4 * workers)))):
            yield from rows


def _single_thread() -> None:
    """Limit OpenCV to one thread in each worker."""
    import cv2

    cv2.setNumThreads(1)


def _write_pairs(corpus: PhantomCorpus, folder: Path, i: int) -> list[Row]:
    """The rows of study ``i``; its films are PNG or JPEG at random."""
    study = corpus.study(i)
    rows = []
    for film, shot in enumerate(study.films):
        suffix = Draws(corpus.seed, i, film, "file").choice(("png", "jpg"))
        name = f"images/{shot.image_id}.{suffix}"
        _save(corpus.render(i, film), folder / name)
        row = {"image": name, "report": study.report, "patient": study.patient_id, "group": study.patient_id}
        row |= {"study": study.study_id, "split": study.split, "view": shot.view}
        rows.append(row | {label: int(study.labels[label]) for label in FINDINGS})
    return rows


def _write_jpg_study(corpus: PhantomCorpus, folder: Path, i: int) -> list[Row]:
    study = corpus.study(i)
    target = _write_report(study, folder, corpus.seed, i)
    for film, shot in enumerate(study.films):
        _save(corpus.render(i, film), target / f"{shot.image_id}.jpg")
    return _film_rows(study, i)


def _write_dicom_study(corpus: PhantomCorpus, folder: Path, i: int) -> list[Row]:
    study = corpus.study(i)
    target = _write_report(study, folder, corpus.seed, i)
    for film, shot in enumerate(study.films):
        stored, photometric, window = twelve_bit(corpus.render(i, film), Draws(corpus.seed, i, film, "dicom"))
        write_dicom(
            target / f"{shot.image_id}.dcm",
            stored,
            photometric=photometric,
            window=window,
            patient_id=study.patient_id[1:],
            study_id=study.study_id[1:],
            image_id=shot.image_id,
            view=shot.view,
        )
    return _film_rows(study, i)


def twelve_bit(grey: npt.NDArray[np.uint8], d: Draws) -> tuple[npt.NDArray[np.uint16], str, tuple[float, float]]:
    """Stored values, photometric interpretation and (center, width) that give ``grey`` after windowing."""
    low, span = 16 * d.integer(40), 2400 + 16 * d.integer(60)
    shown = low + np.rint(grey.astype(np.float64) * (span / 255)).astype(np.uint16)
    # DICOM PS3.3 C.11.2.1.2: the window runs from center - 0.5 - (width - 1) / 2 to center - 0.5 + (width - 1) / 2
    if d.chance(0.75):
        return shown.astype(np.uint16), "MONOCHROME2", (low + span / 2 + 0.5, span + 1.0)
    return (4095 - shown).astype(np.uint16), "MONOCHROME1", (4095 - low - span / 2 + 0.5, span + 1.0)


def _write_report(study: PhantomStudy, folder: Path, *key: object) -> Path:
    """The study's folder, created, with the report next to it."""
    target = study_folder(folder, study)
    target.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".txt").write_text(report_file(study.report, Draws(*key, "report file")), encoding="utf-8")
    return target


def _film_rows(study: PhantomStudy, i: int) -> list[Row]:
    """The rows of the study's films for the tables."""
    return [{"index": i, "dicom_id": shot.image_id, "view": shot.view} for shot in study.films]


def _save(pixels: npt.NDArray[np.uint8], path: Path) -> None:
    """Write an 8-bit grey image as PNG or JPEG, by its name."""
    if path.suffix == ".png":
        Image.fromarray(pixels).save(path, compress_level=6)
    else:
        Image.fromarray(pixels).save(path, quality=JPEG_QUALITY)
