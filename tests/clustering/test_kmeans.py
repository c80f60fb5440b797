"""K-means, seeding and merging against slow loops, FAISS against numpy."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cmcgns.clustering.kmeans import Array, faiss_assign, kmeans, normalised, numpy_assign
from cmcgns.clustering.pool import PooledRows
from cmcgns.clustering.rows import RowArray
from cmcgns.clustering.seeding import farthest_point_seeds


def clustered_rows(number: int, seed: int = 0, clusters: int = 5, dim: int = 16) -> Array:
    """Normalised float32 rows around a few directions."""
    random = np.random.default_rng(seed)
    centres_KD = random.normal(size=(clusters, dim))
    return normalised(centres_KD[random.integers(0, clusters, number)] + 0.4 * random.normal(size=(number, dim)))


def slow_kmeans(rows_ND: Array, centroids_KD: Array, iterations: int) -> Array:
    centroids = [row.astype(np.float64) for row in centroids_KD]
    for _ in range(iterations):
        members: list[list[Array]] = [[] for _ in centroids]
        for row in rows_ND.astype(np.float64):
            members[int(np.argmax([row @ centroid for centroid in centroids]))].append(row)
        for k, own in enumerate(members):
            if own:
                total = np.sum(own, axis=0)
                centroids[k] = total / np.linalg.norm(total)
    return np.stack(centroids)


def slow_seeds(rows_ND: Array, number: int) -> list[int]:
    mean_D = rows_ND.mean(0)
    chosen = [int(np.argmax([row @ mean_D for row in rows_ND]))]
    while len(chosen) < number:
        distance = [1 - max(float(row @ rows_ND[seed]) for seed in chosen) for row in rows_ND]
        chosen.append(int(np.argmax(distance)))  # the first of equals
    return chosen


class Shards(PooledRows):
    """A pool in one process: its merging without its actors."""

    def __init__(self, parts: Sequence[RowArray]) -> None:
        super().__init__([], [len(part) for part in parts])
        self.parts = parts

    def _merged(self, merge: Callable[..., Any], method: str, *arguments: Any) -> Any:
        return merge(*[getattr(part, method)(*arguments) for part in self.parts if len(part)])


@pytest.mark.parametrize("spread", [1.0, 1e-6])
def test_faiss_assigns_every_row_as_numpy_does(spread: float) -> None:
    """Also where rows and centroids are so much alike that float32 cannot tell which is nearest."""
    alike_D = clustered_rows(1)
    rows_ND = RowArray(normalised(alike_D + spread * clustered_rows(3000)), assign=numpy_assign).rows_ND
    centroids_KD = normalised(alike_D + spread * clustered_rows(20, seed=1))
    expected_N = (rows_ND.astype(np.float64) @ centroids_KD.T.astype(np.float64)).argmax(1)
    assert (numpy_assign(rows_ND, centroids_KD).nearest_N == expected_N).mean() > 0.999  # but for ties of twelve digits
    assert (
        faiss_assign("cpu", 1)(rows_ND, centroids_KD).nearest_N == numpy_assign(rows_ND, centroids_KD).nearest_N
    ).all()
    ours = RowArray(rows_ND, assign=faiss_assign("cpu", 1)).assign(centroids_KD)
    theirs = RowArray(rows_ND, assign=numpy_assign).assign(centroids_KD)
    assert (ours.counts_K == theirs.counts_K).all()
    assert np.array_equal(ours.sums_KD, theirs.sums_KD)


def test_kmeans_finds_the_centroids_of_a_slow_loop() -> None:
    rows_ND = clustered_rows(400)
    start_KD = rows_ND[:6]
    found = kmeans(RowArray(rows_ND, assign=numpy_assign), start_KD, iterations=5, tolerance=0.0)
    # centroids are float32 between iterations
    np.testing.assert_allclose(found.centroids_KD, slow_kmeans(rows_ND, start_KD, found.iteration), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.centroids_KD, axis=1), 1.0, atol=1e-6)


def test_kmeans_never_gets_worse_and_stops_once_it_no_longer_gets_better() -> None:
    rows = RowArray(clustered_rows(400), assign=numpy_assign)
    objectives = [kmeans(rows, rows.rows_ND[:6], n, 0.0).objective for n in range(1, 10)]
    assert all(later >= earlier - 1e-7 for earlier, later in pairwise(objectives))
    assert kmeans(rows, rows.rows_ND[:6], 100, 1e-4).iteration < 100


def test_farthest_point_seeds_are_those_of_a_slow_loop() -> None:
    rows_ND = clustered_rows(200)
    expected = slow_seeds(rows_ND, 12)
    seeds_KD = farthest_point_seeds(RowArray(rows_ND, assign=numpy_assign), 12)
    np.testing.assert_allclose(seeds_KD, rows_ND[expected], rtol=0, atol=1e-6)


def test_of_equally_far_rows_the_earliest_is_the_seed() -> None:
    rows_ND = np.array([[1, 0, 0], [0.9, 0, 0.1], [0, 1, 0], [0, 0, 1], [0, 1, 0]], np.float32)
    rows = RowArray(rows_ND, np.array([10, 11, 12, 13, 14]), numpy_assign)
    assert rows.farthest(rows.rows_ND[[0, 3]]).ordinal == 12
    assert rows.nearest(np.array([0, 1, 0], np.float32)).ordinal == 12


def test_fewer_distinct_rows_than_clusters_is_an_error_with_both_numbers() -> None:
    rows_ND = np.repeat(clustered_rows(3), 10, axis=0)
    with pytest.raises(ValueError, match=r"5 clusters need 5 distinct rows; there are 3 among 30"):
        farthest_point_seeds(RowArray(rows_ND, assign=numpy_assign), 5)


def test_empty_clusters_take_the_worst_served_rows_in_centroid_order() -> None:
    rows_ND = RowArray(clustered_rows(60), assign=numpy_assign).rows_ND
    start_KD = rows_ND[[0, 0, 1, 0]]  # of equal centroids the first takes the members: 1 and 3 stay empty
    worst = np.argsort((rows_ND @ start_KD.T).max(1), kind="stable")[:2]
    found = kmeans(RowArray(rows_ND, assign=numpy_assign), start_KD, iterations=1, tolerance=0.0)
    assert found.reseeded == 2
    np.testing.assert_allclose(found.centroids_KD[[1, 3]], rows_ND[worst], rtol=0, atol=1e-6)


def test_equal_rows_reseed_one_cluster_only() -> None:
    rows_ND = normalised(np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0.6, 0, 0.8]], np.float32))
    rows = RowArray(rows_ND, assign=numpy_assign)
    assert [row.ordinal for row in rows.worst_served(rows_ND[:1], 2)] == [1, 3]


@pytest.mark.parametrize("spread", [1.0, 1e-2])
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_find_the_centroids_of_one_array_bit_for_bit(shards: int, spread: float) -> None:
    rows_ND = normalised(clustered_rows(1) + spread * clustered_rows(500))
    cuts = np.sort(np.random.default_rng(shards).choice(np.arange(1, 500), shards - 1, replace=False))
    order = [np.arange(500)[part] for part in np.split(np.random.default_rng(3).permutation(500), cuts)]
    whole = RowArray(rows_ND, assign=numpy_assign)
    parts = Shards([RowArray(rows_ND[np.sort(own)], np.sort(own), faiss_assign("cpu", 1)) for own in order])
    assert np.array_equal(parts.mean(), whole.mean())
    seeds_KD = farthest_point_seeds(whole, 9)
    assert np.array_equal(farthest_point_seeds(parts, 9), seeds_KD)
    # a seed turned away from the rows stays empty and is filled
    start_KD = np.concatenate([seeds_KD, -seeds_KD.mean(0, keepdims=True)])
    ours, theirs = kmeans(parts, start_KD, 10, 1e-4), kmeans(whole, start_KD, 10, 1e-4)
    assert np.array_equal(ours.centroids_KD, theirs.centroids_KD)
    assert (ours.iteration, ours.reseeded) == (theirs.iteration, theirs.reseeded)
    assert theirs.reseeded


def test_rows_are_put_on_the_sphere_and_large_sets_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_ND = clustered_rows(100)
    whole = RowArray(3 * rows_ND, assign=numpy_assign)
    np.testing.assert_allclose(np.linalg.norm(whole.rows_ND, axis=1), 1.0, atol=1e-6)
    in_one = whole.assign(rows_ND[:5])
    monkeypatch.setattr("cmcgns.clustering.rows.CHUNK_ROWS", 7)
    in_chunks = whole.assign(rows_ND[:5])
    assert (in_one.counts_K == in_chunks.counts_K).all()
    np.testing.assert_allclose(in_one.sums_KD, in_chunks.sums_KD, atol=1e-12)
