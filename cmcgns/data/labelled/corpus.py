"""Downstream sets from a pretraining corpus: the generated one with its ground truth, or any corpus with labels."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cmcgns.data.image import CroppedImage
from cmcgns.data.labelled.base import IMAGE_SCHEMA, Annotations, ImageSet, box, tested_on_valid
from cmcgns.data.readers import PhantomSource, Source
from cmcgns.data.record import StudyIndex, first_films
from cmcgns.phantom import FINDINGS, PhantomCorpus

# S studies, L labels given, C classes

RULE = "the corpus's own split; the first film of each study"
UNCERTAIN = -1


@dataclass(frozen=True)
class PhantomSet(ImageSet):
    """The generated corpus; ``annotations`` renders its boxes and masks, the lists in the table are empty."""

    source: PhantomSource

    def annotations(self, row: dict[str, Any], image: CroppedImage) -> Annotations:
        study, film = (int(number) for number in row["path"].split("/"))
        source = self.source
        truth = PhantomCorpus(source.studies, source.seed, source.height, source.width).truth(study, film)
        boxes = [box(FINDINGS.index(name), *each) for name, corners in truth.boxes.items() for each in corners]
        return super().annotations(row | {"boxes": boxes, "truth": truth}, image)

    def paint(self, row: dict[str, Any], image: CroppedImage, annotations: Annotations) -> None:
        for mask_HW, name in zip(annotations.mask_KHW, FINDINGS, strict=True):
            if name in row["truth"].masks:
                mask_HW |= image.frame.mask(row["truth"].masks[name], *image.grey_HW.shape)


def phantom_set(source: PhantomSource) -> ImageSet:
    """The generated corpus with its findings as classes, boxes and masks; no image is rendered yet."""
    studies = source.index().table
    value_SC = _labels(studies, FINDINGS)
    empty: list[list[Any]] = [[] for _ in range(len(studies))]
    return PhantomSet(
        name=source.format,
        source=source,
        table=_table(studies, value_SC, empty),
        rule=RULE,
        classes=FINDINGS,
        box_classes=FINDINGS,
        mask_classes=FINDINGS,
    )


def labelled_set(source: Source, index: StudyIndex) -> ImageSet | None:
    """A corpus with its labels, uncertain and blank ones as unknown; None if no label has only the values 1, 0 and -1."""
    classes = _classes(index.table)
    if not classes:
        return None
    value_SC = _labels(index.table, classes)
    value_SC[value_SC == UNCERTAIN] = np.nan
    return ImageSet(
        name=source.format,
        source=source,
        table=_table(index.table, value_SC, [None] * len(index.table)),
        rule=RULE,
        classes=classes,
        filtered=dict(index.filtered),
    )


def with_valid_as_test(images: ImageSet, seed: int) -> ImageSet:
    """The set without its test films: its validation films are the test."""
    table = images.table.filter(pc.not_equal(images.table["split"], "test"))
    group, split = (pd.Series(table[name].to_pylist(), dtype=str) for name in ("group", "split"))
    moved, rule = tested_on_valid(split, group, seed)
    column = pa.array(moved.tolist(), pa.string())
    table = table.set_column(table.schema.get_field_index("split"), "split", column)
    return replace(images, table=table, rule=f"{images.rule}, but {rule}")


def _table(studies: pa.Table, value_SC: NDArray[np.float32], annotations: list[Any]) -> pa.Table:
    """The first film of each study as ``IMAGE_SCHEMA``."""
    first = first_films(studies)
    count, classes = value_SC.shape
    offsets = np.arange(count + 1, dtype=np.int32) * classes
    columns = {
        "image_id": first["image_id"],
        "path": first["path"],
        "group": studies["group"],
        "split": studies["split"],
        "labels": pa.ListArray.from_arrays(pa.array(offsets), pa.array(value_SC.ravel())),
        "boxes": pa.array(annotations, IMAGE_SCHEMA.field("boxes").type),
        "masks": pa.array(annotations, IMAGE_SCHEMA.field("masks").type),
    }
    return pa.table(columns, schema=IMAGE_SCHEMA)


def _given(studies: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.object_], NDArray[np.float32]]:
    """Study, name and value of every given label."""
    maps = studies["labels"].combine_chunks()
    offset_S = maps.offsets.to_numpy()
    study_L = np.repeat(np.arange(len(maps)), np.diff(offset_S))
    part = slice(int(offset_S[0]), int(offset_S[-1])) if len(offset_S) else slice(0)
    names = maps.keys.to_numpy(zero_copy_only=False)[part]
    return study_L, names, maps.items.to_numpy(zero_copy_only=False)[part]


def _classes(studies: pa.Table) -> tuple[str, ...]:
    """Sorted names of the labels whose values are all 1, 0 or -1."""
    _, name_L, value_L = _given(studies)
    other_L = ~np.isin(value_L, (1, 0, UNCERTAIN))
    return tuple(sorted(set(name_L) - set(name_L[other_L])))


def _labels(studies: pa.Table, classes: tuple[str, ...]) -> NDArray[np.float32]:
    """The given label of each study and class, NaN if blank."""
    study_L, name_L, value_L = _given(studies)
    column = {name: k for k, name in enumerate(classes)}
    column_L = np.array([column.get(name, -1) for name in name_L], np.int64)
    kept_L = column_L >= 0
    value_SC = np.full((len(studies), len(classes)), np.nan, np.float32)
    value_SC[study_L[kept_L], column_L[kept_L]] = value_L[kept_L]
    return value_SC
