"""The Ray pool in training: the same centroids on all ranks at all steps, however slow an actor is."""

from pathlib import Path

import pytest
import torch

from cmcgns.clustering.bank import PoolHandles
from cmcgns.clustering.bank_pool import RayPool
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


class Unreachable:
    """An actor that cannot be reached."""

    class push:  # noqa: N801
        @staticmethod
        def remote(*arguments: object) -> None:
            raise RuntimeError("the object store is full")


def test_a_push_that_cannot_be_sent_raises_at_the_next_call() -> None:
    config = settings(1).clustering
    pool = RayPool(PoolHandles((Unreachable(),), None, config))  # type: ignore[arg-type]
    pool.push(1, 0, torch.zeros(3, 4), [3])
    with pytest.raises(RuntimeError, match="the object store is full"):
        pool.save(1, 0, 3)
    with pytest.raises(RuntimeError, match="the object store is full"):
        pool.push(2, 3, torch.zeros(3, 4), [3])
