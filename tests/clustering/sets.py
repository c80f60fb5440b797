"""Sets of rows that are easy and hard for k-means, and the same rows as Parquet."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from cmcgns.clustering.kmeans import Array, normalised


def separated(rows: int, clusters: int = 20, dim: int = 64, seed: int = 0) -> Array:
    """A mixture of separate components."""
    random = np.random.default_rng(seed)
    centres_KD = random.normal(size=(clusters, dim))
    return normalised(centres_KD[random.integers(0, clusters, rows)] + 0.1 * random.normal(size=(rows, dim)))


def heavy_tailed(rows: int, dim: int = 64, seed: int = 0) -> Array:
    """A few huge clusters and many tiny ones (sizes as 1 / rank), with outliers (Student, 2 degrees)."""
    random = np.random.default_rng(seed)
    share = 1 / np.arange(1, 201)
    centres = random.normal(size=(200, dim))
    return normalised(
        centres[random.choice(200, rows, p=share / share.sum())] + 0.3 * random.standard_t(2, size=(rows, dim))
    )


def near_duplicates(rows: int, dim: int = 64, seed: int = 0) -> Array:
    """Few distinct rows, each repeated with differences in the sixth digit, like stock sentences."""
    random = np.random.default_rng(seed)
    distinct = random.normal(size=(max(rows // 50, 2), dim))
    return normalised(distinct[random.integers(0, len(distinct), rows)] + 1e-6 * random.normal(size=(rows, dim)))


SETS = {"separated": separated, "heavy_tailed": heavy_tailed, "near_duplicates": near_duplicates}


def cuts(rows: int, shards: int, seed: int = 0) -> list[int]:
    """Bounds of uneven shards: a small first one, a large last one."""
    inner = np.sort(np.random.default_rng(seed).choice(np.arange(1, rows // 2), shards - 1, replace=False))
    return [0, *inner.tolist(), rows]


def write_parquet(
    folder: Path,
    rows_ND: Array,
    bounds: Sequence[int],
    row_group_size: int = 700,
    fixed: bool = True,
    weights_N: Array | None = None,
) -> Path:
    """The rows as one file for each run between consecutive ``bounds``; ids are ``row-<ordinal>``."""
    folder.mkdir(parents=True, exist_ok=True)
    dim = rows_ND.shape[1]
    for number, (start, stop) in enumerate(pairwise(bounds)):
        part_MD = rows_ND[start:stop]
        flat = pa.array(part_MD.ravel())
        offsets = pa.array(np.arange(0, len(flat) + 1, dim, dtype=np.int32))
        vectors = pa.FixedSizeListArray.from_arrays(flat, dim) if fixed else pa.ListArray.from_arrays(offsets, flat)
        columns = {"id": [f"row-{i}" for i in range(start, stop)], "vector": vectors}
        columns["text"] = [f"sentence {i}" for i in range(start, stop)]
        if weights_N is not None:
            columns["weight"] = pa.array(weights_N[start:stop])
        parquet.write_table(pa.table(columns), folder / f"part-{number:03d}.parquet", row_group_size=row_group_size)
    return folder
