"""The Ray pool in training: the same centroids on all ranks at all steps, however slow an actor is."""

from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch.nn import functional as F

from cmcgns.clustering.bank import PoolHandles, Pushers, RefreshRequest, start_pool
from cmcgns.clustering.bank_pool import RayPool
from cmcgns.clustering.online_clustering import LocalPool
from cmcgns.config import Config
from tests.clustering.delayed_actor import BrieflyDelayedActor, DelayedActor
from tests.clustering.pool_run import run, settings

pytestmark = pytest.mark.ray


def check(tmp_path: Path, config: Config, shard_type: type[DelayedActor]) -> None:
    """Ranks agree with each other, and with the in-process twin."""
    pooled, twin = run(tmp_path, config, shard_type).values()
    assert pooled[0]["seen"] == pooled[1]["seen"]
    assert pooled[0]["seen"] == twin[0]["seen"]  # each step's version and centroids, bit for bit
    versions = [version for _, version, _ in pooled[0]["seen"]]
    assert max(versions) >= 2
    assert len({digest for _, version, digest in pooled[0]["seen"] if version}) > 2  # momentum moves them each step
    assert pooled[0]["loss"] == pytest.approx(twin[0]["loss"], rel=1e-5)
    print(f"{max(versions)} versions, waited {pooled[0]['waited_s']:.1f} s for the delayed actor")


def test_ranks_adopt_the_same_centroids_at_the_same_steps_as_the_twin(local_ray: None, tmp_path: Path) -> None:
    check(tmp_path, settings(24, refresh_every=4), BrieflyDelayedActor)


def test_the_same_actors_cluster_two_banks_like_two_pools_of_their_own(local_ray: None) -> None:
    config = settings(1).clustering
    handles = start_pool(config)
    assert len(handles.shards) == config.actors
    dims = {"films": 8, "reports": 12}
    shared = {name: RayPool(handles, name) for name in dims}
    alone = {name: LocalPool(config) for name in dims}
    for pool in shared.values():
        pool.reset(0, None)
    source = torch.Generator().manual_seed(0)
    for step in range(1, 9):
        for name, dim in dims.items():
            rows = F.normalize(torch.randn(40, dim, generator=source), dim=1)
            for pools in (shared, alone):
                pools[name].push(step, 40 * (step - 1), rows, [40])
    for name in dims:  # both are requested before the first is done
        for pools in (shared, alone):
            pools[name].request(RefreshRequest(1, 8, 0, 320, 5, None))
    for name in dims:
        ours, theirs = shared[name].result(), alone[name].result()
        assert np.array_equal(ours.rows_KD, theirs.rows_KD)
        assert ours.counts_K.tolist() == theirs.counts_K.tolist()
        assert ours.counts_K.sum() == 320
        # a checkpoint of the films may be written during the passes over the reports
        for part, expected in zip(shared[name].save(8, 100, 320), alone[name].save(8, 100, 320), strict=True):
            assert np.array_equal(part, expected)
    shared["films"].reset(8, None)  # empties one bank and not the other
    assert len(shared["films"].save(8, 100, 320).rows_ND) == 0
    assert len(shared["reports"].save(8, 100, 320).rows_ND) == 220
    handles.stop()


def test_a_request_of_workers_that_have_been_replaced_does_not_wait_for_rows_of_ranks_that_are_gone(
    local_ray: None,
) -> None:
    handles = start_pool(settings(1).clustering)
    pool = RayPool(handles, "films")
    pool.reset(0, None)
    late = Pushers(attempt=pool.attempt - 1, ranks=3)
    for shard in handles.shards:
        with pytest.raises(RuntimeError, match="the workers that requested the rows of step 1 have been replaced"):
            ray.get(shard.snapshot.remote("films", 1, 0, 10, late), timeout=30)
    handles.stop()


class Unreachable:
    """An actor that cannot be reached."""

    class push:  # noqa: N801
        @staticmethod
        def remote(*arguments: object) -> None:
            raise RuntimeError("the object store is full")


def test_a_push_that_cannot_be_sent_raises_at_the_next_call() -> None:
    config = settings(1).clustering
    pool = RayPool(PoolHandles((Unreachable(),), None, config), "sentences")  # type: ignore[arg-type]
    pool.push(1, 0, torch.zeros(3, 4), [3])
    with pytest.raises(RuntimeError, match="the object store is full"):
        pool.save(1, 0, 3)
    with pytest.raises(RuntimeError, match="the object store is full"):
        pool.push(2, 3, torch.zeros(3, 4), [3])
