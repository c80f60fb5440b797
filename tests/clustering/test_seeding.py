"""Seeds of k-means: good ones, and the same wherever rows are stored."""

import numpy as np
import pytest

from cmcgns.clustering.kmeans import SEEDINGS, Array, faiss_assign, kmeans, numpy_assign, parallel_seeds, random_seeds
from cmcgns.clustering.rows import RowArray, uniform_by_ordinal
from cmcgns.errors import UserError
from tests.clustering.sets import cuts, heavy_tailed, separated
from tests.clustering.shards import Shards, shards_of


def slow_distance(rows_ND: Array, seeds_nD: Array) -> Array:
    return np.array([1 - max(float(row @ seed) for seed in seeds_nD) for row in rows_ND.astype(np.float64)])


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
@pytest.mark.parametrize("seeding", list(SEEDINGS))
def test_shards_find_the_seeds_of_one_array_bit_for_bit(seeding: str, shards: int) -> None:
    rows_ND = heavy_tailed(3000)
    whole_KD = SEEDINGS[seeding](RowArray(rows_ND, assign=numpy_assign), 20, 5)
    parts_KD = SEEDINGS[seeding](Shards(shards_of(rows_ND, cuts(3000, shards))), 20, 5)
    assert whole_KD.shape == (20, 64)
    assert np.array_equal(parts_KD, whole_KD)


def test_another_seed_gives_other_random_rows_and_the_same_seed_the_same() -> None:
    rows = RowArray(separated(500), assign=numpy_assign)
    assert np.array_equal(random_seeds(rows, 8, 1), random_seeds(rows, 8, 1))
    assert not np.array_equal(random_seeds(rows, 8, 1), random_seeds(rows, 8, 2))
    distinct = {row.tobytes() for row in random_seeds(rows, 500, 1)}
    assert len(distinct) == 500  # all rows, once each


def test_rows_are_drawn_in_proportion_to_their_distance() -> None:
    rows = RowArray(heavy_tailed(4000), assign=numpy_assign)
    seeds_nD = rows.rows_ND[:10]
    distance_N = slow_distance(rows.rows_ND[:4000], seeds_nD)
    assert rows.total_distance(seeds_nD) == pytest.approx(distance_N.sum(), rel=1e-6)
    rate = 200 / distance_N.sum()
    far_N = distance_N > np.median(distance_N)
    far, number = 0, 0
    for seed in range(50):
        drawn = rows.draw_with_keys(seeds_nD, rate, seed).key_n
        far, number = far + int(far_N[drawn].sum()), number + len(drawn)
    assert number / 50 == pytest.approx(200, rel=0.05)  # two standard deviations of the mean are 2 %
    assert far / number == pytest.approx(distance_N[far_N].sum() / distance_N.sum(), abs=0.02)


def test_seed_weights_count_the_rows_nearest_to_each_seed() -> None:
    rows = RowArray(separated(300), assign=numpy_assign)
    seeds_nD = rows.rows_ND[:7]
    nearest_N = np.array([int(np.argmax([float(row @ seed) for seed in seeds_nD])) for row in rows.rows_ND])
    assert rows.seed_weights(seeds_nD).tolist() == np.bincount(nearest_N, minlength=7).tolist()


def test_added_seeds_give_the_result_of_all_seeds_at_once() -> None:
    """The cache of the first seeds is reused, and nothing else."""
    fresh, used = (RowArray(heavy_tailed(500), assign=numpy_assign) for _ in range(2))
    for number in (3, 10, 5, 12):
        used.total_distance(used.rows_ND[:number])
    assert used.total_distance(used.rows_ND[20:30]) == fresh.total_distance(fresh.rows_ND[20:30])
    assert used.farthest(used.rows_ND[:12]).ordinal == fresh.farthest(fresh.rows_ND[:12]).ordinal
    assert used.seed_weights(used.rows_ND[:12]).tolist() == fresh.seed_weights(fresh.rows_ND[:12]).tolist()


def test_parallel_seeds_find_every_component_of_a_separated_mixture() -> None:
    rows = RowArray(separated(4000, clusters=20), assign=faiss_assign("cpu", 1))
    for seed in range(3):
        fit = kmeans(rows, parallel_seeds(rows, 20, seed), 5, 0.0)
        # one centroid per component: rows deviate by 0.1 x sqrt(64) / sqrt(64) from theirs
        assert fit.objective > 0.99


def test_too_few_distinct_rows_are_an_error_with_both_numbers() -> None:
    rows = RowArray(np.repeat(separated(6, clusters=6), 10, axis=0), assign=numpy_assign)
    with pytest.raises(UserError, match="9 clusters need 9 distinct rows; there are 6 among 60"):
        parallel_seeds(rows, 9)


def test_random_numbers_are_spread_evenly_and_depend_on_the_seed() -> None:
    ordinals_N = np.arange(100_000)
    one, other = uniform_by_ordinal(1, ordinals_N), uniform_by_ordinal(2, ordinals_N)
    counts = np.bincount((one * 50).astype(int), minlength=50)
    assert one.min() >= 0
    assert one.max() < 1
    assert abs(counts - 2000).max() < 5 * np.sqrt(2000)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.02
