"""A user's own table of images: ``masked`` with mask files or COCO boxes, ``labelled`` with a list of findings."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from cmcgns import storage
from cmcgns.data.decode import decode_image
from cmcgns.data.image import CroppedImage
from cmcgns.data.labelled.base import (
    Annotations,
    Folder,
    ImageSet,
    box,
    image_table,
    mask_on_image,
    split_by_hash,
    tested_on_valid,
)
from cmcgns.data.listed_findings import ListedFindings
from cmcgns.data.readers import FileSource, PairsSource
from cmcgns.data.readers.base import SPLIT_NAMES
from cmcgns.data.readers.pairs import with_our_names
from cmcgns.data.tables import columns_in_words, read_table, stripped
from cmcgns.data.text import decode_text
from cmcgns.errors import BadRow, UserError


@dataclass(frozen=True)
class CocoBoxes:
    """The boxes of a COCO JSON file."""

    categories: tuple[str, ...]
    by_path: dict[str, list[tuple[str, list[float]]]]
    """Category and x, y, w, h of each box, by the file_name of the image."""
    path_of: dict[str, str]
    """The file_name by its last part, if that is unique."""

    def of(self, image: str) -> list[tuple[str, list[float]]] | None:
        """The boxes of an image; None if the file does not list it."""
        if image in self.by_path:
            return self.by_path[image]
        return self.by_path.get(self.path_of.get(_last(image), ""))


def read_coco(uri: str) -> CocoBoxes:
    """The boxes in the file at ``uri``; ``UserError`` if it is not a COCO JSON."""
    try:
        return _parsed(json.loads(decode_text(storage.read_bytes(uri))))
    except json.JSONDecodeError as error:
        raise UserError(f"{uri} is not valid JSON: {error}; export it again") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{uri} is not a COCO file with boxes ({type(error).__name__}: {error}); it needs images (id, file_name), "
            "categories (id, name) and annotations (image_id, category_id, bbox of x, y, w, h)"
        ) from None


def _parsed(coco: dict[str, Any]) -> CocoBoxes:
    names = {each["id"]: str(each["name"]) for each in coco["categories"]}
    paths = {each["id"]: str(each["file_name"]) for each in coco["images"]}
    by_path: dict[str, list[tuple[str, list[float]]]] = {path: [] for path in paths.values()}
    for each in coco["annotations"]:
        x, y, w, h = (float(number) for number in each["bbox"])
        by_path[paths[each["image_id"]]].append((names[each["category_id"]], [x, y, w, h]))
    count = Counter(_last(path) for path in by_path)
    path_of = {_last(path): path for path in by_path if count[_last(path)] == 1}
    return CocoBoxes(tuple(dict.fromkeys(names[key] for key in sorted(names))), by_path, path_of)


def _last(path: str) -> str:
    return path.rpartition("/")[2]


MASK, BOXES = "_mask", "_boxes"
THRESHOLD = 127
"""Pixels of a mask file above this grey level are set."""
SHARES = {"train": 60, "valid": 20, "test": 20}


@dataclass(frozen=True)
class MaskFileSet(ImageSet):
    """Masks are paths of files, one per ``mask_classes``; null if there is none."""

    source: FileSource
    masks_uri: str = ""
    """Folder of the mask files."""

    def paint(self, row: dict[str, Any], image: CroppedImage, annotations: Annotations) -> None:
        for mask_HW, path in zip(annotations.mask_KHW, row["masks"] or [], strict=False):
            if path is not None:
                try:
                    grey_HW = decode_image(storage.read_bytes(storage.join(self.masks_uri, path)), path).grey_HW
                except BadRow as error:
                    raise BadRow(f"mask {path}: {error}") from None
                mask_HW |= mask_on_image(grey_HW > THRESHOLD, self.source, row["path"], image)


@dataclass(frozen=True)
class OwnTable:
    """How a table of the user's own is read."""

    draw_splits: bool = False
    """Ignore its column of splits."""
    findings: ListedFindings | None = None
    """Read labels too, and keep images with labels only."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Its names for columns, by ours."""
    films: str | None = None
    """Folder of the films, if it is not that of the table."""


