"""Each use of DeepSpeed's private attributes: a failing test names the one that a new DeepSpeed has changed."""

import pytest
import torch

from cmcgns.train import deepspeed_private
from cmcgns.train.engine import DeepSpeedEngine, build_engine
from tests.ranks import run_on_ranks
from tests.small import small_config, small_model


def engine_of(stage: int) -> DeepSpeedEngine:
    config = small_config(num_workers=1, microbatch_size=6, global_batch_size=6, zero_stage=stage)
    engine = build_engine(small_model(config), config.train, torch.device("cpu"))
    assert isinstance(engine, DeepSpeedEngine)
    return engine


def check(stage: int) -> None:
    engine = engine_of(stage)
    trained = [parameter for _, parameter in engine._trained()]
    flat = deepspeed_private.flat_weights(engine.optimizer, stage)
    if stage == 3:
        shards = [deepspeed_private.shard(parameter) for parameter in trained]
        sizes = [len(stored) for stored, _ in shards]
    else:
        sizes = [parameter.numel() for parameter in trained]
    assert sum(len(part) for part in flat) >= sum(sizes), "flat_weights: every weight is in it"
    if stage == 3:
        assert sizes == [size for _, size in shards], "shard: one rank stores all"
        gathered = engine.weights()
        for (name, _), (stored, _) in zip(engine._trained(), shards, strict=True):
            assert torch.equal(stored, gathered[name].flatten()), "shard"
        return
    engine._link_averages()
    assert all(engine._average(parameter, "exp_avg") is not None for parameter in trained), "link_averages"


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_private_attributes_of_deepspeed_are_still_there(stage: int) -> None:
    run_on_ranks(1, check, stage)
