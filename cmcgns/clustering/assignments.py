"""Results of a clustering on a set of embeddings: the two nearest centroids of each row as Parquet, and statistics per cluster.

M rows of one batch, K centroids, D dimensions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from cmcgns import storage
from cmcgns.clustering.embeddings import Embeddings
from cmcgns.clustering.kmeans import DECIMALS, Array, NearestSearch
from cmcgns.clustering.rows import RowStore

CANDIDATES = 4
"""Nearest centroids by the float32 search, which float64 then ranks again."""


class TwoNearestCentroids(NamedTuple):
    """The two most similar centroids of each row; ties go to the lower index. -1 for the second if there is only one."""

    centroid_M2: Array
    """int32."""
    similarity_M2: Array
    """float32; NaN if there is no second centroid."""


class PartialStatistics(NamedTuple):
    """Statistics of one shard, to be added up over shards."""

    counts_K: Array
    similarity_K: Array
    """Sum of the members' similarities, float64."""
    nearest: pd.DataFrame
    """Rows nearest to each centroid: cluster, similarity, id and, if the set has a text column, text."""


def two_nearest(rows_MD: Array, centroids_KD: Array, search: NearestSearch) -> TwoNearestCentroids:
    """The two nearest centroids of each row: candidates by ``search``, ranked in float64."""
    _, candidate_Mc = search(rows_MD, centroids_KD, CANDIDATES)
    wide_MD, wide_KD = rows_MD.astype(np.float64), centroids_KD.astype(np.float64)
    similarity_Mc = np.stack([np.einsum("md,md->m", wide_MD, wide_KD[c_M]) for c_M in candidate_Mc.T], axis=1)
    similarity_Mc = similarity_Mc.round(DECIMALS)
    order_Mc = np.lexsort((candidate_Mc, -similarity_Mc), axis=1)[:, :2]
    centroid_M2 = np.take_along_axis(candidate_Mc, order_Mc, 1).astype(np.int32)
    similarity_M2 = np.take_along_axis(similarity_Mc, order_Mc, 1).astype(np.float32)
    if len(centroids_KD) == 1:
        centroid_M2 = np.pad(centroid_M2, ((0, 0), (0, 1)), constant_values=-1)
        similarity_M2 = np.pad(similarity_M2, ((0, 0), (0, 1)), constant_values=np.nan)
    return TwoNearestCentroids(centroid_M2, similarity_M2)


def write_assignments(
    index: int,
    part: Embeddings,
    rows: RowStore,
    centroids_KD: Array,
    folder: str,
    nearest: int,
    search: NearestSearch,
) -> PartialStatistics:
    """Statistics of one shard, with the ``nearest`` rows of each cluster.

    Writes ``part-<index>.parquet`` into ``folder``: columns id, centroid, similarity, second_centroid and
    second_similarity, in the order of the rows. Reads ids from the files of ``part`` and vectors from ``rows``.
    """
    columns, found = part.columns, _empty_statistics(len(centroids_KD))
    if not part.rows:
        return found
    with storage.writing(storage.join(folder, f"part-{index:05d}.parquet")) as file:
        first, writer = 0, None
        for batch in part.batches([columns.id, *([columns.text] if columns.text else [])]):
            two = two_nearest(rows[first : first + len(batch)], centroids_KD, search)
            table = _table(batch.column(columns.id), two)
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
            found = _with_batch(found, batch, columns.id, columns.text, two, nearest)
            first += len(batch)
        if writer is not None:
            writer.close()
    return found


def _table(ids: Any, two: TwoNearestCentroids) -> pa.Table:
    return pa.table(
        {
            "id": ids
            if pa.types.is_integer(ids.type)
            else ids.cast(pa.large_string()),  # string types may differ by file
            "centroid": two.centroid_M2[:, 0],
            "similarity": two.similarity_M2[:, 0],
            "second_centroid": two.centroid_M2[:, 1],
            "second_similarity": two.similarity_M2[:, 1],
        }
    )


def _empty_statistics(num_clusters: int) -> PartialStatistics:
    frame = pd.DataFrame({"cluster": pd.Series(dtype=np.int32), "similarity": pd.Series(dtype=np.float32)})
    return PartialStatistics(np.zeros(num_clusters, np.int64), np.zeros(num_clusters), frame)


def _with_batch(
    found: PartialStatistics,
    batch: pa.RecordBatch,
    id_column: str,
    text_column: str | None,
    two: TwoNearestCentroids,
    nearest: int,
) -> PartialStatistics:
    centroid_M, similarity_M = two.centroid_M2[:, 0], two.similarity_M2[:, 0]
    num_clusters = len(found.counts_K)
    rows = pd.DataFrame(
        {
            "cluster": centroid_M,
            "similarity": similarity_M,
            "id": pd.Series(batch.column(id_column).to_pylist(), dtype=object),
        }
        | ({"text": batch.column(text_column).to_pylist()} if text_column else {})
    )
    return PartialStatistics(
        found.counts_K + np.bincount(centroid_M, minlength=num_clusters),
        found.similarity_K + np.bincount(centroid_M, similarity_M.astype(np.float64), minlength=num_clusters),
        _best([found.nearest, rows], nearest),
    )


def _best(frames: Sequence[pd.DataFrame], nearest: int) -> pd.DataFrame:
    """The ``nearest`` rows of each cluster, most similar first; ties go to the earlier row."""
    rows = pd.concat([frame for frame in frames if len(frame)] or frames)
    ordered = rows.sort_values(["cluster", "similarity"], ascending=[True, False], kind="stable")
    return ordered.groupby("cluster").head(nearest)


def statistics(parts: Sequence[PartialStatistics], nearest: int) -> dict[str, Any]:
    """Statistics of the set and of each cluster, ready for JSON: size, cohesion (mean similarity of the members to the
    centroid, None if empty) and nearest rows."""
    counts_K = np.sum([part.counts_K for part in parts], axis=0)
    similarity_K = np.sum([part.similarity_K for part in parts], axis=0)
    best = _best([part.nearest for part in parts], nearest)
    by_cluster = {int(cluster): rows for cluster, rows in best.groupby("cluster")}
    return {
        "rows": int(counts_K.sum()),
        "mean_similarity": float(similarity_K.sum() / max(counts_K.sum(), 1)),
        "empty_clusters": int((counts_K == 0).sum()),
        "clusters": [
            {
                "cluster": k,
                "size": int(counts_K[k]),
                "cohesion": float(similarity_K[k] / counts_K[k]) if counts_K[k] else None,
                "nearest": by_cluster[k].drop(columns="cluster").to_dict("records") if k in by_cluster else [],
            }
            for k in range(len(counts_K))
        ],
    }
