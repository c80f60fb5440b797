"""Published collections of films in tables: PadChest, CheXpert Plus, Open-I as tables, BRAX, VinDr-CXR, by their official names.

File and column names: bimcv.cipf.es/bimcv-projects/padchest, aimi.stanford.edu/datasets/chexpert-plus,
kaggle.com/datasets/raddar/chest-xrays-indiana-university, physionet.org/content/brax/1.1.0 and
physionet.org/content/vindr-cxr/1.0.0.
"""

import ast
import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cmcgns import storage
from cmcgns.data.readers.base import PROBED, SPLIT_NAMES, CorpusOptions, FileSource, draw_splits, filter_views
from cmcgns.data.record import StudyIndex, index_of_films
from cmcgns.data.tables import read_columns, with_points
from cmcgns.data.text import decode_text
from cmcgns.errors import UserError

LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
"""The labels of CheXpert, which BRAX and CheXpert Plus use."""


@dataclass(frozen=True)
class PublishedSource(FileSource):
    """One collection; ``format`` is its name in ``LAYOUTS``."""

    reports: bool = True
    """Films have reports; otherwise none is looked for."""

    def index(self) -> StudyIndex:
        layout = LAYOUTS[self.format]
        if self.reports and not layout.has_reports:
            raise UserError(
                f"{self.uri}: {layout.name} is published without reports; for films alone set data.reports=false"
            )
        films, labels = layout.read(self)
        bad_rows = []
        if self.reports:
            films["report"] = _one_report(films)
            blank = films["report"] == ""
            without = films[blank].drop_duplicates("study_id")  # the films of a study have the same report
            bad_rows = [{"source": path, "reason": "row has no report"} for path in without["path"]]
            films = films[~blank]
        else:
            films["report"] = None
        films, filtered = filter_views(films, self.views)
        split = films["split"].str.lower().map(SPLIT_NAMES)
        of_patient = split.groupby(films["group"]).transform("first")
        films = films.assign(split=draw_splits(self.seed, films["group"], of_patient))
        return StudyIndex(table=index_of_films(films, labels), filtered=filtered, bad_rows=bad_rows)

    def table(self, name: str, columns: Sequence[str]) -> pd.DataFrame:
        """The table ``name`` as stripped strings, with all of ``columns``."""
        return read_columns(storage.join(self.uri, name), columns, LAYOUTS[self.format].name)

    def main_table(self, columns: Sequence[str]) -> pd.DataFrame:
        """The table that names the films."""
        layout = LAYOUTS[self.format]
        names = fnmatch.filter(storage.list_files(self.uri, recursive=False), layout.tables)
        if not names:
            raise UserError(
                f"{self.uri} has no {layout.tables}, which {layout.name} needs; give the folder that contains it"
            )
        return self.table(max(names), columns)

    def placed(self, places: Iterable[pd.Series]) -> pd.Series:
        """Paths of the films: the first of ``places`` at which there are any."""
        tried = []
        for paths in places:
            if any(path and storage.exists(storage.join(self.uri, path)) for path in paths.iloc[:PROBED]):
                return paths
            tried += [path for path in paths.iloc[:1] if path]
        raise UserError(
            f"{self.uri} has none of the first {PROBED} films of its table, tried as {', '.join(tried)}; unpack the films there"
        )


def _one_report(films: pd.DataFrame) -> pd.Series:
    """Each film's report; if the films of a study have different ones, all of them."""
    reports = films["report"]
    of_study = reports.groupby(films["study_id"])
    several = of_study.transform("nunique") > 1
    if several.any():
        joined = {
            study: "\n\n".join(dict.fromkeys(filter(None, each))) for study, each in of_study if each.nunique() > 1
        }
        reports = reports.where(~several, films["study_id"].map(joined))
    return reports


