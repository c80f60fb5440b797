"""The objective beside FAISS's own k-means on three sets, from the same start and from k-means||."""

import pytest

from cmcgns.clustering.kmeans import faiss_assign, farthest_point_seeds, kmeans
from cmcgns.clustering.rows import RowArray
from tests.clustering.sets import SETS
from tests.clustering.test_against_faiss import ITERATIONS, check_parallel_seeding, check_same_start, objective

ROWS, CLUSTERS = 60_000, 128


@pytest.mark.parametrize("name", list(SETS))
def test_the_objective_is_that_of_faiss(name: str) -> None:
    rows_ND = SETS[name](ROWS)
    check_same_start(name, rows_ND, CLUSTERS)
    check_parallel_seeding(name, rows_ND, CLUSTERS)
    rows = RowArray(rows_ND, assign=faiss_assign("cpu", 2))
    far = objective(rows, kmeans(rows, farthest_point_seeds(rows, CLUSTERS), ITERATIONS, -1.0).centroids_KD)
    print(f"{name}, farthest points: {far:.6f} (reported only)")
