"""Prepared sets of any size, written without Ray: a few shards with rows, and names for many more that link to them."""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cmcgns.data.manifest import MANIFEST, Manifest, Shard, describe_row_group, joint_hash, write_shards
from cmcgns.data.record import PREPARED_SCHEMA

SIDE = 4


def film(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE), number % 256, np.uint8)).save(file, "PNG")
    return file.getvalue()


FILMS = [film(number) for number in range(256)]


def rows_of(numbers: range, split: str, views: Callable[[int], Sequence[str]] = lambda number: ("PA",)) -> pa.Table:
    """One row for each film of the studies ``numbers``, which have these ``views``."""
    taken = [(number, view, film) for number in numbers for film, view in enumerate(views(number))]
    of = [number for number, _, _ in taken]
    return pa.table(
        {
            "patient_id": [f"p{number}" for number in of],
            "study_id": [f"{split} {number}" for number in of],
            "group": [f"p{number}" for number in of],
            "image_id": [f"{split} {number} {film}" for number, _, film in taken],
            "view": [view for _, view, _ in taken],
            "split": [split] * len(of),
            "image": [FILMS[number % 256] for number in of],
            "height": [SIDE] * len(of),
            "width": [SIDE] * len(of),
            "crop": [[0, 0, SIDE, SIDE]] * len(of),
            "report": ["No effusion is seen."] * len(of),
            "sentences": [["no effusion is seen"]] * len(of),
            "labels": [[("Edema", float(number % 2))] for number in of],
            "source": [f"{number}.png" for number in of],
        },
        schema=PREPARED_SCHEMA,
    )


def write_shard(path: Path, groups: Sequence[tuple[int, pa.Table]], split: str) -> Shard:
    """A shard of row groups, each with its group number."""
    described = []
    with pq.ParquetWriter(path, PREPARED_SCHEMA) as writer:
        for number, rows in groups:
            writer.write_table(rows, row_group_size=len(rows))
            described.append(describe_row_group(number, rows, len(set(rows["study_id"].to_pylist()))))
    return Shard(path.name, split, path.stat().st_size, described)


def small_set(
    folder: Path, studies: dict[str, int], group: int, shard: int, views: Callable[[int], Sequence[str]],
    lost: Sequence[int] = (),
) -> str:  # fmt: skip
    """A set with ``studies`` by split, in groups of ``group``, ``shard`` groups to a shard; the groups ``lost`` had no usable
    study when it was prepared."""
    folder.mkdir()
    shards = []
    for split, size in studies.items():
        kept = [number for number in range(-(-size // group)) if number not in lost]
        for file in range(0, len(kept), shard):
            tables = [
                (number, rows_of(range(number * group, min((number + 1) * group, size)), split, views))
                for number in kept[file : file + shard]
            ]
            shards.append(write_shard(folder / f"{split}-{file // shard:05d}.parquet", tables, split))
    groups = {split: -(-size // group) for split, size in studies.items()}
    found = {view for size in studies.values() for number in range(size) for view in views(number)}
    write_manifest(folder, shards, len(shards), groups, sorted(found))
    return str(folder)


def write_manifest(
    folder: Path, shards: Iterable[Shard], number: int, groups: dict[str, int], views: Sequence[str]
) -> None:
    """The manifest of ``number`` shards, whose films have these ``views``."""
    rows = studies = 0
    hashes = list[str]()

    def told() -> Iterator[Shard]:
        nonlocal rows, studies
        for shard in shards:
            rows, studies = rows + shard.rows, studies + shard.studies
            hashes.extend(each.content_hash for each in shard.row_groups)
            yield shard

    entries = write_shards(str(folder), told(), number)
    summary = {"splits": {split: {"views": dict.fromkeys(views, 1)} for split in groups}}
    manifest = Manifest(rows, studies, joint_hash(hashes), groups, entries, {}, {}, 0, {}, summary)
    (folder / MANIFEST).write_text(manifest.to_json())


def large_set(folder: Path, studies: int, group: int = 256, shard: int = 28, valid: int = 1024, drawn: int = 4) -> str:
    """A set of ``studies`` training and ``valid`` validation studies of one tiny film each; ``drawn`` of its shards have files of
    their own, the others are links to them."""
    folder.mkdir()
    kinds = []
    for kind in range(drawn):
        groups = range(kind * shard, (kind + 1) * shard)
        tables = [(number, rows_of(range(number * group, (number + 1) * group), "train")) for number in groups]
        kinds.append(write_shard(folder / f"train-{kind:05d}.parquet", tables, "train"))
    files = studies // (group * shard)

    def shards() -> Iterator[Shard]:
        for file in range(files):
            kind = kinds[file % drawn]
            name = f"train-{file:05d}.parquet"
            if file >= drawn:
                os.link(folder / kind.name, folder / name)
            groups = [
                replace(each, group=number) for each, number in zip(kind.row_groups, count(file * shard), strict=False)
            ]
            yield replace(kind, name=name, row_groups=groups)
        yield write_shard(folder / "valid-00000.parquet", [(0, rows_of(range(valid), "valid"))], "valid")

    write_manifest(folder, shards(), files + 1, {"train": files * shard, "valid": 1}, ["PA"])
    return str(folder)
