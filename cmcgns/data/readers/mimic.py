"""``mimic-cxr-jpg`` and ``mimic-cxr``: folders of MIMIC-CXR, as JPEG with tables or as DICOM with or without tables."""

import fnmatch
import logging
import re
from dataclasses import dataclass

import pandas as pd

from cmcgns import storage
from cmcgns.data.readers.base import SPLIT_NAMES, CorpusOptions, FileSource, draw_splits, filter_views
from cmcgns.data.record import StudyIndex, index_of_films
from cmcgns.data.tables import read_table, with_points
from cmcgns.errors import UserError

log = logging.getLogger(__name__)
SUFFIX = {"mimic-cxr-jpg": ".jpg", "mimic-cxr": ".dcm"}
REPORT_FOLDERS = ("mimic-cxr-reports", "reports")
IDS = ("dicom_id", "subject_id", "study_id")
RECORD_LIST = "cxr-record-list.csv*"
CHALLENGE = "cxr-lt-20[0-9][0-9]"
"""Folder of a release of CXR-LT (physionet.org/content/cxr-lt-iccv-workshop-cvamd); the newest is used."""
CHALLENGE_TABLES = {
    "train": ("train_labeled.csv*", "train.csv*"),
    "valid": ("development_labeled_task1.csv*", "development.csv*"),
    "test": ("test_labeled_task1.csv*", "test.csv*"),
}
NO_LABELS = frozenset([*IDS, "ViewPosition", "ViewCodeSequence_CodeMeaning", "path", "fpath", "split"])
SPLIT_ORDER = {"train": 0, "valid": 1, "test": 2}


@dataclass(frozen=True)
class MimicSource(FileSource):
    """``files/p10/p10000032/s50414267/<dicom_id>.jpg|.dcm`` next to ``s50414267.txt``."""

    def index(self) -> StudyIndex:
        tables = [name for name in storage.list_files(self.uri, recursive=False) if "csv" in name]
        metadata = self._read_table(tables, "metadata", (*IDS, "ViewPosition"))
        if metadata is None and self.format == "mimic-cxr-jpg":
            raise UserError(
                f"{self.uri}: mimic-cxr-2.0.0-metadata.csv.gz is missing; copy it from MIMIC-CXR-JPG, next to files/"
            )
        records = next(iter(fnmatch.filter(tables, RECORD_LIST)), None) if metadata is None else None
        if metadata is None:
            log.warning(
                "no metadata table: reading the %s instead; views are unknown, so films of all views are kept",
                records or "folders",
            )
        bad_rows: list[dict[str, str]] = []
        if records is not None:
            listed = self._checked(records, IDS)
            films = self._films(listed.assign(ViewPosition=""))
        elif metadata is None:
            films, bad_rows = _walk(self.uri)
        else:
            films = self._films(metadata)
        films, filtered = filter_views(films, self.views, keep_unknown=metadata is None)
        challenge = self._challenge()
        films = films.assign(split=self._splits(tables, films, challenge))
        labels = self._labels(tables, films) if challenge is None else _challenge_labels(challenge, films)
        return StudyIndex(table=index_of_films(films, labels), filtered=filtered, bad_rows=bad_rows)

    def _read_table(self, tables: list[str], kind: str, columns: tuple[str, ...]) -> pd.DataFrame | None:
        """The newest table of a kind, checked for ``columns``; None if there is none."""
        names = fnmatch.filter(tables, f"mimic-cxr-*-{kind}.csv*")
        if not names:
            return None
        return self._checked(names[-1], columns)

    def _checked(self, name: str, columns: tuple[str, ...]) -> pd.DataFrame:
        """The table ``name``, which must have ``columns``."""
        table = read_table(storage.join(self.uri, name), columns)
        missing = [column for column in columns if column not in table.columns]
        if missing:
            raise UserError(f"{name} has no column {missing[0]}; download it again from PhysioNet")
        return table

    def _challenge(self) -> pd.DataFrame | None:
        """The films of CXR-LT with their labels and split, if a folder of the challenge lies beside the tables."""
        folders = sorted(name for name in storage.list_folders(self.uri) if fnmatch.fnmatchcase(name, CHALLENGE))
        if not folders:
            return None
        names = storage.list_files(storage.join(self.uri, folders[-1]), recursive=False)
        parts = []
        for split, patterns in CHALLENGE_TABLES.items():
            found = next((found for found in (fnmatch.filter(names, each) for each in patterns) if found), None)
            if found is not None:
                parts.append(self._checked(f"{folders[-1]}/{found[0]}", ("dicom_id",)).assign(split=split))
        if not parts:
            wanted = " or ".join(patterns[0] for patterns in CHALLENGE_TABLES.values())
            raise UserError(f"{self.uri}/{folders[-1]} has no {wanted}; unpack CXR-LT there, or remove the folder")
        return pd.concat(parts)

    def _films(self, metadata: pd.DataFrame) -> pd.DataFrame:
        patient, study = "p" + metadata["subject_id"], "s" + metadata["study_id"]
        folder = "files/" + patient.str[:3] + "/" + patient + "/" + study
        return pd.DataFrame(
            {
                "image_id": metadata["dicom_id"],
                "path": folder + "/" + metadata["dicom_id"] + SUFFIX[self.format],
                "view": metadata["ViewPosition"],
                "study_id": study,
                "patient_id": patient,
                "group": patient,
                "report_path": self._report_prefix() + folder + ".txt",
            }
        )

    def _report_prefix(self) -> str:
        """Folder into which ``mimic-cxr-reports.zip`` was unpacked: the corpus folder or one named after the archive."""
        folders = storage.list_folders(self.uri)
        return next((f"{name}/" for name in REPORT_FOLDERS if name in folders), "")

    def _splits(self, tables: list[str], films: pd.DataFrame, challenge: pd.DataFrame | None) -> pd.Series:
        """By CXR-LT if it is there, otherwise by the collection's own table; drawn for patients in neither."""
        if challenge is not None:
            # a patient in several parts counts to the last of train, valid and test
            order = films["image_id"].map(
                dict(zip(challenge["dicom_id"], challenge["split"].map(SPLIT_ORDER), strict=True))
            )
            latest = order.groupby(films["group"]).transform("max")
            given = latest.map({place: name for name, place in SPLIT_ORDER.items()})
            return draw_splits(self.seed, films["group"], given)
        table = self._read_table(tables, "split", ("dicom_id", "split"))
        if table is None:
            log.warning("no split table: drawing splits by patient with seed %d", self.seed)
            return draw_splits(self.seed, films["group"])
        official = films["image_id"].map(dict(zip(table["dicom_id"], table["split"].map(SPLIT_NAMES), strict=True)))
        # a film missing from the table takes the split of its patient
        given = official.fillna(official.groupby(films["group"]).transform("first"))
        return draw_splits(self.seed, films["group"], given)

    def _labels(self, tables: list[str], films: pd.DataFrame) -> pd.DataFrame | None:
        for kind in ("chexpert", "negbio"):
            table = self._read_table(tables, kind, ("study_id",))
            if table is not None:
                names = [name for name in table.columns if name not in ("subject_id", "study_id")]
                values = with_points(table[names]).apply(pd.to_numeric, errors="coerce")
                values = values.set_axis("s" + table["study_id"])[~table["study_id"].duplicated().to_numpy()]
                return values.reindex(films["study_id"]).set_axis(films.index)
        return None


