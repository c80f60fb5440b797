"""Published sets with boxes or masks: RSNA Pneumonia, SIIM-ACR Pneumothorax, Object-CXR, VinDr-CXR."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cmcgns.data.image import CroppedImage
from cmcgns.data.labelled.base import (
    Annotations,
    Folder,
    ImageSet,
    box,
    image_table,
    mask_on_image,
    split_by_hash,
)
from cmcgns.data.readers import FileSource
from cmcgns.data.readers.published import (
    VINBIGDATA,
    VINDR_FOLDER,
    VINDR_PARTS,
    is_vinbigdata,
    labels_of_readers,
    vindr_labels,
)
from cmcgns.data.tables import numbers
from cmcgns.errors import UserError

NAMES = ("image_name", "image_path")
RECTANGLE, ELLIPSE, POLYGON = "0", "1", "2"


def read_object_cxr(source: FileSource) -> ImageSet:
    """Films with and without foreign objects, with a box per object; the official dev set is the test split."""
    folder = Folder.of(source)
    parts, filtered = [], Counter[str]()
    for part in ("train", "dev"):
        present, missing = folder.present(_object_cxr_films(folder, part), f"{part}.csv")
        parts.append(present)
        filtered.update(missing)
    train, test = parts
    train = train.assign(split=split_by_hash(train["group"], source.seed, {"train": 80, "valid": 20}))
    films = pd.concat([train, test.assign(split="test")])
    return ImageSet(
        name=source.format,
        source=source,
        table=image_table(films.to_dict("records")),
        rule=f"dev.csv is test; train.csv is 80/20 train and valid by image, drawn with seed {source.seed}",
        classes=("foreign object",),
        box_classes=("foreign object",),
        filtered=dict(filtered),
    )


def _object_cxr_films(folder: Folder, part: str) -> pd.DataFrame:
    name = folder.label_file(f"{part}.csv")
    table = folder.table(name, ("annotation",))
    column = next((column for column in NAMES if column in table.columns), None)
    if column is None:
        raise UserError(f"{folder.uri}/{name} has no column {' or '.join(NAMES)}; download the published file")
    image = table[column].str.rpartition("/")[2]
    try:
        boxes = [_boxes(name, text) for name, text in zip(image, table["annotation"], strict=True)]
    except UserError as error:
        raise UserError(f"{folder.uri}/{name}: {error}; fix it, or download the file again") from None
    return pd.DataFrame(
        {
            "image_id": image,
            "path": [folder.first(f"{part}/{name}", name) for name in image],
            "group": image,
            "labels": [[float(bool(each))] for each in boxes],
            "boxes": boxes,
        }
    )


def _boxes(image: str, annotation: str) -> list[dict[str, Any]]:
    """The bounding box of each object of an annotation."""
    boxes = []
    for text in filter(None, (part.strip() for part in annotation.split(";"))):
        shape, *corners = text.split()
        try:
            corner_N2 = np.array(corners, np.float64).reshape(-1, 2)
        except ValueError:
            raise UserError(f"image {image}: '{text}' is not a shape and pairs of numbers") from None
        if not _is_valid(shape, len(corner_N2)) or not np.isfinite(corner_N2).all():
            raise UserError(
                f"image {image}: '{text}' is not a rectangle (0), ellipse (1) or polygon (2) with its corners"
            )
        boxes.append(box(0, *corner_N2.min(axis=0).tolist(), *corner_N2.max(axis=0).tolist()))
    return boxes


def _is_valid(shape: str, corners: int) -> bool:
    """Whether a shape has the right number of corners; an ellipse is given by its bounding box."""
    return corners == 2 if shape in (RECTANGLE, ELLIPSE) else shape == POLYGON and corners >= 3


RSNA_LABELS, RSNA_IMAGES = "stage_2_train_labels.csv", "stage_2_train_images/"
CORNERS = ["x", "y", "width", "height"]
SHARES = {"train": 60, "valid": 20, "test": 20}  # MGCA's 16,010 / 5,337 / 5,337


def read_rsna(source: FileSource) -> ImageSet:
    """Films with and without pneumonia, with boxes; the masks are the filled boxes."""
    folder = Folder.of(source)
    films = rsna_films(folder, folder.label_file(RSNA_LABELS))
    films["path"] = films["image_id"].map(folder.paths_by_name(films["image_id"], stem=True, under=RSNA_IMAGES))
    films["split"] = split_by_hash(films["group"], source.seed, SHARES)
    films, missing = folder.present(films, RSNA_LABELS)
    return ImageSet(
        name=source.format,
        source=source,
        table=image_table(films.to_dict("records")),
        rule=f"60/20/20 by patient, drawn with seed {source.seed}",
        classes=("pneumonia",),
        box_classes=("pneumonia",),
        mask_classes=("pneumonia",),
        filtered=missing,
    )


def rsna_films(folder: Folder, name: str) -> pd.DataFrame:
    """image_id, group, labels, boxes and masks, one row per patient, in the order in which they first appear."""
    table = folder.table(name, ("patientId", *CORNERS, "Target"))
    file = f"{folder.uri}/{name}"
    values = numbers(table[[*CORNERS, "Target"]])
    given = values[CORNERS].notna().sum(axis=1)
    contradictory = values["Target"].groupby(table["patientId"]).transform("nunique") > 1
    wrong = contradictory | ~values["Target"].isin([0, 1]) | (given != 4 * values["Target"])
    if wrong.any():
        first = wrong.to_numpy().argmax()
        raise UserError(
            f"{file}: row {first + 1} under the header, patientId {table['patientId'].iloc[first]}, is neither Target 1 "
            "with x, y, width and height nor the patient's only row with Target 0 and blanks; download the file again"
        )
    boxes: dict[str, list[dict[str, Any]]] = {}
    for patient, (x, y, width, height, target) in zip(table["patientId"], values.to_numpy().tolist(), strict=True):
        boxes.setdefault(patient, []).extend([box(0, x, y, x + width, y + height)] if target else [])
    rows = [
        # every film is annotated; masks are painted from the boxes
        {"image_id": patient, "group": patient, "labels": [float(bool(each))], "boxes": each, "masks": []}
        for patient, each in boxes.items()
    ]
    return pd.DataFrame(rows)


# N numbers of an encoding, P pixels of a mask

SIIM_LABELS = ("train-rle.csv", "stage_2_train.csv")
"""The table of the first stage of the competition, and that of the second, which is the one that is published today."""
SIDE = 1024
"""Height and width in pixels of all masks."""
NO_MASK = "-1"


@dataclass(frozen=True)
class RunsSet(ImageSet):
    """Each part of a mask is a string of relative runs."""

    source: FileSource

    def paint(self, row: dict[str, Any], image: CroppedImage, annotations: Annotations) -> None:
        if row["masks"]:
            mask_HW = np.any([decode_relative_rle(text, SIDE, SIDE) for text in row["masks"]], axis=0)
            annotations.mask_KHW[0] |= mask_on_image(mask_HW, self.source, row["path"], image)


def read_siim(source: FileSource) -> ImageSet:
    """Films with and without pneumothorax, with masks."""
    folder = Folder.of(source)
    name = folder.label_file(*SIIM_LABELS)
    films = _siim_films(folder, name)
    films["path"] = films["image_id"].map(folder.paths_by_name(films["image_id"], stem=True))
    films["split"] = split_by_hash(films["group"], source.seed, {"train": 70, "valid": 15, "test": 15})
    films, missing = folder.present(films, name)
    return RunsSet(
        name=source.format,
        source=source,
        table=image_table(films.to_dict("records")),
        rule=f"70/15/15 by image, drawn with seed {source.seed}, because the table has no patient ids",
        classes=("pneumothorax",),
        mask_classes=("pneumothorax",),
        filtered=missing,
    )


def _siim_films(folder: Folder, name: str) -> pd.DataFrame:
    """image_id, group, labels and masks, one row per image, in the order in which they first appear."""
    table = folder.table(name, ("ImageId", "EncodedPixels"))
    parts: dict[str, list[str]] = {}
    for image, text in zip(table["ImageId"], table["EncodedPixels"], strict=True):
        parts.setdefault(image, []).append(text)
    rows = []
    for image, texts in parts.items():
        if set(texts) == {NO_MASK}:
            texts = []
        try:
            for text in texts:
                relative_runs(text, SIDE * SIDE)
        except UserError as error:
            raise UserError(f"{folder.uri}/{name}: image {image}: {error}; download the file again") from None
        rows.append({"image_id": image, "group": image, "labels": [float(bool(texts))], "masks": texts})
    return pd.DataFrame(rows)


def decode_relative_rle(text: str, height: int, width: int) -> NDArray[np.bool_]:
    """The mask (height, width): alternating gaps and runs of pixels, column by column."""
    number_N = relative_runs(text, height * width)
    mask_P = np.zeros(height * width, bool)
    mask_P[: number_N.sum()] = np.repeat(np.arange(len(number_N)) % 2 == 1, number_N)
    return mask_P.reshape(width, height).T


def relative_runs(text: str, pixels: int) -> NDArray[np.int64]:
    """The alternating gaps and runs of an encoding; ``UserError`` if they do not fit a mask of ``pixels``."""
    try:
        number_N = np.array(text.split(), np.int64)
    except (ValueError, OverflowError):
        raise UserError("its encoding has values that are not integers") from None
    if not len(number_N) or len(number_N) % 2:
        raise UserError(f"its encoding has {len(number_N)} numbers, not pairs of a gap and a run")
    if number_N.min() < 0 or number_N.max() > pixels or number_N.sum() > pixels:
        raise UserError(f"its encoding exceeds the mask of {pixels} pixels")
    return number_N


VINDR_CORNERS = ["x_min", "y_min", "x_max", "y_max"]
NO_FINDING = "No finding"


def read_vindr(source: FileSource) -> ImageSet:
    """VinDr-CXR or VinBigData: films with labels by most of three readers, and the boxes of every reader."""
    folder = Folder.of(source)
    alone = is_vinbigdata(source.uri, [path for path in folder.paths if "/" not in path])
    tables = {"train": (VINBIGDATA, VINBIGDATA)} if alone else VINDR_TABLES
    parts = {part: _vindr_part(folder, *names) for part, names in tables.items()}
    classes = [name for name in parts["train"][0].columns if name != NO_FINDING]
    boxed = tuple(dict.fromkeys(name for _, boxes in parts.values() for own in boxes.values() for name, *_ in own))
    rows, filtered = [], Counter[str]()
    for part, (labels, boxes) in parts.items():
        films = pd.DataFrame({"image_id": labels.index, "group": labels.index})
        films["path"] = films["image_id"].map(_vindr_paths(folder, films["image_id"], part, only_dicom=alone))
        films["labels"] = labels.reindex(columns=classes, fill_value=0).to_numpy(float).tolist()
        own = [boxes.get(image, []) for image in films["image_id"]]
        films["boxes"] = [[box(boxed.index(name), *corners) for name, *corners in each] for each in own]
        drawn = split_by_hash(films["group"], source.seed, ALL_DRAWN if alone else VALID_DRAWN)
        films["split"] = drawn if part == "train" else part
        fix = f"unpack {part}/*.dicom (boxes do not fit resized copies)" if alone else "download them"
        present, missing = folder.present(films, tables[part][0], fix)
        rows += present.to_dict("records")
        filtered.update(missing)
    split = (
        f"70/10/20 by image, drawn with seed {source.seed}, because its test films have no labels"
        if alone
        else f"the test part is test; a tenth of the train part, drawn with seed {source.seed}, is valid"
    )
    return ImageSet(
        name=source.format,
        source=source,
        table=image_table(rows),
        rule=f"{split}; a label is that of most readers; boxes are those of all readers",
        classes=tuple(classes),
        box_classes=boxed,
        filtered=dict(filtered),
    )


VINDR_TABLES = {
    part: (f"{VINDR_FOLDER}/image_labels_{part}.csv", f"{VINDR_FOLDER}/annotations_{part}.csv") for part in VINDR_PARTS
}
"""Tables of labels and boxes by part."""
ALL_DRAWN, VALID_DRAWN = {"train": 70, "valid": 10, "test": 20}, {"train": 90, "valid": 10}


def _vindr_paths(folder: Folder, images: pd.Series, part: str, only_dicom: bool) -> dict[str, str]:
    """The film of each of ``images`` that is there; VinBigData is spread as smaller PNGs, too, which its boxes do not fit."""
    paths = folder.paths_by_name(images, stem=True, under=f"{part}/")
    return {image: path for image, path in paths.items() if not only_dicom or path.lower().endswith((".dicom", ".dcm"))}


def _vindr_part(folder: Folder, of_labels: str, of_boxes: str) -> tuple[pd.DataFrame, dict[str, list[tuple[Any, ...]]]]:
    """Labels by image, and the class and corners of each box, of the tables of these names."""
    missing = next((name for name in (of_labels, of_boxes) if name not in folder.paths), None)
    if missing:
        raise UserError(f"{folder.uri} has no {missing}, which {folder.name} needs; give the folder that contains it")
    table = folder.table(of_boxes, ("image_id", "class_name", *VINDR_CORNERS))
    given = labels_of_readers(table) if of_labels == of_boxes else folder.table(of_labels, ("image_id",))
    table = table[table["class_name"] != NO_FINDING]
    boxes: dict[str, list[tuple[Any, ...]]] = {}
    corners = numbers(table[VINDR_CORNERS]).to_numpy().tolist()
    for image, kind, each in zip(table["image_id"], table["class_name"], corners, strict=True):
        boxes.setdefault(image, []).append((kind, *each))
    return vindr_labels(given), boxes