def _numbers(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    return with_points(table[list(names)]).apply(pd.to_numeric, errors="coerce").astype(np.float32)


# --- PadChest ---

PADCHEST = ("ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Report", "Labels")


def _padchest(source: PublishedSource) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``0/216840...png``: 16-bit PNGs in a folder per archive, Spanish reports, findings as a list in each cell."""
    table = source.main_table(PADCHEST)
    image, folder = table["ImageID"], table["ImageDir"]
    films = pd.DataFrame(
        {
            "image_id": image,
            "path": source.placed([folder + "/" + image, "images/" + folder + "/" + image, "images/" + image, image]),
            "view": table["Projection"],
            "study_id": table["StudyID"],
            "patient_id": table["PatientID"],
            "group": table["PatientID"],
            "split": "",
            "report": table["Report"],
        }
    )
    return films, _listed(table["Labels"], _literal)


def _listed(cells: pd.Series, parse: Callable[[str], list[str] | None]) -> pd.DataFrame:
    """A column per entry of the lists that ``parse`` reads from ``cells``: 1 or 0; NaN where there is no list."""
    lists = {cell: parse(cell) for cell in cells.unique()}
    names = sorted({name for entries in lists.values() for name in entries or ()})
    place = {name: number for number, name in enumerate(names)}
    values = np.zeros((len(cells), len(names)), np.float32)
    for row, cell in enumerate(cells):
        entries = lists[cell]
        values[row, [place[name] for name in entries or ()]] = 1
        if entries is None:
            values[row] = np.nan
    return pd.DataFrame(values, columns=names, index=cells.index)


def _literal(cell: str) -> list[str] | None:
    """The entries of a list like ``['normal', 'nodule']``."""
    try:
        listed = ast.literal_eval(cell.strip() or "None")
    except (ValueError, SyntaxError):
        return None
    return [str(each).strip() for each in listed if str(each).strip()] if isinstance(listed, list) else None


# --- CheXpert Plus ---

SECTIONS = (
    "narrative", "clinical_history", "history", "comparison", "technique", "procedure_comments", "findings", "impression",
    "end_of_impression", "summary",
)  # fmt: skip
CHEXPERT_PLUS = ("path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id", "report", "split")
CHEXBERT = "chexbert_labels"


def _chexpert_plus(source: PublishedSource) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """``PNG/train/patient.../study1/view1_frontal.png``, or DICOM; reports whole, or put together from their sections."""
    table = source.main_table(CHEXPERT_PLUS)
    path, dicom = table["path_to_image"], table["path_to_dcm"]
    png = path.str.replace(r"\.jpe?g$", ".png", regex=True)
    pictures = [folder + each for folder in ("PNG/", "PNG/PNG/", "PNGs/", "") for each in (png, path)]
    dicoms = [dicom.where(dicom == "", folder + dicom) for folder in ("DICOM/", "DICOM/DICOM/", "")]
    study = path.str.extract(r"(patient\d+/study\d+)/", expand=False).fillna(path)
    headers = {f"section_{name}": name.upper().replace("_", " ") for name in SECTIONS}
    films = pd.DataFrame(
        {
            "image_id": path,
            "path": source.placed([*pictures, *dicoms]),
            "view": table["ap_pa"].where(table["frontal_lateral"] == "Frontal", table["frontal_lateral"].str.upper()),
            "study_id": study,
            "patient_id": table["deid_patient_id"],
            "group": table["deid_patient_id"],
            "split": table["split"],
            "report": table["report"].where(table["report"] != "", _from_sections(table, headers)),
        }
    )
    return films, _chexbert(source, path)


def _from_sections(table: pd.DataFrame, headers: Mapping[str, str]) -> pd.Series:
    """The report of each row whose sections are in columns of their own; ``headers`` by column."""
    reports = pd.Series("", index=table.index)
    for column, header in headers.items():
        if column in table.columns:
            text = f"{header}:\n" + table[column] + "\n\n"
            reports = reports + text.where(table[column] != "", "")
    return reports.str.strip()


def _chexbert(source: PublishedSource, path: pd.Series) -> pd.DataFrame | None:
    """Labels of the impression, otherwise of the findings, if they were downloaded: a line of JSON per film."""
    if CHEXBERT not in storage.list_folders(source.uri):
        return None
    files = storage.list_files(storage.join(source.uri, CHEXBERT), recursive=False)
    name = next((name for name in ("impression_fixed.json", "findings_fixed.json") if name in files), None)
    if name is None:
        return None
    uri = storage.join(source.uri, f"{CHEXBERT}/{name}")
    try:
        lines = [json.loads(line) for line in decode_text(storage.read_bytes(uri)).splitlines() if line.strip()]
        labels = pd.DataFrame(lines).drop_duplicates("path_to_image").set_index("path_to_image")
    except (ValueError, KeyError):
        raise UserError(f"{uri} has no JSON with path_to_image in each line; download it again, or remove it") from None
    names = [name for name in LABELS if name in labels.columns]
    return _numbers(labels, names).reindex(path).set_axis(path.index)


# --- Open-I as tables ---

OPEN_I_FILMS, OPEN_I_REPORTS = "indiana_projections.csv", "indiana_reports.csv"
OPEN_I_SECTIONS = ("comparison", "indication", "findings", "impression")
NOT_INDEXED = "No Indexing"
"""Stands for the problems of a report that nobody has listed."""


def _open_i(source: PublishedSource) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``images/images_normalized/1_IM-0001-4001.dcm.png``: reports in sections, problems as labels; it names no patients."""
    films = source.main_table(("uid", "filename", "projection"))
    reports = source.table(OPEN_I_REPORTS, ("uid", "Problems", *OPEN_I_SECTIONS)).set_index("uid")
    if not reports.index.is_unique:
        repeated = reports.index[reports.index.duplicated()][0]
        raise UserError(
            f"{source.uri}/{OPEN_I_REPORTS}: uid {repeated} appears twice; download the published file again"
        )
    of_film = reports.reindex(films["uid"], fill_value="").set_axis(films.index)
    empty = (of_film[["findings", "impression"]] == "").all(axis=1)
    image = films["filename"]
    places = [folder + image for folder in ("images/images_normalized/", "images_normalized/", "images/", "")]
    films = pd.DataFrame(
        {
            "image_id": image,
            "path": source.placed(places),
            "view": films["projection"],
            "study_id": films["uid"],
            "patient_id": films["uid"],
            "group": films["uid"],
            "split": "",
            "report": _from_sections(of_film, {name: name.upper() for name in OPEN_I_SECTIONS}).where(~empty, ""),
        }
    )
    return films, _listed(of_film["Problems"], _problems)


def _problems(cell: str) -> list[str] | None:
    """The entries of a cell like ``Cardiomegaly;Pulmonary Artery``."""
    entries = [each.strip() for each in cell.split(";") if each.strip()]
    return None if NOT_INDEXED in entries else entries or None


# --- BRAX ---

BRAX = ("PngPath", "DicomPath", "PatientID", "ViewPosition", *LABELS)


def _brax(source: PublishedSource) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``images/id_.../Study_.../Series_.../image-....png``, or ``Anonymized_DICOMs/``; labels, without the reports."""
    table = source.main_table(BRAX)
    path = source.placed([table["PngPath"], table["DicomPath"]])
    study = path.str.extract(r"(Study_[^/]+)/", expand=False).fillna(path)
    films = pd.DataFrame(
        {
            "image_id": path.str.rpartition("/")[2].str.rpartition(".")[0],
            "path": path,
            "view": table["ViewPosition"],
            "study_id": study,
            "patient_id": table["PatientID"],
            "group": table["PatientID"],
            "split": "",
        }
    )
    return films, _numbers(table, LABELS)


# --- VinDr-CXR ---

VINDR_FOLDER, VINDR_IDS = "annotations", ("image_id", "rad_id")
VINDR_PARTS = ("train", "test")
VINBIGDATA = "train.csv"
"""The only table of VinBigData, the part of VinDr-CXR at Kaggle: its test films have no labels."""
VINBIGDATA_COLUMNS = ("image_id", "class_name", "rad_id", "x_min", "y_min", "x_max", "y_max")


def _vindr(source: PublishedSource) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``train/IMAGE.dicom``: a film per patient; a label is that of most of its three readers."""
    if is_vinbigdata(source.uri, storage.list_files(source.uri, recursive=False)):
        listed = source.table(VINBIGDATA, VINBIGDATA_COLUMNS)
        parts = [vindr_labels(labels_of_readers(listed)).assign(part="train", split="")]
    else:
        tables = {part: source.table(f"{VINDR_FOLDER}/image_labels_{part}.csv", ("image_id",)) for part in VINDR_PARTS}
        parts = [vindr_labels(table).assign(part=part, split=part) for part, table in tables.items()]
    table = pd.concat(parts).rename_axis("image_id").reset_index()
    image = table["part"] + "/" + table["image_id"]
    films = pd.DataFrame(
        {
            "image_id": table["image_id"],
            "path": source.placed([image + ending for ending in (".dicom", ".dcm", ".png", ".jpg")]),
            "view": "PA",  # the collection has no other
            "study_id": table["image_id"],
            "patient_id": table["image_id"],
            "group": table["image_id"],
            "split": table["split"],
        }
    )
    return films, table.drop(columns=["image_id", "part", "split"]).astype(np.float32)


def is_vinbigdata(uri: str, names: Sequence[str]) -> bool:
    """Whether the folder ``uri``, whose files have these ``names``, is VinBigData; other sets have a ``train.csv``, too."""
    if VINBIGDATA not in names or VINDR_FOLDER in storage.list_folders(uri):
        return False
    head = storage.read(storage.join(uri, VINBIGDATA), lambda file: file.read(256)).split(b"\n")[0]
    return all(name.encode() in head for name in VINBIGDATA_COLUMNS)


def labels_of_readers(boxes: pd.DataFrame) -> pd.DataFrame:
    """A row per image and reader with a column per class, 1 if the reader gave it any row, in the order of the images."""
    ids = list(VINDR_IDS)
    seen = pd.crosstab([boxes[name] for name in ids], boxes["class_name"]).clip(upper=1).rename_axis(columns=None)
    return boxes[ids].drop_duplicates().merge(seen.reset_index(), on=ids)


def vindr_labels(table: pd.DataFrame) -> pd.DataFrame:
    """1 or 0 of each image, by ``image_id``: what most of its readers gave, or the consensus of the test part."""
    # the tables of the two parts differ in this name
    table = table.rename(columns={"Other disease": "Other diseases"})
    names = [name for name in table.columns if name not in VINDR_IDS]
    votes = _numbers(table, names).groupby(table["image_id"], sort=False).mean()
    return (votes > 0.5).astype(np.float32)


# --- all ---


@dataclass(frozen=True)
class Layout:
    """A collection as it is published."""

    name: str
    tables: str
    """Pattern of the table by which it is known."""
    read: Callable[[PublishedSource], tuple[pd.DataFrame, pd.DataFrame | None]]
    """A row per film, and its labels."""
    has_reports: bool = True


LAYOUTS = {
    "padchest": Layout("PadChest", "PADCHEST_chest_x_ray_images_labels_160K*.csv*", _padchest),
    "chexpert-plus": Layout("CheXpert Plus", "df_chexpert_plus_*.csv*", _chexpert_plus),
    "open-i-csv": Layout("Open-I", f"{OPEN_I_FILMS}*", _open_i),
    "brax": Layout("BRAX", "master_spreadsheet*.csv*", _brax, has_reports=False),
    "vindr-cxr": Layout("VinDr-CXR", "", _vindr, has_reports=False),
}


def published_format(uri: str, names: Sequence[str]) -> str | None:
    """The collection in the folder ``uri``, whose files have these ``names``; None if it is none of them."""
    for key, layout in LAYOUTS.items():
        if layout.tables and fnmatch.filter(names, layout.tables):
            return key
    if VINDR_FOLDER in storage.list_folders(uri):
        inside = storage.list_files(storage.join(uri, VINDR_FOLDER), recursive=False)
        return "vindr-cxr" if "image_labels_train.csv" in inside else None
    return "vindr-cxr" if is_vinbigdata(uri, names) else None


def open_corpus(options: CorpusOptions) -> PublishedSource:
    """The reader of the collections in ``LAYOUTS``."""
    return PublishedSource(*options.of_files, options.reports)
