"""K-means, seeding and merging compared with slow loops, FAISS with numpy."""

from itertools import pairwise

import numpy as np
import pytest

from cmcgns.clustering.kmeans import (
    BLOCK_ROWS,
    Array,
    Fit,
    batch_blocks,
    faiss_assign,
    farthest_point_seeds,
    kmeans,
    normalised,
    numpy_assign,
)
from cmcgns.clustering.rows import RowArray
from tests.clustering.sets import cuts, heavy_tailed, separated
from tests.clustering.shards import Shards, shards_of


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
        chosen.append(int(np.argmax(distance)))  # ties go to the first
    return chosen


@pytest.mark.parametrize("spread", [1.0, 1e-6])
def test_faiss_assigns_every_row_as_numpy_does(spread: float) -> None:
    """Also if rows and centroids are so similar that float32 cannot decide which is nearest."""
    alike_D = clustered_rows(1)
    rows_ND = RowArray(normalised(alike_D + spread * clustered_rows(3000)), assign=numpy_assign).rows_ND
    centroids_KD = normalised(alike_D + spread * clustered_rows(20, seed=1))
    expected_N = (rows_ND.astype(np.float64) @ centroids_KD.T.astype(np.float64)).argmax(1)
    assert (numpy_assign(rows_ND, centroids_KD).nearest_N == expected_N).mean() > 0.999  # except ties in twelve digits
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


def test_ties_of_the_farthest_row_go_to_the_earliest() -> None:
    rows_ND = np.array([[1, 0, 0], [0.9, 0, 0.1], [0, 1, 0], [0, 0, 1], [0, 1, 0]], np.float32)
    rows = RowArray(rows_ND, np.array([10, 11, 12, 13, 14]), numpy_assign)
    assert rows.farthest(rows.rows_ND[[0, 3]]).ordinal == 12
    assert rows.nearest(np.array([0, 1, 0], np.float32)).ordinal == 12


def test_fewer_distinct_rows_than_clusters_is_an_error_with_both_numbers() -> None:
    rows_ND = np.repeat(clustered_rows(3), 10, axis=0)
    with pytest.raises(ValueError, match=r"5 clusters need 5 distinct rows; there are 3 among 30"):
        farthest_point_seeds(RowArray(rows_ND, assign=numpy_assign), 5)


def test_empty_clusters_get_the_worst_assigned_rows_in_centroid_order() -> None:
    rows_ND = RowArray(clustered_rows(60), assign=numpy_assign).rows_ND
    start_KD = rows_ND[[0, 0, 1, 0]]  # the first of equal centroids gets the members: 1 and 3 stay empty
    worst = np.argsort((rows_ND @ start_KD.T).max(1), kind="stable")[:2]
    found = kmeans(RowArray(rows_ND, assign=numpy_assign), start_KD, iterations=1, tolerance=0.0)
    assert found.reseeded == 2
    np.testing.assert_allclose(found.centroids_KD[[1, 3]], rows_ND[worst], rtol=0, atol=1e-6)


def test_equal_rows_reseed_one_cluster_only() -> None:
    rows_ND = normalised(np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0.6, 0, 0.8]], np.float32))
    rows = RowArray(rows_ND, assign=numpy_assign)
    assert [row.ordinal for row in rows.worst_assigned(rows_ND[:1], 2)] == [1, 3]


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
    # a seed that points away from all rows has no members and is re-seeded
    start_KD = np.concatenate([seeds_KD, -seeds_KD.mean(0, keepdims=True)])
    ours, theirs = kmeans(parts, start_KD, 10, 1e-4), kmeans(whole, start_KD, 10, 1e-4)
    assert np.array_equal(ours.centroids_KD, theirs.centroids_KD)
    assert (ours.iteration, ours.reseeded) == (theirs.iteration, theirs.reseeded)
    assert theirs.reseeded


def test_rows_are_normalised_and_large_sets_are_processed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_ND = clustered_rows(100)
    whole = RowArray(3 * rows_ND, assign=numpy_assign)
    np.testing.assert_allclose(np.linalg.norm(whole.rows_ND, axis=1), 1.0, atol=1e-6)
    in_one = whole.assign(rows_ND[:5])
    monkeypatch.setattr("cmcgns.clustering.rows.CHUNK_ROWS", 7)
    in_chunks = whole.assign(rows_ND[:5])
    assert (in_one.counts_K == in_chunks.counts_K).all()
    np.testing.assert_allclose(in_one.sums_KD, in_chunks.sums_KD, atol=1e-12)


