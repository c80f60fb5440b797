"""What lies in two splits at once: patients, groups, films, reports."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

MOST_BITS = 3
"""Bits by which the perceptual hashes of one picture may differ after it was encoded anew."""
MOST_LEVELS = 4.0
"""Mean difference in grey levels of the thumbnails of one picture."""
BANDS = np.arange(0, 65, 16)
"""Two hashes that differ in at most three bits agree in one of four bands."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with a prepared set."""

    kind: str
    ids: list[str]
    """Of what it is about: files, or study/film of each row."""
    what: str

    @property
    def is_fault(self) -> bool:
        """Equal reports are none: of normal films many say the same."""
        return self.kind != "report in two splits"


def leaks(facts: pd.DataFrame) -> list[Finding]:
    """Every patient, group, film and report of ``facts`` (columns of ``check.FACT_SCHEMA``) that is in two splits."""
    rows = facts.assign(row=facts["study_id"] + "/" + facts["image_id"])
    return [
        *_shared(rows, "patient_id", "patient in two splits"),
        *_shared(rows[rows["group"] != rows["patient_id"]], "group", "group in two splits"),
        *_shared_films(rows),
        *_shared(rows, "report_hash", "report in two splits"),
    ]


def _shared(rows: pd.DataFrame, column: str, kind: str) -> Iterator[Finding]:
    """A finding for each value of ``column`` that occurs in several splits, with the first row of each."""
    torn = rows.groupby(column)["split"].transform("nunique") > 1
    for value, found in rows[torn].groupby(column, sort=False):
        first = found.drop_duplicates("split")
        named = f"{column.removesuffix('_id')} {value} " if column != "report_hash" else ""
        yield Finding(kind, list(first["row"]), f"{named}in {' and '.join(first['split'])} ({len(found)} films)")


def _shared_films(rows: pd.DataFrame) -> Iterator[Finding]:
    """A finding for each pair of films in two splits that are one picture."""
    hash_N = rows["picture_hash"].to_numpy(np.uint64)
    split_N = rows["split"].to_numpy(str)
    pairs_P2 = _near(hash_N, split_N)
    thumbnails = rows["thumbnail"].to_numpy()
    names = rows["row"].to_numpy(str)
    for one, other in pairs_P2:
        levels = [np.frombuffer(thumbnails[i], np.uint8).astype(float) for i in (one, other)]
        if np.abs(levels[0] - levels[1]).mean() <= MOST_LEVELS:
            what = f"are one picture, in {split_N[one]} and {split_N[other]}"
            yield Finding("film in two splits", [names[one], names[other]], what)


def _near(hash_N: np.ndarray, split_N: np.ndarray) -> np.ndarray:
    """Pairs (P, 2) of rows in two splits whose hashes differ in at most ``MOST_BITS`` bits."""
    found = [np.zeros((0, 2), np.int64)]
    for low, high in pairwise(BANDS):
        band_N = (hash_N >> np.uint64(low)) & np.uint64(2 ** int(high - low) - 1)
        table = pd.DataFrame({"band": band_N, "row": np.arange(len(hash_N)), "split": split_N})
        for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
            pairs = table[table["split"] == one].merge(table[table["split"] == other], on="band")
            pair_P2 = pairs[["row_x", "row_y"]].to_numpy(np.int64)
            bits_P = np.bitwise_count(hash_N[pair_P2[:, 0]] ^ hash_N[pair_P2[:, 1]])
            found.append(pair_P2[bits_P <= MOST_BITS])
    return np.unique(np.concatenate(found), axis=0)