def read_masked(source: FileSource, own: OwnTable) -> ImageSet:
    """The images of a table that have a mask or boxes; ``source`` is at its folder (``pairs.csv``) or at a CSV file."""
    at = PairsSource.at(source.uri, source.views, source.seed, films=own.films)
    source, name, findings = replace(source, uri=at.uri), at.table_name, own.findings
    folder = Folder.of(replace(source, uri=at.table_folder))
    images = Folder.of(source) if at.folder else folder
    table = _table(folder, name, own)
    kinds = {ending: [each for each in table.columns if each.endswith(ending)] for ending in (MASK, BOXES)}
    if not any(kinds.values()) and findings is None:
        raise UserError(f"{at.table_uri} has no column whose name ends in {MASK} or {BOXES}; add one")
    listed = [] if findings is None else [findings.column]
    table = table.drop_duplicates(["image", *kinds[MASK], *kinds[BOXES], *listed])  # an image may be in several pairs
    boxes, box_classes = _boxes(folder, table, kinds[BOXES])
    films = pd.DataFrame(
        {
            "image_id": table["image"],
            "path": table["image"].map(images.first),
            "group": _groups(table),
            "boxes": boxes,
            "masks": _masks(folder, table, kinds[MASK], name),
        }
    )
    annotated = films["boxes"].notna() | films["masks"].notna() | (findings is not None)
    films = films[annotated]
    if own.draw_splits:
        table = table.drop(columns="split", errors="ignore")
    films["split"], rule = _splits(table[annotated], films["group"], at.table_uri, source.seed)
    films["labels"], classes = _labels(table[annotated], films["split"], at.table_uri, findings)
    films, missing = images.present(films, name, "copy them there, give their folder in evaluate.films")
    return MaskFileSet(
        name=source.format,
        source=source,
        table=image_table(films.to_dict("records")),
        rule=rule,
        classes=classes,
        box_classes=box_classes,
        mask_classes=tuple(each.removesuffix(MASK) for each in kinds[MASK]),
        filtered=missing | ({"neither mask nor boxes": int((~annotated).sum())} if not annotated.all() else {}),
        masks_uri=at.table_folder,
    )


def read_labelled(source: FileSource, own: OwnTable) -> ImageSet:
    """The images of a table with a list of findings each, and their masks and boxes if it has any."""
    return read_masked(source, replace(own, findings=own.findings or ListedFindings()))


def _table(folder: Folder, name: str, own: OwnTable) -> pd.DataFrame:
    """The table as stripped strings, with our names for its columns."""
    listed = [] if own.findings is None else [own.findings.column]
    uri = storage.join(folder.uri, folder.label_file(name))
    table = read_table(uri, [own.columns.get("image", "image"), *listed])
    table = with_our_names(table, own.columns, ["image"], uri, of_set=folder.name)
    if not set(listed) <= set(table.columns):
        raise UserError(
            f"{uri} has no column {listed[0]} among its {columns_in_words(table)}; name the one that lists the findings with "
            f"--evaluate.findings='{{{folder.name}: {{column: NAME}}}}'"
        )
    return stripped(table)


