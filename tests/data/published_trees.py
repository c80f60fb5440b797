"""The phantom written in the layouts of published collections, with their official file and column names."""

import csv
import gzip
import io
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cmcgns.phantom import FilmTruth, PhantomCorpus, PhantomStudy
from cmcgns.phantom.canvas import Draws
from cmcgns.phantom.writers import LABEL_OF, twelve_bit, write_dicom

CORPUS = PhantomCorpus(30, seed=5, height=96, width=80)
CHEXPERT = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip


class Shot(NamedTuple):
    """One film of the phantom and what its collection should give back."""

    number: int
    film: int
    study: PhantomStudy

    @property
    def image_id(self) -> str:
        return self.study.films[self.film].image_id

    @property
    def view(self) -> str:
        return self.study.films[self.film].view

    @property
    def labels(self) -> dict[str, float]:
        return {LABEL_OF[name]: float(value) for name, value in self.study.labels.items()}

    def grey(self) -> np.ndarray:
        return rendered(self.number, self.film)


@cache
def rendered(number: int, film: int) -> np.ndarray:
    return CORPUS.render(number, film)


@cache
def truth(number: int, film: int) -> FilmTruth:
    return CORPUS.truth(number, film)


def shots() -> list[Shot]:
    """Every film, study by study."""
    studies = [CORPUS.study(number) for number in range(CORPUS.studies)]
    return [Shot(number, film, study) for number, study in enumerate(studies) for film in range(len(study.films))]


