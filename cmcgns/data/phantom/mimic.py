"""MIMIC-CXR's layout: its folders, its report files and its four gzip tables."""

import csv
import gzip
import io
import re
import textwrap
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from cmcgns.data.phantom import phrases
from cmcgns.data.phantom.corpus import BLOCK, PhantomCorpus, PhantomStudy
from cmcgns.data.phantom.draws import Draws

LINE = 79
"""No line of a report file is longer."""
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
    """``root/files/p10/p10000032/s50414267``; the report lies beside it with ``.txt``."""
    return root / "files" / study.patient_id[:3] / study.patient_id / study.study_id


def report_file(report: str, d: Draws) -> str:
    """The report as MIMIC-CXR prints it: a centered head, one space before every line, 79 characters at most."""
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
    """Metadata and split, one row a film; CheXpert's and NegBio's labels, one row a study."""
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
    """What a labeler reads in the report: 1 present, 0 denied, -1 uncertain; what is not mentioned is left out."""
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
    """Subject and study as the tables write them, without their letters."""
    return {"subject_id": study.patient_id[1:], "study_id": study.study_id[1:]}


def _metadata(corpus: PhantomCorpus, study: PhantomStudy, film: Row) -> Row:
    """One film's row; a patient's dates are shifted far into the future and keep their order."""
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
