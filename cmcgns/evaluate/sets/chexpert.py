"""``chexpert``: train.csv and valid.csv of CheXpert by MGCA's protocol, made right: patients stay together."""

from collections import Counter

import numpy as np
import pandas as pd

from cmcgns.data.sources import FileSource
from cmcgns.data.sources.base import filter_views
from cmcgns.errors import UserError
from cmcgns.evaluate.sets.base import ImageSet, image_table
from cmcgns.evaluate.sets.lookup import Folder, first_by_hash, numbers

COMPETITION = {"Atelectasis": 1, "Cardiomegaly": 0, "Consolidation": 0, "Edema": 1, "Pleural Effusion": 1}
"""The labels of the CheXpert competition, and what an uncertain -1 counts as."""
VALID_PATIENTS = 5000
"""Held out of train.csv for validation; a tenth of the patients where there are fewer than ten times as many."""


def read_chexpert(source: FileSource) -> ImageSet:
    """The frontal films of CheXpert under five labels; the official validation set is the test split."""
    folder = Folder.of(source)
    train, test = _films(folder, "train.csv"), _films(folder, "valid.csv")
    patients = train["group"].unique()
    held = first_by_hash(patients, source.seed, min(VALID_PATIENTS, max(1, len(patients) // 10)))
    train["split"] = np.where(train["group"].isin(held), "valid", "train")
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
        rule=_rule(len(held), source.seed),
        classes=tuple(COMPETITION),
        filtered=dict(filtered),
    )


def _rule(held: int, seed: int) -> str:
    ones = ", ".join(name for name, value in COMPETITION.items() if value)
    return (
        f"valid.csv is test; all images of {held} patients of train.csv, first by hash with seed {seed}, are valid; "
        f"frontal views; -1 counts as 1 for {ones} and as 0 for the others; blank counts as 0, as in the published protocol"
    )


def _films(folder: Folder, name: str) -> pd.DataFrame:
    """Every row of a table, of all views; ``path`` is null where no file lies there."""
    name = folder.label_file(name)
    table = folder.table(name, ("Path", "Frontal/Lateral", *COMPETITION))
    image_id = table["Path"].str.replace(r"^CheXpert-v1\.0[^/]*/", "", regex=True)
    patient = image_id.str.extract(r"(patient\d+)", expand=False)
    if patient.isna().any():
        raise UserError(f"{folder.uri}/{name}: Path {table['Path'][patient.isna()].iloc[0]} names no patient")
    return pd.DataFrame(
        {
            "image_id": image_id,
            "path": [folder.first(path) for path in image_id],
            "group": patient,
            "view": table["Frontal/Lateral"],
            "labels": list(_labels(numbers(table[list(COMPETITION)], f"{folder.uri}/{name}"))),
        }
    )


def _labels(values: pd.DataFrame) -> np.ndarray:
    """1 or 0 for each row and competition label."""
    return np.where(values == -1, list(COMPETITION.values()), values.fillna(0)).astype(np.float32)
