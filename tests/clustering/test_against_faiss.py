"""Objectives compared with those of FAISS's own k-means on all rows."""

from statistics import median

import faiss
import numpy as np
import pytest

from cmcgns.clustering.kmeans import Array, faiss_assign, kmeans, parallel_seeds
from cmcgns.clustering.rows import RowArray
from tests.clustering.sets import SETS

ROWS, CLUSTERS, ITERATIONS = 8000, 40, 10


def faiss_centroids(rows_ND: Array, clusters: int, start_KD: Array | None, seed: int = 0) -> Array:
    model = faiss.Kmeans(
        rows_ND.shape[1], clusters, niter=ITERATIONS, spherical=True, max_points_per_centroid=10**9, seed=seed + 1
    )
    model.train(rows_ND, init_centroids=start_KD)
    return model.centroids


def objective(rows: RowArray, centroids_KD: Array) -> float:
    return rows.assign(centroids_KD).objective(centroids_KD)


def check_same_start(name: str, rows_ND: Array, clusters: int) -> None:
    """At most 1 % worse from the same centroids."""
    rows = RowArray(rows_ND, assign=faiss_assign("cpu", 1))
    start_KD = rows.subset(clusters, 0)
    ours = objective(rows, kmeans(rows, start_KD, ITERATIONS, -1.0).centroids_KD)
    theirs = objective(rows, faiss_centroids(rows.rows_ND[: len(rows)], clusters, start_KD))
    print(f"{name}, same start: {ours:.6f}, FAISS {theirs:.6f}, {(ours - theirs) / theirs:+.3%}")
    assert ours >= 0.99 * theirs


def check_parallel_seeding(name: str, rows_ND: Array, clusters: int) -> None:
    """The median of 5 seeds at most 0.1 % worse than from FAISS's random rows."""
    rows = RowArray(rows_ND, assign=faiss_assign("cpu", 1))
    ours = [
        objective(rows, kmeans(rows, parallel_seeds(rows, clusters, seed), ITERATIONS, -1.0).centroids_KD)
        for seed in range(5)
    ]
    theirs = [objective(rows, faiss_centroids(rows.rows_ND[: len(rows)], clusters, None, seed)) for seed in range(5)]
    gain = (median(ours) - median(theirs)) / median(theirs)
    print(f"{name}, k-means||: {median(ours):.6f}, FAISS's random start {median(theirs):.6f}, {gain:+.3%}")
    assert median(ours) >= 0.999 * median(theirs)


@pytest.mark.parametrize("name", list(SETS))
def test_from_the_same_centroids_the_objective_is_that_of_faiss(name: str) -> None:
    check_same_start(name, SETS[name](ROWS), CLUSTERS)


@pytest.mark.parametrize("name", list(SETS))
def test_parallel_seeding_is_no_worse_than_random_rows(name: str) -> None:
    check_parallel_seeding(name, SETS[name](ROWS), CLUSTERS)


def test_the_sets_are_on_the_sphere() -> None:
    for make in SETS.values():
        np.testing.assert_allclose(np.linalg.norm(make(100), axis=1), 1.0, atol=1e-6)
