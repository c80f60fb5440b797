"""``siim``: train-rle.csv of SIIM-ACR pneumothorax, whose masks are written as relative runs down the columns."""

# N numbers of an encoding, P pixels of a mask

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cmcgns.data.framing import Film
from cmcgns.data.sources import FileSource
from cmcgns.errors import UserError
from cmcgns.evaluate.sets.base import ImageSet, Places, image_table
from cmcgns.evaluate.sets.lookup import Folder, mask_on_film, split_by_hash

LABELS = "train-rle.csv"
SIDE = 1024
"""Pixels of the height and width that all masks are written for."""
NOTHING = "-1"


@dataclass(frozen=True)
class RunsSet(ImageSet):
    """Each part of a mask is a text of relative runs."""

    source: FileSource

    def paint(self, row: dict[str, Any], film: Film, places: Places) -> None:
        if row["masks"]:
            mask_HW = np.any([decode_relative_rle(text, SIDE, SIDE) for text in row["masks"]], axis=0)
            places.mask_KHW[0] |= mask_on_film(mask_HW, self.source, row["path"], film)


def read_siim(source: FileSource) -> ImageSet:
    """Films with and without pneumothorax, each with its mask."""
    folder = Folder.of(source)
    films = _films(folder, folder.label_file(LABELS))
    films["path"] = films["image_id"].map(folder.films_by_name(films["image_id"], stem=True))
    films["split"] = split_by_hash(films["group"], source.seed, {"train": 70, "valid": 15, "test": 15})
    films, missing = folder.present(films, LABELS)
    return RunsSet(
        name=source.format,
        source=source,
        table=image_table(films.to_dict("records")),
        rule=f"70/15/15 by image, drawn with seed {source.seed}: the table names no patients",
        classes=("pneumothorax",),
        mask_classes=("pneumothorax",),
        filtered=missing,
    )


def _films(folder: Folder, name: str) -> pd.DataFrame:
    """image_id, group, labels and masks, one row an image, in the order in which they first appear."""
    table = folder.table(name, ("ImageId", "EncodedPixels"))
    parts: dict[str, list[str]] = {}
    for image, text in zip(table["ImageId"], table["EncodedPixels"], strict=True):
        parts.setdefault(image, []).append(text)
    rows = []
    for image, texts in parts.items():
        if set(texts) == {NOTHING}:
            texts = []
        try:
            for text in texts:
                relative_runs(text, SIDE * SIDE)
        except UserError as error:
            raise UserError(f"{folder.uri}/{name}: image {image}: {error}; fetch the file again") from None
        rows.append({"image_id": image, "group": image, "labels": [float(bool(texts))], "masks": texts})
    return pd.DataFrame(rows)


def decode_relative_rle(text: str, height: int, width: int) -> NDArray[np.bool_]:
    """The mask, (height, width): after each gap from the last run's end comes a run, down one column after the other."""
    number_N = relative_runs(text, height * width)
    mask_P = np.zeros(height * width, bool)
    mask_P[: number_N.sum()] = np.repeat(np.arange(len(number_N)) % 2 == 1, number_N)
    return mask_P.reshape(width, height).T


def relative_runs(text: str, pixels: int) -> NDArray[np.int64]:
    """The gaps and runs of an encoding, in turn; ``UserError`` where they are none of a mask of ``pixels``."""
    try:
        number_N = np.array(text.split(), np.int64)
    except (ValueError, OverflowError):
        raise UserError("its encoding holds something other than whole numbers") from None
    if not len(number_N) or len(number_N) % 2:
        raise UserError(f"its encoding has {len(number_N)} numbers, not pairs of a gap and a run")
    if number_N.min() < 0 or number_N.max() > pixels or number_N.sum() > pixels:
        raise UserError(f"its encoding leaves the mask of {pixels} pixels")
    return number_N
