"""A pool of real actors compared with one array: the same pass and the same fit, even if actors are killed."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import ray

from cmcgns.clustering.embeddings import Columns, open_embeddings
from cmcgns.clustering.kmeans import NEAR_TIE, Array, Fit, kmeans, numpy_assign, parallel_seeds
from cmcgns.clustering.pool import MAX_RESTARTS, ParquetSource, RowSource, SourcePool, array_sources
from cmcgns.clustering.rows import RowArray
from cmcgns.config import PoolConfig
from cmcgns.errors import UserError
from tests.clustering.sets import SETS, cuts, heavy_tailed, write_parquet

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
ROWS = 6000


@contextmanager
def pool_over(sources: list[RowSource]) -> Iterator[SourcePool]:
    pool = SourcePool(sources, PoolConfig(actors=len(sources), cpus_per_actor=0.1))
    try:
        yield pool
    finally:
        pool.stop()


def parquet_sources(folder: Path, actors: int, memory_bytes: float = 2**30) -> list[RowSource]:
    embeddings = open_embeddings(str(folder), Columns("id", "vector"))
    return [ParquetSource(part, memory_bytes, None, False) for part in embeddings.split(actors)]


def kill(pool: SourcePool, indices: list[int]) -> None:
    for i in indices:
        pid = ray.get(pool.shards[i].__ray_call__.remote(lambda shard: os.getpid()))
        os.kill(pid, signal.SIGKILL)


def killing(pool: SourcePool, indices: list[int], iteration: int) -> Callable[[Fit], None]:
    """Kills actors after ``iteration``, during the next pass."""

    def after(fit: Fit) -> None:
        if fit.iteration == iteration:
            kill(pool, indices)

    return after


def check_agreement(rows: int, actors: int) -> None:
    """One pass and one fit of a pool of uneven shards, compared with one array, on easy and hard sets."""
    for name, make in SETS.items():
        rows_ND = make(rows)
        whole = RowArray(rows_ND, assign=numpy_assign)
        start_KD = whole.subset(40, 0)
        theirs = whole.assign(start_KD)
        with pool_over(list(array_sources(rows_ND, cuts(rows, actors)))) as pool:
            ours = pool.rows.assign(start_KD)
            fits = [kmeans(each, start_KD, 10, 0.0) for each in (pool.rows, whole)]
            assert np.array_equal(parallel_seeds(pool.rows, 20, 1), parallel_seeds(whole, 20, 1))
        similarity_NK = np.sort(whole.rows_ND[:rows].astype(np.float64) @ start_KD.T.astype(np.float64), axis=1)
        near_ties = int((similarity_NK[:, -1] - similarity_NK[:, -2] < NEAR_TIE).sum())
        # stricter than asked for: near ties are resolved the same way too, so the results are equal
        assert np.array_equal(ours.counts_K, theirs.counts_K)
        assert np.array_equal(ours.sums_KD, theirs.sums_KD)
        assert np.array_equal(fits[0].centroids_KD, fits[1].centroids_KD)
        assert fits[0].objective == fits[1].objective
        print(
            f"{actors} actors, {name}: equal bit for bit, {near_ties} of {rows} rows nearly tied ({ours.near_ties} seen)"
        )


def test_a_pool_agrees_with_one_array_bit_for_bit() -> None:
    check_agreement(ROWS, actors=2)


def check_survival(folder: Path, lost: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """A fit whose actors are killed in iteration 4 of 10, compared with an undisturbed one."""
    with pool_over(parquet_sources(folder, 3)) as pool:
        start_KD = pool.rows.subset(40, 0)
        undisturbed = kmeans(pool.rows, start_KD, 10, -1.0)
        with caplog.at_level(logging.WARNING, logger="cmcgns"):
            found = kmeans(pool.rows, start_KD, 10, -1.0, after=killing(pool, lost, 3))
        assert [pool.losses[i] for i in range(3)] == [int(i in lost) for i in range(3)]
    assert found.iteration == 10
    assert np.array_equal(found.centroids_KD, undisturbed.centroids_KD)
    assert (found.objective, found.reseeded) == (undisturbed.objective, undisturbed.reseeded)
    for i in lost:
        assert f"clustering actor {i} of 3 was lost" in caplog.text
        assert f"clustering actor {i} has read its" in caplog.text


def test_a_fit_two_of_whose_three_actors_are_killed_ends_with_the_same_centroids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_survival(write_parquet(tmp_path, heavy_tailed(ROWS), [0, 2500, ROWS]), [0, 2], caplog)


def test_an_actor_that_is_lost_too_often_ends_the_fit_with_the_fix(tmp_path: Path) -> None:
    with pool_over(parquet_sources(write_parquet(tmp_path, heavy_tailed(ROWS), [0, ROWS]), 2)) as pool:
        start_KD = pool.rows.subset(10, 0)
        with pytest.raises(
            RuntimeError, match=rf"actor 1 of 2 was lost more than {MAX_RESTARTS} times.*clustering.memory_gib"
        ):
            kmeans(pool.rows, start_KD, 20, -1.0, after=lambda fit: kill(pool, [1]))


def test_a_set_that_has_changed_is_refused_when_it_is_read_again(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path, heavy_tailed(ROWS), [0, ROWS])
    with pool_over(parquet_sources(folder, 2)) as pool:
        start_KD = pool.rows.subset(10, 0)
        write_parquet(folder, heavy_tailed(4000), [0, 4000])
        with pytest.raises(UserError, match=r"must not change|changed during the fit"):
            kmeans(pool.rows, start_KD, 5, -1.0, after=killing(pool, [1], 1))


def test_a_row_without_direction_is_refused_with_shard_and_row() -> None:
    rows_ND: Array = heavy_tailed(100)
    rows_ND[77] = 0
    with (
        pytest.raises(UserError, match="clustering shard 1: array, rows from 50: row 27 is zero"),
        pool_over(list(array_sources(rows_ND, [0, 50, 100]))),
    ):
        pass


def test_more_shards_than_rows_leave_some_empty_and_change_nothing(tmp_path: Path) -> None:
    rows_ND = heavy_tailed(2)
    with pool_over(parquet_sources(write_parquet(tmp_path, rows_ND, [0, 2]), 3)) as pool:
        found = kmeans(pool.rows, pool.rows.subset(2, 0), 3, 0.0)
    whole = RowArray(rows_ND, assign=numpy_assign)
    assert np.array_equal(found.centroids_KD, kmeans(whole, whole.subset(2, 0), 3, 0.0).centroids_KD)
