"""``rsna``: stage_2_train_labels.csv of the RSNA pneumonia challenge, one row a box, so that patients repeat."""

from typing import Any

import pandas as pd

from cmcgns.data.sources import FileSource
from cmcgns.errors import UserError
from cmcgns.evaluate.sets.base import ImageSet, image_table
from cmcgns.evaluate.sets.lookup import Folder, box, numbers, split_by_hash

LABELS, FILMS = "stage_2_train_labels.csv", "stage_2_train_images/"
CORNERS = ["x", "y", "width", "height"]
SHARES = {"train": 60, "valid": 20, "test": 20}  # MGCA's 16,010 / 5,337 / 5,337


def read_rsna(source: FileSource) -> ImageSet:
    """Films with and without pneumonia, each with its boxes; its mask is the boxes, filled."""
    folder = Folder.of(source)
    films = rsna_films(folder, folder.label_file(LABELS))
    films["path"] = films["image_id"].map(folder.films_by_name(films["image_id"], stem=True, under=FILMS))
    films["split"] = split_by_hash(films["group"], source.seed, SHARES)
    films, missing = folder.present(films, LABELS)
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
    """image_id, group, labels, boxes and masks, one row a patient, in the order in which they first appear."""
    table = folder.table(name, ("patientId", *CORNERS, "Target"))
    file = f"{folder.uri}/{name}"
    values = numbers(table[[*CORNERS, "Target"]], file)
    given = values[CORNERS].notna().sum(axis=1)
    torn = values["Target"].groupby(table["patientId"]).transform("nunique") > 1
    wrong = torn | ~values["Target"].isin([0, 1]) | (given != 4 * values["Target"])
    if wrong.any():
        first = wrong.to_numpy().argmax()
        raise UserError(
            f"{file}: row {first + 1} under the header, patientId {table['patientId'].iloc[first]}, is neither Target 1 "
            "with x, y, width and height nor the patient's only Target 0 without them; fetch the file again"
        )
    boxes: dict[str, list[dict[str, Any]]] = {}
    for patient, (x, y, width, height, target) in zip(table["patientId"], values.to_numpy().tolist(), strict=True):
        boxes.setdefault(patient, []).extend([box(0, x, y, x + width, y + height)] if target else [])
    rows = [
        # every film has been looked at; what is painted are its boxes
        {"image_id": patient, "group": patient, "labels": [float(bool(found))], "boxes": found, "masks": []}
        for patient, found in boxes.items()
    ]
    return pd.DataFrame(rows)
