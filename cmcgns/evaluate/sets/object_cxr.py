"""``object-cxr``: train.csv and dev.csv of Object-CXR, foreign objects as rectangles, ellipses and polygons."""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from cmcgns.data.sources import FileSource
from cmcgns.errors import UserError
from cmcgns.evaluate.sets.base import ImageSet, image_table
from cmcgns.evaluate.sets.lookup import Folder, box, split_by_hash

NAMES = ("image_name", "image_path")
RECTANGLE, ELLIPSE, POLYGON = "0", "1", "2"


def read_object_cxr(source: FileSource) -> ImageSet:
    """Films with and without foreign objects, each object in its box; the official dev set is the test split."""
    folder = Folder.of(source)
    parts, filtered = [], Counter[str]()
    for part in ("train", "dev"):
        present, missing = folder.present(_films(folder, part), f"{part}.csv")
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


def _films(folder: Folder, part: str) -> pd.DataFrame:
    name = folder.label_file(f"{part}.csv")
    table = folder.table(name, ("annotation",))
    column = next((column for column in NAMES if column in table.columns), None)
    if column is None:
        raise UserError(f"{folder.uri}/{name} has no column {' or '.join(NAMES)}; fetch it as it is published")
    image = table[column].str.rpartition("/")[2]
    try:
        boxes = [_boxes(name, text) for name, text in zip(image, table["annotation"], strict=True)]
    except UserError as error:
        raise UserError(f"{folder.uri}/{name}: {error}; correct it, or fetch the file again") from None
    return pd.DataFrame(
        {
            "image_id": image,
            "path": [folder.first(f"{part}/{name}", name) for name in image],
            "group": image,
            "labels": [[float(bool(found))] for found in boxes],
            "boxes": boxes,
        }
    )


def _boxes(image: str, annotation: str) -> list[dict[str, Any]]:
    """The box around each object of an annotation."""
    found = []
    for text in filter(None, (part.strip() for part in annotation.split(";"))):
        shape, *corners = text.split()
        try:
            corner_N2 = np.array(corners, np.float64).reshape(-1, 2)
        except ValueError:
            raise UserError(f"image {image}: '{text}' is not a shape and pairs of numbers") from None
        if not _fits(shape, len(corner_N2)) or not np.isfinite(corner_N2).all():
            raise UserError(f"image {image}: '{text}' is no rectangle (0), ellipse (1) or polygon (2) with its corners")
        found.append(box(0, *corner_N2.min(axis=0).tolist(), *corner_N2.max(axis=0).tolist()))
    return found


def _fits(shape: str, corners: int) -> bool:
    """Whether a shape has as many corners; an ellipse has those of the box around it."""
    return corners == 2 if shape in (RECTANGLE, ELLIPSE) else shape == POLYGON and corners >= 3
