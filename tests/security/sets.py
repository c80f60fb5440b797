"""A prepared set of a few rows, written without Ray."""

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cmcgns.data.manifest import Manifest, Shard, describe_row_group, joint_hash
from cmcgns.data.record import PREPARED_SCHEMA

SIDE = 8


def plain_rows(split: str = "train", count: int = 3) -> pa.Table:
    """Rows of a prepared set, each a study of its own."""
    ids = {name: [f"{name} {i}" for i in range(count)] for name in ("patient_id", "study_id", "group", "image_id")}
    films = [np.full((SIDE, SIDE), 10 * i, np.uint8) for i in range(count)]
    rest = {
        "view": ["AP"] * count, "split": [split] * count, "source": ["x"] * count,
        "image": [cv2.imencode(".png", film)[1].tobytes() for film in films],
        "height": [SIDE] * count, "width": [SIDE] * count, "crop": [[0, 0, SIDE, SIDE]] * count,
        "report": [f"Lungs are clear {i}." for i in range(count)],
        "sentences": [[f"lungs are clear {i}"] for i in range(count)],
        "labels": [[("clear", 1.0)]] * count,
    }  # fmt: skip
    return pa.table(ids | rest, schema=PREPARED_SCHEMA)


def write_prepared_set(folder: Path, train: pa.Table, written: pa.Table | None = None) -> None:
    """A set of one shard whose manifest describes ``train``; its file has the rows ``written`` if they are others."""
    folder.mkdir()
    name = "train-00000.parquet"
    pq.write_table(train if written is None else written, folder / name)
    group = describe_row_group(0, train, len(train))
    shard = Shard(name, "train", (folder / name).stat().st_size, [group])
    manifest = Manifest(len(train), len(train), joint_hash([group.content_hash]), {"train": 1}, [shard], {}, {}, 0, {})
    (folder / "manifest.json").write_text(manifest.to_json())