def write_table(path: Path, columns: list[str], lines: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def save(shot: Shot, path: Path, deep: bool = False) -> None:
    """The film as PNG of 8 or 16 bits or as DICOM, by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        grey = shot.grey()
        Image.fromarray(grey.astype(np.uint16) * 16 if deep else grey).save(path)
        return
    pixels, photometric, window = twelve_bit(shot.grey(), Draws("dicom", shot.image_id))
    ids = {
        "patient_id": shot.study.patient_id,
        "study_id": shot.study.study_id,
        "image_id": shot.image_id,
        "view": shot.view,
    }
    write_dicom(path, pixels, photometric=photometric, window=window, **ids)


PADCHEST = [
    "", "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM",
    "ViewPosition_DICOM", "Projection", "MethodProjection", "Pediatric", "Modality_DICOM", "Manufacturer_DICOM",
    "PhotometricInterpretation_DICOM", "PixelRepresentation_DICOM", "PixelAspectRatio_DICOM", "SpatialResolution_DICOM",
    "BitsStored_DICOM", "WindowCenter_DICOM", "WindowWidth_DICOM", "Rows_DICOM", "Columns_DICOM", "XRayTubeCurrent_DICOM",
    "Exposure_DICOM", "ExposureInuAs_DICOM", "ExposureTime", "RelativeXRayExposure_DICOM", "ReportID", "Report", "MethodLabel",
    "Labels", "Localizations", "LabelsLocalizationsBySentence", "labelCUIS", "LocalizationsCUIS",
]  # fmt: skip
SPANISH = "sin hallazgos patológicos . señal {} de la silueta cardíaca . pequeño derrame pleural izquierdo ."


def write_padchest(folder: Path, where: str = "{0}/") -> None:
    """PadChest: 16-bit PNGs in a folder per archive, Spanish reports, lists of findings."""
    lines = []
    for shot in shots():
        name, archive = f"{shot.image_id}.png", shot.number % 3
        save(shot, folder / where.format(archive) / name, deep=True)
        found = [label for label, value in shot.labels.items() if value] or ["normal"]
        lines.append(
            {"ImageID": name, "ImageDir": archive, "StudyID": shot.study.study_id, "PatientID": shot.study.patient_id}
            | {"Projection": shot.view, "Report": SPANISH.format(shot.number), "Labels": str(found), "": len(lines)}
        )
    write_table(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", PADCHEST, lines)


SECTIONS = [
    f"section_{name}" for name in (
        "narrative", "clinical_history", "history", "comparison", "technique", "procedure_comments", "findings", "impression",
        "end_of_impression", "summary", "accession_number",
    )
]  # fmt: skip
CHEXPERT_PLUS = [
    "path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id", "patient_report_date_order", "report",
    *SECTIONS, "age", "sex", "race", "ethnicity", "interpreter_needed", "insurance_type", "recent_bmi", "deceased", "split",
]  # fmt: skip
PLUS_REPORT = (
    "NARRATIVE:\nCHEST\n\n{}\n\nEND OF IMPRESSION:\n2-ABNORMAL\n\nSUMMARY: 2-ABNORMAL\n\nACCESSION NUMBER:\n77"
)


def plus_patient(shot: Shot) -> str:
    return f"patient{int(shot.study.patient_id[1:]):05d}"


def write_chexpert_plus(folder: Path, kind: str = "png") -> None:
    """CheXpert Plus as PNG or DICOM; every other report is given in sections only."""
    lines, labels = [], []
    order: dict[str, list[str]] = {}
    for shot in shots():
        patient = plus_patient(shot)
        studies = order.setdefault(patient, [])
        if shot.study.study_id not in studies:
            studies.append(shot.study.study_id)
        part = "valid" if shot.study.split != "train" else "train"
        stem = f"{part}/{patient}/study{studies.index(shot.study.study_id) + 1}/view{shot.film + 1}_frontal"
        save(shot, folder / {"png": f"PNG/{stem}.png", "dcm": f"DICOM/{stem}.dcm"}[kind])
        text = shot.study.report
        own = {"report": PLUS_REPORT.format(text)} if shot.number % 2 else {
            "section_findings": "The lungs of this film are seen.", "section_impression": f"Number {shot.number} is normal.",
        }  # fmt: skip
        lines.append(
            {
                "path_to_image": f"{stem}.jpg",
                "path_to_dcm": f"{stem}.dcm",
                "frontal_lateral": "Frontal",
                "ap_pa": shot.view,
            }
            | {"deid_patient_id": patient, "split": part, **own}
        )
        values = ",".join(f'"{name}": {shot.labels.get(name, "null")}' for name in CHEXPERT)
        labels.append(f'{{"path_to_image": "{stem}.jpg", {values}}}')
    write_table(folder / "df_chexpert_plus_240401.csv", CHEXPERT_PLUS, lines)
    (folder / "chexbert_labels").mkdir()
    (folder / "chexbert_labels" / "impression_fixed.json").write_text("\n".join(labels) + "\n")


def open_i_uid(shot: Shot) -> str:
    return str(shot.number + 1)


def open_i_sections(shot: Shot) -> dict[str, str]:
    """The sections of the report that Open-I has, each in one line."""
    parts = re.split(r"^([A-Z]+): +", shot.study.report, flags=re.M)
    texts = {name.lower(): " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    return {name: texts[name] for name in ("indication", "findings", "impression") if name in texts}


def write_open_i_csv(folder: Path, where: str = "images/images_normalized/") -> None:
    """Open-I as on Kaggle: PNGs, a table of films, a table of reports in sections with their problems; no patients."""
    films, reports = [], {}
    for shot in shots():
        name = f"{open_i_uid(shot)}_IM-{shot.number:04d}-{shot.film + 1}001.dcm.png"
        save(shot, folder / where / name)
        films.append({"uid": open_i_uid(shot), "filename": name, "projection": "Frontal"})
        problems = ";".join(name for name, value in shot.labels.items() if value) or "normal"
        own = {"uid": open_i_uid(shot), "MeSH": "x", "Problems": problems, "image": "Xray Chest PA and Lateral"}
        reports[open_i_uid(shot)] = own | open_i_sections(shot)
    write_table(folder / "indiana_projections.csv", ["uid", "filename", "projection"], films)
    columns = ["uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression"]
    write_table(folder / "indiana_reports.csv", columns, list(reports.values()))


def write_brax(folder: Path, kind: str = "png") -> None:
    """BRAX as PNG or DICOM; it has labels and no reports."""
    lines = []
    for shot in shots():
        place = f"id_{shot.study.patient_id}/Study_{shot.study.study_id}/Series_1/image-{shot.image_id}"
        png, dicom = f"images/{place}.png", f"Anonymized_DICOMs/{place}.dcm"
        save(shot, folder / (png if kind == "png" else dicom))
        lines.append(
            {
                "PngPath": png,
                "DicomPath": dicom,
                "PatientID": shot.study.patient_id,
                "ViewPosition": shot.view,
                **shot.labels,
            }
        )
    columns = [
        "",
        "DicomPath",
        "PngPath",
        "PatientID",
        "PatientSex",
        "PatientAge",
        "StudyDate",
        *CHEXPERT,
        "ViewPosition",
    ]
    write_table(folder / "master_spreadsheet_update.csv", columns, lines)


VINDR = ["Cardiomegaly", "Pleural effusion", "Pneumothorax", "Other diseases", "No finding"]
READERS = ("R8", "R9", "R10")


def vindr_truth(shot: Shot) -> dict[str, int]:
    labels = {"Cardiomegaly": "cardiomegaly", "Pleural effusion": "effusion", "Pneumothorax": "pneumothorax"}
    return {name: int(shot.study.labels[finding]) for name, finding in labels.items()}


def vindr_boxes(shot: Shot) -> list[tuple[str, list[float]]]:
    boxes = truth(shot.number, shot.film).boxes
    return [("Pleural effusion", each) for each in boxes.get("effusion", [])]


def write_vindr(folder: Path) -> None:
    """VinDr-CXR: one film per study, three readers of whom one errs in the train part, a consensus in the test part."""
    labels: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    boxes: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for shot in (shot for shot in shots() if not shot.film):
        part = "test" if shot.study.split == "test" else "train"
        save(shot, folder / part / f"{shot.image_id}.dicom")
        for place, reader in enumerate(READERS if part == "train" else READERS[:1]):
            agreed = vindr_truth(shot)
            seen = {name: 1 - value for name, value in agreed.items()} if place == 2 else agreed
            labels[part].append(
                {"image_id": shot.image_id, "rad_id": reader, **seen, "No finding": int(not any(seen.values()))}
            )
            for name, corners in vindr_boxes(shot):
                corner = dict(zip(("x_min", "y_min", "x_max", "y_max"), corners, strict=True))
                boxes[part].append({"image_id": shot.image_id, "rad_id": reader, "class_name": name, **corner})
            if not vindr_boxes(shot):
                boxes[part].append({"image_id": shot.image_id, "rad_id": reader, "class_name": "No finding"})
    for part, ids in (("train", ["image_id", "rad_id"]), ("test", ["image_id"])):
        names = [name.replace("diseases", "disease") for name in VINDR] if part == "test" else VINDR
        lines = [{name: line.get(name, 0) for name in (*ids, *names)} for line in labels[part]]
        write_table(folder / f"annotations/image_labels_{part}.csv", [*ids, *names], lines)
        columns = [*ids, "class_name", "x_min", "y_min", "x_max", "y_max"]
        write_table(
            folder / f"annotations/annotations_{part}.csv",
            columns,
            [{k: line.get(k, "") for k in columns} for line in boxes[part]],
        )


VINBIGDATA = {"cardiomegaly": "Cardiomegaly", "effusion": "Pleural effusion", "pneumothorax": "Pneumothorax"}
WRONG_BOXES = [[5.0, 7.0, 30.0, 40.0], [8.0, 50.0, 60.0, 70.0]]


def vinbigdata_boxes(shot: Shot, errs: bool = False) -> list[tuple[str, list[float]]]:
    """Class and corners of each box that a reader draws; one who errs sees twice what is not there and nothing else."""
    boxes = truth(shot.number, shot.film).boxes
    if errs:
        return [(name, each) for finding, name in VINBIGDATA.items() if not boxes.get(finding) for each in WRONG_BOXES]
    return [(name, each) for finding, name in VINBIGDATA.items() for each in boxes.get(finding, [])]


def write_vinbigdata(folder: Path) -> None:
    """VinBigData: one film per study, and a table with the boxes of three readers of whom one errs; no labels of test films."""
    lines: list[dict[str, Any]] = []
    for shot in (shot for shot in shots() if not shot.film):
        save(shot, folder / "train" / f"{shot.image_id}.dicom")
        for reader in READERS:
            row = {"image_id": shot.image_id, "rad_id": reader}
            for name, corners in vinbigdata_boxes(shot, errs=reader == READERS[1]):
                corner = dict(zip(("x_min", "y_min", "x_max", "y_max"), corners, strict=True))
                lines.append(row | corner | {"class_name": name, "class_id": list(VINBIGDATA.values()).index(name)})
            if not vinbigdata_boxes(shot, errs=reader == READERS[1]):
                lines.append(row | {"class_name": "No finding", "class_id": 14})
    (folder / "test").mkdir()
    save(shots()[0], folder / "test" / "unlabelled.dicom")
    columns = ["image_id", "class_name", "class_id", "rad_id", "x_min", "y_min", "x_max", "y_max"]
    # the published table is in no order
    write_table(folder / "train.csv", columns, lines[::2] + lines[1::2])


WRITERS: dict[str, Callable[[Path], None]] = {
    "padchest": write_padchest,
    "chexpert-plus": write_chexpert_plus,
    "open-i-csv": write_open_i_csv,
    "brax": write_brax,
    "vindr-cxr": write_vindr,
}
