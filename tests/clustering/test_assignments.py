"""Two nearest centroids of each row and statistics of each cluster, compared with slow loops."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from cmcgns.clustering.assignments import statistics, two_nearest, write_assignments
from cmcgns.clustering.embeddings import Columns, StreamedRows, open_embeddings
from cmcgns.clustering.kmeans import Array, faiss_search, normalised
from cmcgns.clustering.rows import round_to_grid
from tests.clustering.sets import heavy_tailed, write_parquet

SEARCH = faiss_search("cpu", 1)


def slow_similarity(rows_ND: Array, centroids_KD: Array) -> Array:
    return (rows_ND.astype(np.float64) @ centroids_KD.T.astype(np.float64)).round(12)


@pytest.mark.parametrize("spread", [1.0, 1e-6])
def test_the_two_nearest_are_those_of_all_similarities_in_float64(spread: float) -> None:
    """Also if float32 cannot decide which is nearer."""
    alike_D = heavy_tailed(1)
    rows_ND = round_to_grid(normalised(alike_D + spread * heavy_tailed(2000)))
    centroids_KD = normalised(alike_D + spread * heavy_tailed(3, seed=1))
    found, slow_NK = two_nearest(rows_ND, centroids_KD, SEARCH), slow_similarity(rows_ND, centroids_KD)
    order_NK = np.argsort(-slow_NK, axis=1, kind="stable")
    assert (found.centroid_M2 == order_NK[:, :2]).all()
    np.testing.assert_allclose(found.similarity_M2, np.take_along_axis(slow_NK, order_NK[:, :2], 1), atol=1e-7)


def test_with_one_centroid_there_is_no_second() -> None:
    rows_ND = round_to_grid(heavy_tailed(10))
    found = two_nearest(rows_ND, rows_ND[:1], SEARCH)
    assert (found.centroid_M2 == [0, -1]).all()
    assert np.isnan(found.similarity_M2[:, 1]).all()


def test_assignments_are_written_by_id_and_clusters_are_counted(tmp_path: Path) -> None:
    rows_ND, centroids_KD = heavy_tailed(9000), normalised(heavy_tailed(12, seed=3))
    centroids_KD[5] = -heavy_tailed(9000).mean(0) / np.linalg.norm(
        heavy_tailed(9000).mean(0)
    )  # has few members or none
    embeddings = open_embeddings(
        str(write_parquet(tmp_path / "set", rows_ND, [0, 4000, 9000])), Columns("id", "vector", None, "text")
    )
    parts = [
        write_assignments(i, part, StreamedRows(part), centroids_KD, str(tmp_path / "out"), 3, SEARCH)
        for i, part in enumerate(embeddings.split(2))
    ]
    table = parquet.read_table(tmp_path / "out").to_pandas()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    assert table["id"].tolist() == [f"row-{i}" for i in range(9000)]
    slow_NK = slow_similarity(round_to_grid(rows_ND), centroids_KD)
    nearest_N = slow_NK.argmax(1)
    assert table["centroid"].tolist() == nearest_N.tolist()
    assert (table["second_similarity"] <= table["similarity"]).all()

    found = statistics(parts, 3)
    assert found["rows"] == 9000
    assert found["mean_similarity"] == pytest.approx(slow_NK.max(1).mean(), rel=1e-6)
    for cluster in found["clusters"]:
        members = np.flatnonzero(nearest_N == cluster["cluster"])
        assert cluster["size"] == len(members)
        if not len(members):
            assert cluster["cohesion"] is None
            continue
        own = slow_NK[members, cluster["cluster"]]
        assert cluster["cohesion"] == pytest.approx(own.mean(), rel=1e-6)
        best = members[np.argsort(-own.astype(np.float32), kind="stable")[:3]]
        assert [row["id"] for row in cluster["nearest"]] == [f"row-{i}" for i in best]
        assert [row["text"] for row in cluster["nearest"]] == [f"sentence {i}" for i in best]


def test_a_shard_without_rows_writes_nothing_and_string_ids_of_both_types_are_merged(tmp_path: Path) -> None:
    rows_ND, out = normalised(heavy_tailed(6)), tmp_path / "out"
    for number, kind in enumerate((pa.string(), pa.large_string())):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows_ND[3 * number :][:3].ravel()), rows_ND.shape[1])
        table = pa.table({"id": pa.array([f"[{number}/{i}]" for i in range(3)], kind), "vector": vectors})
        (tmp_path / "set").mkdir(exist_ok=True)
        parquet.write_table(table, tmp_path / "set" / f"{number}.parquet")
    whole = open_embeddings(str(tmp_path / "set"), Columns("id", "vector", None, None))
    for index, part in enumerate((whole, whole.slice_rows(6, 6))):
        write_assignments(index, part, StreamedRows(part), rows_ND[:2], str(out), 1, SEARCH)
    assert [path.name for path in out.iterdir()] == ["part-00000.parquet"]
    assert parquet.read_table(out)["id"].to_pylist() == ["[0/0]", "[0/1]", "[0/2]", "[1/0]", "[1/1]", "[1/2]"]