def _challenge_labels(challenge: pd.DataFrame, films: pd.DataFrame) -> pd.DataFrame:
    """The findings of CXR-LT for each film; NaN where a part does not have them."""
    values = challenge.drop(columns=[name for name in challenge.columns if name in NO_LABELS]).apply(
        pd.to_numeric, errors="coerce"
    )
    values = values.loc[:, values.isin([-1, 0, 1]).any() & (values.isna() | values.isin([-1, 0, 1])).all()]
    values = values.set_axis(challenge["dicom_id"].to_numpy())
    return values[~values.index.duplicated()].reindex(films["image_id"]).set_axis(films.index)


def _walk(uri: str) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """Films of every .dcm under ``uri``; the study is its folder, the report is the folder's name with .txt."""
    files = storage.list_files(uri)
    reports = {path for path in files if path.endswith(".txt")}
    rows: list[dict[str, str]] = []
    no_report: set[str] = set()
    for path in files:
        folder, _, name = path.rpartition("/")
        if not name.lower().endswith(".dcm"):
            continue
        report = _report_of(folder, reports)
        if report is None:
            no_report.add(folder)
            continue
        patient = next((part for part in folder.split("/") if re.fullmatch(r"p\d{3,}", part)), folder)
        rows.append(
            {
                "image_id": name.rsplit(".", 1)[0],
                "path": path,
                "view": "",
                "study_id": folder.rpartition("/")[2],
                "patient_id": patient,
                "group": patient,
                "report_path": report,
            }
        )
    if not rows:
        raise UserError(f"{uri} contains no study with a .dcm film and a .txt report; check the path")
    bad_rows = [{"source": folder, "reason": "study has no report file"} for folder in sorted(no_report)]
    return pd.DataFrame(rows), bad_rows


def _report_of(folder: str, reports: set[str]) -> str | None:
    """MIMIC's ``sNNN.txt`` next to the study's folder, or in the folder of the unpacked reports."""
    prefixes = ("", *(f"{name}/" for name in REPORT_FOLDERS))
    return next((f"{prefix}{folder}.txt" for prefix in prefixes if f"{prefix}{folder}.txt" in reports), None)


def open_corpus(options: CorpusOptions) -> MimicSource:
    """The reader of ``mimic-cxr`` and ``mimic-cxr-jpg``."""
    return MimicSource(*options.of_files)
