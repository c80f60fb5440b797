"""Published sets with labels per film: CheXpert, NIH ChestX-ray14, COVIDx."""

import fnmatch
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd

from cmcgns import storage
from cmcgns.data.labelled.base import Folder, ImageSet, box, first_by_hash, image_table, split_by_hash
from cmcgns.data.readers import FileSource
from cmcgns.data.readers.base import filter_views
from cmcgns.data.tables import numbers
from cmcgns.errors import UserError

COMPETITION = {"Atelectasis": 1, "Cardiomegaly": 0, "Consolidation": 0, "Edema": 1, "Pleural Effusion": 1}
"""The labels of the CheXpert competition, and the value that an uncertain -1 counts as."""
VALID_PATIENTS = 5000
"""Patients of train.csv for validation, but at most a tenth of all."""


def read_chexpert(source: FileSource) -> ImageSet:
    """The frontal films of CheXpert with five labels; the official validation set is the test split."""
    source, folder = _chexpert_folder(source)
    train, test = _films(folder, "train.csv"), _films(folder, "valid.csv")
    patients = train["group"].unique()
    valid = first_by_hash(patients, source.seed, min(VALID_PATIENTS, max(1, len(patients) // 10)))
    train["split"] = np.where(train["group"].isin(valid), "valid", "train")
    test["split"] = "test"
    parts, filtered = [], Counter[str]()
    for name, films in (("train.csv", train), ("valid.csv", test)):
        frontal, other_views = filter_views(films, ("FRONTAL",), keep_unknown=False)
        present, missing = folder.present(frontal, name)
        parts.append(present)
        filtered.update(other_views)
        filtered.update(missing)
    return ImageSet(
        name=source.format,
        source=source,
        table=image_table(pd.concat(parts).to_dict("records")),
        rule=_rule(len(valid), source.seed),
        classes=tuple(COMPETITION),
        filtered=dict(filtered),
    )


BATCH = "CheXpert-v1.0 batch *"
"""Folders of the full release as it is unpacked; the tables lie in the first."""


def _chexpert_folder(source: FileSource) -> tuple[FileSource, Folder]:
    """The folder of all films: that of the batches if one of them, or the folder around them, is given."""
    parent, _, name = source.uri.rstrip("/").rpartition("/")
    if fnmatch.fnmatchcase(name, BATCH) and parent:
        source = replace(source, uri=parent)
    batches = [name for name in storage.list_folders(source.uri) if fnmatch.fnmatchcase(name, BATCH)]
    if not batches:
        return source, Folder.of(source)
    paths = [f"{batch}/{path}" for batch in batches for path in storage.list_files(storage.join(source.uri, batch))]
    return source, Folder(source.format, source.uri, frozenset(paths))


def _in_batches(folder: Folder) -> tuple[str, dict[str, str]]:
    """The folder of the tables, with a stroke, and each film's path by its name in the tables; both empty without batches."""
    inside = {path: path.partition("/")[2] for path in folder.paths if fnmatch.fnmatchcase(path, f"{BATCH}/*")}
    tables = sorted(path for path, rest in inside.items() if rest == "train.csv")
    # the films of train stand in their batches without that folder
    names = {rest if rest.startswith(("train/", "valid/")) else f"train/{rest}": path for path, rest in inside.items()}
    return (tables[0].removesuffix("train.csv") if tables else "", names)


def _rule(patients: int, seed: int) -> str:
    ones = ", ".join(name for name, value in COMPETITION.items() if value)
    return (
        f"valid.csv is test; all images of {patients} patients of train.csv, first by hash with seed {seed}, are valid; "
        f"frontal views; -1 counts as 1 for {ones} and as 0 for the others; blank counts as 0, as in the published protocol"
    )


def _films(folder: Folder, name: str) -> pd.DataFrame:
    """Every row of a table, of all views; ``path`` is null if the file is missing."""
    place, in_batches = _in_batches(folder)
    name = place + name if place + name in folder.paths else folder.label_file(name)
    table = folder.table(name, ("Path", "Frontal/Lateral", *COMPETITION))
    image_id = table["Path"].str.replace(r"^CheXpert-v1\.0[^/]*/", "", regex=True)
    patient = image_id.str.extract(r"(patient\d+)", expand=False)
    if patient.isna().any():
        raise UserError(
            f"{folder.uri}/{name}: Path {table['Path'][patient.isna()].iloc[0]} names no patient; download the file again"
        )
    return pd.DataFrame(
        {
            "image_id": image_id,
            "path": [folder.first(path) or in_batches.get(path) for path in image_id],
            "group": patient,
            "view": table["Frontal/Lateral"],
            "labels": list(_labels(numbers(table[list(COMPETITION)]))),
        }
    )


def _labels(values: pd.DataFrame) -> np.ndarray:
    """1 or 0 per row and competition label."""
    return np.where(values == -1, list(COMPETITION.values()), values.fillna(0)).astype(np.float32)


LINE = re.compile(r"(\S+)\s+(.+?)\s+(\S+)\s+(\S+)")
CLASSES = (("normal", "pneumonia", "COVID-19"), ("negative", "positive"))
"""Classes of versions up to 7, and from 8 on."""
IN_TEST = "patient is in the test set"


def read_covidx(source: FileSource) -> ImageSet:
    """Films with one class each: normal, pneumonia or COVID-19, or COVID-19 negative or positive."""
    folder = Folder.of(source)
    train, test = (covidx_films(folder, folder.label_file(f"{split}.txt")) for split in ("train", "test"))
    classes = _classes(folder, [*train["class"], *test["class"]])
    shared = train["group"].isin(test["group"])
    train = train[~shared]
    train = train.assign(split=split_by_hash(train["group"], source.seed, {"train": 90, "valid": 10}))
    parts, filtered = [], Counter({IN_TEST: int(shared.sum())} if shared.any() else {})
    for split, films in (("train", train), ("test", test.assign(split="test"))):
        films["path"] = [folder.first(f"{split}/{name}", name) for name in films["image_id"]]
        present, missing = folder.present(films, f"{split}.txt")
        parts.append(present)
        filtered.update(missing)
    films = pd.concat(parts)
    index = {name.lower(): k for k, name in enumerate(classes)}
    films["labels"] = list(np.eye(len(classes), dtype=np.float32)[films["class"].map(index).to_numpy(int)])
    return ImageSet(
        name=source.format,
        source=source,
        table=image_table(films.to_dict("records")),
        rule=f"test.txt is test; a tenth of the other patients of train.txt, drawn with seed {source.seed}, are valid",
        classes=classes,
        exclusive=True,
        filtered=dict(filtered),
    )


def covidx_films(folder: Folder, name: str) -> pd.DataFrame:
    """group, image_id and class (lower case) of each non-blank line."""
    rows = []
    for number, line in enumerate(folder.lines(name), start=1):
        fields = LINE.fullmatch(line)
        if fields is not None:
            rows.append({"group": fields[1], "image_id": fields[2], "class": fields[3].lower()})
        elif line:
            raise UserError(
                f"{folder.uri}/{name}: line {number} is not `patient file class source`; download the file again"
            )
    return pd.DataFrame(rows, columns=["group", "image_id", "class"])


def _classes(folder: Folder, names: list[str]) -> tuple[str, ...]:
    """The classes of the version that uses these names."""
    known = [classes for classes in CLASSES if set(names) <= {name.lower() for name in classes}]
    if not known:
        raise UserError(
            f"{folder.uri}: train.txt and test.txt have the classes {', '.join(sorted(set(names))[:6])}; COVIDx has "
            f"{' or '.join(', '.join(classes) for classes in CLASSES)}; use both files of one version"
        )
    return known[0]


FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip

NO_FINDING = "No Finding"
ENTRIES, BOXES = "Data_Entry_2017*.csv", "BBox_List_2017.csv"
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
BOX_NAMES = {"Infiltrate": "Infiltration"}
"""Findings with another name in the list of boxes."""


def read_nih(source: FileSource) -> ImageSet:
    """Films with labels of 14 findings; about 900 of them have boxes."""
    folder = Folder.of(source)
    name = folder.label_file(ENTRIES)
    films = nih_entries(folder, name)
    films["path"] = films["image_id"].map(folder.paths_by_name(films["image_id"]))
    films["split"], rule = _splits(folder, films, source.seed)
    boxes, box_classes = nih_boxes(folder, BOXES) if folder.file(BOXES) else ({}, ())
    unknown = sorted(set(boxes) - set(films["image_id"]))
    if unknown:
        raise UserError(
            f"{source.uri}/{BOXES}: {len(unknown)} of its images are not in {name}, such as {unknown[0]}; "
            "download both files of one release"
        )
    films["boxes"] = pd.Series([boxes.get(image) for image in films["image_id"]], films.index, dtype=object)
    films, missing = folder.present(films, name)
    return ImageSet(
        name=source.format,
        source=source,
        table=image_table(films.to_dict("records")),
        rule=rule,
        classes=FINDINGS,
        box_classes=box_classes,
        filtered=missing,
    )


def nih_entries(folder: Folder, name: str) -> pd.DataFrame:
    """image_id, group and labels of each row."""
    # the last two names of the header contain commas: they are read as four columns, like the rows
    table = folder.table(name, ("Image Index", "Finding Labels", "Patient ID"))
    findings = [set(labels.split("|")) - {NO_FINDING} for labels in table["Finding Labels"]]
    for row, names in enumerate(findings):
        unknown = sorted(names.difference(FINDINGS))
        if unknown:
            raise UserError(
                f"{folder.uri}/{name}: unknown finding '{unknown[0]}' in row {row + 1} under the header; known are "
                f"{', '.join(FINDINGS)} and {NO_FINDING}"
            )
    labels = [[float(finding in names) for finding in FINDINGS] for names in findings]
    return pd.DataFrame({"image_id": table["Image Index"], "group": table["Patient ID"], "labels": labels})


def nih_boxes(folder: Folder, name: str) -> tuple[dict[str, list[dict[str, float]]], tuple[str, ...]]:
    """The boxes of each image that has any, and their classes."""
    table = folder.table(name, ("Image Index", "Finding Label"))
    corners = numbers(table.iloc[:, 2:6])  # the header is `Bbox [x,y,w,h],,,`
    if corners.shape[1] < 4 or corners.isna().to_numpy().any():
        raise UserError(f"{folder.uri}/{name}: not every row has x, y, w and h after the finding; download it again")
    finding = table["Finding Label"].replace(BOX_NAMES)
    unknown = sorted(set(finding) - set(FINDINGS))
    if unknown:
        raise UserError(f"{folder.uri}/{name}: unknown finding '{unknown[0]}'; known are {', '.join(FINDINGS)}")
    classes = tuple(each for each in FINDINGS if each in set(finding))
    boxes: dict[str, list[dict[str, float]]] = {}
    for image, kind, (x, y, w, h) in zip(table["Image Index"], finding, corners.to_numpy().tolist(), strict=True):
        boxes.setdefault(image, []).append(box(classes.index(kind), x, y, x + w, y + h))
    return boxes, classes


def _splits(folder: Folder, films: pd.DataFrame, seed: int) -> tuple[pd.Series, str]:
    """Each film's split, and the rule in words."""
    if any(folder.file(name) is None for name in LISTS.values()):
        drawn = split_by_hash(films["group"], seed, {"train": 70, "valid": 10, "test": 20})
        lists = " and ".join(LISTS.values())
        return drawn, f"70/10/20 by patient, drawn with seed {seed}, because {lists} are missing"
    official = {image: split for split, name in LISTS.items() for image in folder.lines(name) if image}
    split = films["image_id"].map(official)
    if split.isna().any():
        raise UserError(
            f"{folder.uri}: {int(split.isna().sum())} images are in neither {' nor '.join(LISTS.values())}, such as "
            f"{films.loc[split.isna(), 'image_id'].iloc[0]}; download the lists of the same release"
        )
    drawn = split_by_hash(films["group"], seed, {"train": 90, "valid": 10})
    rule = f"{LISTS['test']} is test; a tenth of the patients of {LISTS['train']}, drawn with seed {seed}, are valid"
    return split.where(split == "test", drawn), rule