def test_a_fit_resumed_at_any_iteration_gives_the_same_result() -> None:
    rows, seen = RowArray(heavy_tailed(2000), assign=numpy_assign), list[Fit]()
    whole = kmeans(rows, rows.rows_ND[:30], 8, 0.0, after=seen.append)
    assert [fit.iteration for fit in seen] == list(range(1, whole.iteration + 1))
    for fit in seen:
        assert np.array_equal(kmeans(rows, fit, 8, 0.0).centroids_KD, whole.centroids_KD)


def test_a_weight_counts_like_that_many_equal_rows() -> None:
    rows_ND = heavy_tailed(300)
    weights_N = np.random.default_rng(0).integers(1, 5, 300)
    weighted = RowArray(rows_ND, assign=numpy_assign, weights_N=weights_N.astype(np.float64))
    repeated = RowArray(np.repeat(rows_ND, weights_N, axis=0), assign=numpy_assign)
    ours, theirs = (kmeans(rows, rows_ND[:10], 6, 0.0) for rows in (weighted, repeated))
    np.testing.assert_allclose(ours.centroids_KD, theirs.centroids_KD, atol=1e-7)
    assert ours.objective == pytest.approx(theirs.objective, rel=1e-12)
    assert weighted.total_distance(rows_ND[:10]) == pytest.approx(repeated.total_distance(rows_ND[:10]), rel=1e-12)
    assert weighted.seed_weights(rows_ND[:10]).tolist() == repeated.seed_weights(rows_ND[:10]).tolist()


@pytest.mark.parametrize("shards", [1, 3])
def test_mini_batches_of_shards_are_those_of_one_array_bit_for_bit(shards: int) -> None:
    rows_ND = heavy_tailed(6 * BLOCK_ROWS + 100)
    whole = RowArray(rows_ND, assign=numpy_assign)
    parts = Shards(shards_of(rows_ND, cuts(len(rows_ND), shards)))
    theirs = kmeans(whole, rows_ND[:25], 5, 0.0, batch_rows=2 * BLOCK_ROWS, seed=3)
    ours = kmeans(parts, rows_ND[:25], 5, 0.0, batch_rows=2 * BLOCK_ROWS, seed=3)
    assert np.array_equal(ours.centroids_KD, theirs.centroids_KD)
    assert ours.objective == theirs.objective


def test_mini_batches_come_near_the_objective_of_all_rows() -> None:
    rows = RowArray(separated(10 * BLOCK_ROWS), assign=faiss_assign("cpu", 1))
    start_KD = farthest_point_seeds(rows, 20)
    whole = rows.assign(kmeans(rows, start_KD, 10, 0.0).centroids_KD)
    small = kmeans(rows, start_KD, 10, 0.0, batch_rows=BLOCK_ROWS)
    assert whole.counts_K.min() > 0
    assert small.objective == pytest.approx(kmeans(rows, start_KD, 10, 0.0).objective, rel=1e-3)


def test_each_mini_batch_is_a_new_draw_of_blocks() -> None:
    count = 10 * BLOCK_ROWS + 1
    draws = [batch_blocks(count, 3 * BLOCK_ROWS - 5, 0, iteration).tolist() for iteration in range(200)]
    assert all(len(set(blocks)) == 3 and blocks == sorted(blocks) for blocks in draws)
    times = np.bincount(np.concatenate(draws), minlength=11)
    assert times.min() > 30  # expected: 55 times for each of 11 blocks
    assert batch_blocks(count, 10**9, 0, 0).tolist() == list(range(11))


def test_worst_assigned_rows_are_those_of_the_given_blocks() -> None:
    """Whichever pass ran before."""
    rows_ND = heavy_tailed(3 * BLOCK_ROWS)
    fresh, used = (RowArray(rows_ND, assign=numpy_assign) for _ in range(2))
    used.assign(rows_ND[:5], np.array([1]))
    for blocks in (None, np.array([0, 2]), np.array([1])):
        wanted = fresh.worst_assigned(rows_ND[:5], 3, blocks)
        assert [row.ordinal for row in used.worst_assigned(rows_ND[:5], 3, blocks)] == [row.ordinal for row in wanted]
        inside = np.isin(np.arange(len(rows_ND)) // BLOCK_ROWS, [0, 1, 2] if blocks is None else blocks)
        served_N = np.where(inside, (fresh.rows_ND[: len(rows_ND)] @ rows_ND[:5].T).max(1), np.inf)
        assert wanted[0].ordinal == int(served_N.argmin())
