"""``nih``: Data_Entry_2017*.csv of NIH ChestX-ray14, the official lists where they lie beside it, and boxes."""

import pandas as pd

from cmcgns.data.sources import FileSource
from cmcgns.errors import UserError
from cmcgns.evaluate.sets.base import ImageSet, image_table
from cmcgns.evaluate.sets.lookup import Folder, box, numbers, split_by_hash

FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
NO_FINDING = "No Finding"
ENTRIES, BOXES = "Data_Entry_2017*.csv", "BBox_List_2017.csv"
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
BOX_NAMES = {"Infiltrate": "Infiltration"}
"""Findings that the list of boxes calls otherwise."""


def read_nih(source: FileSource) -> ImageSet:
    """Films under 14 findings; about 900 of them have boxes."""
    folder = Folder.of(source)
    name = folder.label_file(ENTRIES)
    films = nih_entries(folder, name)
    places = folder.films_by_name(films["image_id"])
    films["path"] = films["image_id"].map(places)
    films["split"], rule = _splits(folder, films, source.seed)
    boxes, box_classes = nih_boxes(folder, BOXES) if folder.file(BOXES) else ({}, ())
    strangers = sorted(set(boxes) - set(films["image_id"]))
    if strangers:
        raise UserError(
            f"{source.uri}/{BOXES}: {len(strangers)} of its images are not in {name}, the first of them "
            f"{strangers[0]}; fetch both files of one release"
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
    # the header's last two names hold commas: read as four columns, as many as the rows have
    table = folder.table(name, ("Image Index", "Finding Labels", "Patient ID"))
    found = [set(labels.split("|")) - {NO_FINDING} for labels in table["Finding Labels"]]
    for row, names in enumerate(found):
        unknown = sorted(names.difference(FINDINGS))
        if unknown:
            raise UserError(
                f"{folder.uri}/{name}: finding '{unknown[0]}' in row {row + 1} under the header is none of "
                f"{', '.join(FINDINGS)} and {NO_FINDING}"
            )
    labels = [[float(finding in names) for finding in FINDINGS] for names in found]
    return pd.DataFrame({"image_id": table["Image Index"], "group": table["Patient ID"], "labels": labels})


def nih_boxes(folder: Folder, name: str) -> tuple[dict[str, list[dict[str, float]]], tuple[str, ...]]:
    """The boxes of each image that somebody boxed, and their classes."""
    table = folder.table(name, ("Image Index", "Finding Label"))
    corners = numbers(table.iloc[:, 2:6], f"{folder.uri}/{name}")  # the header is `Bbox [x,y,w,h],,,`
    if corners.shape[1] < 4 or corners.isna().to_numpy().any():
        raise UserError(f"{folder.uri}/{name}: not every row has x, y, w and h after the finding; fetch it again")
    finding = table["Finding Label"].replace(BOX_NAMES)
    unknown = sorted(set(finding) - set(FINDINGS))
    if unknown:
        raise UserError(f"{folder.uri}/{name}: finding '{unknown[0]}' is none of {', '.join(FINDINGS)}")
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
        return drawn, f"70/10/20 by patient, drawn with seed {seed}: {lists} do not lie beside the table"
    written = {image: split for split, name in LISTS.items() for image in folder.lines(name) if image}
    split = films["image_id"].map(written)
    if split.isna().any():
        raise UserError(
            f"{folder.uri}: {int(split.isna().sum())} images are in neither {' nor '.join(LISTS.values())}, the first "
            f"of them {films.loc[split.isna(), 'image_id'].iloc[0]}; fetch the lists of the same release"
        )
    drawn = split_by_hash(films["group"], seed, {"train": 90, "valid": 10})
    rule = f"{LISTS['test']} is test; a tenth of the patients of {LISTS['train']}, drawn with seed {seed}, are valid"
    return split.where(split == "test", drawn), rule