def _labels(
    table: pd.DataFrame, split: pd.Series, file: str, findings: ListedFindings | None
) -> tuple[pd.Series, tuple[str, ...]]:
    """1 or 0 of each row for each class, NaN if unknown, and the classes."""
    if findings is None:
        return pd.Series([[]] * len(table), table.index, dtype=object), ()
    none, unknown = ({each.lower() for each in names} for names in (findings.no_finding, findings.unknown))
    lists = [[part.strip() for part in cell.split(findings.separator)] for cell in table[findings.column]]
    lower = [{entry.lower() for entry in entries} for entries in lists]
    found = [{entry for entry in entries if entry and entry.lower() not in none | unknown} for entries in lists]
    counts = Counter(entry for entries, part in zip(found, split, strict=True) if part == "train" for entry in entries)
    names = sorted(counts, key=lambda name: (-counts[name], name))
    absent = [name for name in findings.classes if name not in counts]
    if absent or not names:
        raise UserError(
            f"{file}: no training film has {absent[0] if absent else 'any finding'} in column {findings.column}, split at "
            f"'{findings.separator}'; the commonest entries are {', '.join(names[:8]) or 'blank'}"
        )
    classes = findings.classes or tuple(names[: findings.commonest])
    labels = [
        [float("nan") if entries & unknown else float(name in kept) for name in classes]
        for entries, kept in zip(lower, found, strict=True)
    ]
    return pd.Series(labels, table.index, dtype=object), classes


def _groups(table: pd.DataFrame) -> pd.Series:
    """What splits keep together: the group, otherwise the patient, otherwise the image."""
    group = table["image"]
    for name in ("patient", "group"):
        if name in table.columns:
            group = table[name].where(table[name] != "", group)
    return group


def _masks(folder: Folder, table: pd.DataFrame, columns: Sequence[str], name: str) -> pd.Series:
    """The paths of each row's mask files, null for blanks; null if all are blank."""
    for column in columns:
        missing = table.loc[~table[column].isin([*folder.paths, ""]), column]
        if len(missing):
            raise UserError(
                f"{folder.uri}: {len(missing)} files of column {column} of {name} are missing, such as "
                f"{missing.iloc[0]}; give paths relative to the folder, or leave them blank"
            )
    paths = [[path or None for path in row] for row in table[list(columns)].to_numpy().tolist()]
    return pd.Series([row if any(row) else None for row in paths], table.index, dtype=object)


def _boxes(folder: Folder, table: pd.DataFrame, columns: Sequence[str]) -> tuple[pd.Series, tuple[str, ...]]:
    """The boxes of each row, null if none of its files lists the image, and their classes."""
    names = pd.unique(table[list(columns)].to_numpy().ravel())
    files = {name: read_coco(storage.join(folder.uri, name)) for name in names if name}
    classes = tuple(dict.fromkeys(each for file in files.values() for each in file.categories))

    def of(image: str, row: list[str]) -> list[dict[str, Any]] | None:
        per_file = [files[name].of(image) for name in dict.fromkeys(row) if name]
        if all(boxes is None for boxes in per_file):
            return None
        listed = [each for boxes in per_file for each in boxes or []]
        return [box(classes.index(kind), x, y, x + w, y + h) for kind, (x, y, w, h) in listed]

    rows = zip(table["image"], table[list(columns)].to_numpy().tolist(), strict=True)
    return pd.Series([of(image, row) for image, row in rows], table.index, dtype=object), classes


def _splits(table: pd.DataFrame, groups: pd.Series, file: str, seed: int) -> tuple[pd.Series, str]:
    """Each row's split, and the rule in words."""
    drawn = split_by_hash(groups, seed, SHARES)
    if "split" not in table.columns:
        return drawn, f"60/20/20 by group, drawn with seed {seed}"
    given = table["split"].str.lower()
    unknown = given[~given.isin([*SPLIT_NAMES, ""])]
    if len(unknown):
        raise UserError(
            f"{file}: unknown split {unknown.iloc[0]} in {len(unknown)} rows; give train, valid, test or leave it "
            "blank to have it drawn"
        )
    of_group = given.map(SPLIT_NAMES).groupby(groups)
    conflicting = int((of_group.nunique() > 1).sum())
    rule = f"by the column split, otherwise 60/20/20 by group, drawn with seed {seed}"
    if conflicting:
        rule += f"; {conflicting} groups with several splits take the split of their first image"
    split = of_group.transform("first").fillna(drawn)
    if (split == "test").any() or not (split == "valid").any():
        return split, rule
    split, instead = tested_on_valid(split, groups, seed)
    return split, f"{rule}; without test films {instead}"
