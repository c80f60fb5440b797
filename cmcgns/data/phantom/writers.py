"""The corpus on disk: as ``pairs-csv``, as MIMIC-CXR-JPG and as MIMIC-CXR DICOM.

Studies are written by as many processes as asked for; the bytes do not depend on how many.
"""

import csv
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cmcgns.data.phantom.corpus import PhantomCorpus, PhantomStudy
from cmcgns.data.phantom.dicom_file import write_dicom
from cmcgns.data.phantom.draws import Draws
from cmcgns.data.phantom.findings import FINDINGS
from cmcgns.data.phantom.mimic import report_file, study_folder, write_tables

JPEG_QUALITY = 95
Row = dict[str, Any]
StudyWriter = Callable[[PhantomCorpus, Path, int], list[Row]]


def write_pairs_csv(corpus: PhantomCorpus, folder: str | Path, workers: int = 1) -> Path:
    """``folder/pairs.csv``, one row a film, with the films under ``folder/images``."""
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
    """``folder`` laid out as MIMIC-CXR-JPG: JPEGs, reports and the four gzip tables."""
    return _write_mimic(_write_jpg_study, corpus, Path(folder), workers)


def write_mimic_cxr(corpus: PhantomCorpus, folder: str | Path, workers: int = 1) -> Path:
    """``folder`` laid out as MIMIC-CXR: 12-bit DICOM films, reports and the same tables."""
    return _write_mimic(_write_dicom_study, corpus, Path(folder), workers)


def _write_mimic(write_study: StudyWriter, corpus: PhantomCorpus, folder: Path, workers: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(corpus, folder, list(_each_study(write_study, corpus, folder, workers)))
    return folder


def _each_study(write_study: StudyWriter, corpus: PhantomCorpus, folder: Path, workers: int) -> Iterator[Row]:
    """The rows of every study in order, its files being written meanwhile."""
    work = partial(write_study, corpus, folder)
    if workers <= 1:
        for i in range(corpus.studies):
            yield from work(i)
        return
    # spawn: a fork of a process that holds threads (torch, gRPC, OpenCV) may hang
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _single_thread) as pool:
        for rows in pool.map(work, range(corpus.studies), chunksize=max(1, min(64, corpus.studies // (4 * workers)))):
            yield from rows


def _single_thread() -> None:
    """Keep OpenCV to one thread in each worker."""
    import cv2

    cv2.setNumThreads(1)


def _write_pairs(corpus: PhantomCorpus, folder: Path, i: int) -> list[Row]:
    """The rows of study ``i``; its films are PNG or JPEG, as drawn."""
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
    place = _write_report(study, folder, corpus.seed, i)
    for film, shot in enumerate(study.films):
        _save(corpus.render(i, film), place / f"{shot.image_id}.jpg")
    return _film_rows(study, i)


def _write_dicom_study(corpus: PhantomCorpus, folder: Path, i: int) -> list[Row]:
    study = corpus.study(i)
    place = _write_report(study, folder, corpus.seed, i)
    for film, shot in enumerate(study.films):
        stored, photometric, window = twelve_bit(corpus.render(i, film), Draws(corpus.seed, i, film, "dicom"))
        write_dicom(
            place / f"{shot.image_id}.dcm",
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
    """Stored values, photometric interpretation and (center, width) that show as ``grey`` when windowed."""
    low, span = 16 * d.integer(40), 2400 + 16 * d.integer(60)
    shown = low + np.rint(grey.astype(np.float64) * (span / 255)).astype(np.uint16)
    # DICOM PS3.3 C.11.2.1.2: the window runs from center - 0.5 - (width - 1) / 2 to center - 0.5 + (width - 1) / 2
    if d.chance(0.75):
        return shown.astype(np.uint16), "MONOCHROME2", (low + span / 2 + 0.5, span + 1.0)
    return (4095 - shown).astype(np.uint16), "MONOCHROME1", (4095 - low - span / 2 + 0.5, span + 1.0)


def _write_report(study: PhantomStudy, folder: Path, *key: object) -> Path:
    """The study's folder, made, with the report beside it."""
    place = study_folder(folder, study)
    place.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".txt").write_text(report_file(study.report, Draws(*key, "report file")), encoding="utf-8")
    return place


def _film_rows(study: PhantomStudy, i: int) -> list[Row]:
    """What the tables need to know of each film."""
    return [{"index": i, "dicom_id": shot.image_id, "view": shot.view} for shot in study.films]


def _save(pixels: npt.NDArray[np.uint8], path: Path) -> None:
    """Write an 8-bit grey image in the format its name asks for."""
    if path.suffix == ".png":
        Image.fromarray(pixels).save(path, compress_level=6)
    else:
        Image.fromarray(pixels).save(path, quality=JPEG_QUALITY)
