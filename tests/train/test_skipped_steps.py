"""Gradients that are not finite: every engine skips the step, reports it and continues; fp16 lowers its loss scale.

Also what a steady step of DeepSpeed reads back and allocates, and that a closed engine leaves nothing in memory.
"""

import gc
import logging
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmcgns.config import Config
from cmcgns.errors import TrainingStoppedError
from cmcgns.train.engine import (
    BUCKET,
    OVERLAPPING_BUCKET,
    DeepSpeedEngine,
    Engine,
    TorchEngine,
    build_engine,
    deepspeed_settings,
)
from cmcgns.train.optimizer import FIRST_SCALE, LossScale
from cmcgns.train.shards import copied
from cmcgns.train.trainer import SKIPS_IN_A_ROW
from tests.ranks import run_on_ranks
from tests.small import losses_of, random_batch, small_config, small_model
from tests.train.test_trainer import HostReads, config_of, start

CPU = torch.device("cpu")
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch", "zero_stage": 0},
    **{f"zero{stage}": {"zero_stage": stage} for stage in (1, 2, 3)},
}


def settings(engine: str, precision: str = "fp32") -> Config:
    # not validated: fp16 is refused on a CPU, where nothing is gained by it
    config = small_config(num_workers=1, microbatch_size=4, global_batch_size=4, **ENGINES[engine])
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def engine_of(config: Config) -> Engine:
    engine = build_engine(small_model(config), config.train, CPU)
    engine.module.train()
    return engine


def step(engine: Engine, config: Config, factor: float = 1.0, seed: int = 0) -> None:
    """One optimizer step on a loss times ``factor``: an infinite one gives gradients that are not finite."""
    batch = random_batch(config, slice(0, 4), seed)
    loss = losses_of(config, engine(batch, 2), batch, None, 2).total
    engine.backward(loss * factor, last=True)
    engine.step(1e-3)


def overflow_between_two_steps(name: str, precision: str) -> dict[str, Any]:
    config = settings(name, precision)
    engine = engine_of(config)
    step(engine, config)
    before = engine.weights() | copied(engine.optimizer_state())
    first_norm = float(engine.gradient_norm)
    step(engine, config, factor=math.inf)
    after = engine.weights() | copied(engine.optimizer_state())
    skipped_norm = float(engine.gradient_norm)
    step(engine, config)
    last = engine.weights()
    return {
        "moved": [key for key, value in before.items() if not torch.equal(value, after[key])],
        "norms": (first_norm, skipped_norm, float(engine.gradient_norm)),
        "steps": int(engine.optimizer_state()["optimizer_steps"].copy()),
        "moves again": sum(not torch.equal(value, after[key]) for key, value in last.items()),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ENGINES)
def test_an_infinite_gradient_moves_nothing_and_the_next_step_moves_again(name: str, precision: str) -> None:
    [found] = run_on_ranks(1, overflow_between_two_steps, name, precision)
    assert found["moved"] == []
    first, skipped, last = found["norms"]
    assert 0 < first < math.inf
    assert not math.isfinite(skipped)
    assert 0 < last < math.inf
    assert found["steps"] == 2
    assert found["moves again"] > 10


def in_fp16(name: str) -> dict[str, Any]:
    """Loss scales and gradient norms of some steps in fp16, the last with an infinite loss, and the number of steps taken."""
    config = settings(name, "fp16")
    engine = engine_of(config)
    assert isinstance(engine, DeepSpeedEngine | TorchEngine)
    scales, norms = [engine.scale.value], []
    for seed in range(12):
        step(engine, config, seed=seed % 2)
        scales.append(engine.scale.value)
        norms.append(float(engine.gradient_norm))
    done = int(engine.optimizer_state()["optimizer_steps"].copy())
    step(engine, config, factor=math.inf)
    scales.append(engine.scale.value)
    return {"scales": scales, "norms": norms, "steps": done}


def norm_in_fp32(seed: int) -> float:
    """Norm of the gradient of the initial weights."""
    config = settings("torch")
    engine = engine_of(config)
    step(engine, config, seed=seed)
    return float(engine.gradient_norm)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ENGINES)
def test_fp16_trains_with_every_engine_and_its_gradients_are_unscaled(name: str) -> None:
    [found] = run_on_ranks(1, in_fp16, name)
    skipped = sum(not math.isfinite(norm) for norm in found["norms"])
    assert found["steps"] == 12 - skipped > 0
    assert found["scales"][0] == FIRST_SCALE
    assert found["scales"][-1] == FIRST_SCALE / 2 ** (skipped + 1)  # the last step was infinite
    index, first = next((i, norm) for i, norm in enumerate(found["norms"]) if math.isfinite(norm))
    # before the first step that is taken the weights are the same
    assert first == pytest.approx(norm_in_fp32(index % 2), rel=0.02)


def test_the_loss_scale_halves_at_once_and_doubles_after_many_good_steps() -> None:
    scale = LossScale(settings("torch", "fp16").train)
    scale.update(finite=False)
    assert scale.value == FIRST_SCALE / 2
    for _ in range(2000):
        scale.update(finite=True)
    assert scale.value == FIRST_SCALE
    plain = LossScale(settings("torch").train)
    plain.update(finite=False)
    assert plain.value == 1.0


def test_a_fused_optimizer_skips_by_itself() -> None:
    """What the engine does on a GPU, with the kernel of the CPU."""
    config = settings("torch")
    engine = engine_of(config)
    assert isinstance(engine, TorchEngine)
    for group in (*engine.optimizer.param_groups, engine.optimizer.defaults):
        group["fused"] = True
    step(engine, config)
    before = engine.weights() | copied(engine.optimizer_state())
    step(engine, config, factor=math.inf)
    after = engine.weights() | copied(engine.optimizer_state())
    assert not [key for key, value in before.items() if not torch.equal(value, after[key])]
    step(engine, config)
    assert int(engine.optimizer_state()["optimizer_steps"].copy()) == 2


class Exploding:
    """An engine whose gradients are infinite from ``first`` on."""

    def __init__(self, engine: Engine, first: int, last: int = 10**9) -> None:
        self.engine, self.first, self.last, self.step_number = engine, first, last, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, *inputs: Any) -> Any:
        return self.engine(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        infinite = self.first <= self.step_number + 1 <= self.last
        self.step_number += last
        self.engine.backward(loss * math.inf if infinite else loss, last)


def test_a_skipped_step_is_reported_and_its_row_has_no_norm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = start(config_of(stage1_steps=6, stage2_steps=0, warmup_steps=0), tmp_path / "run")
    run.trainer.engine = Exploding(run.trainer.engine, first=3, last=4)  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        assert run.trainer.train()
    norms = [row["gradient_norm"] for row in run.rows()]
    assert [norm is None for norm in norms] == [False, False, True, True, False, False]
    assert caplog.text.count("step 3: the gradient is not finite; the step was skipped") == 1


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    run = start(config_of(stage1_steps=SKIPS_IN_A_ROW + 20, stage2_steps=0, warmup_steps=0), tmp_path / "run")
    run.trainer.engine = Exploding(run.trainer.engine, first=5)  # type: ignore[assignment]
    with pytest.raises(TrainingStoppedError, match=rf"steps 5 to {4 + SKIPS_IN_A_ROW}: the gradient was not finite"):
        run.trainer.train()
    assert run.rows()[-1]["step"] >= 4 + SKIPS_IN_A_ROW  # what led to it is in the log


def test_the_engine_of_stage_1_is_gone_once_stage_2_has_started(tmp_path: Path) -> None:
    run = start(config_of(stage1_steps=2, stage2_steps=1, warmup_steps=0), tmp_path / "run")
    trainer = run.trainer
    trainer.next_step()
    assert isinstance(trainer.engine, TorchEngine)
    owned = [weakref.ref(parameter) for parameter in trainer.engine.module.parameters()]
    owned += [weakref.ref(slot["exp_avg"]) for slot in trainer.engine.optimizer.state.values()]
    trainer.next_step()
    trainer.next_step()
    assert trainer.progress.stage == 2
    gc.collect()
    assert [each for each in owned if each() is not None] == []


def left_after_close(name: str) -> int:
    """Parameters and averages that are still in memory."""
    config = settings(name)
    engine = engine_of(config)
    assert isinstance(engine, DeepSpeedEngine)
    step(engine, config)
    owned = [weakref.ref(parameter) for parameter in engine.module.parameters()]
    owned += [weakref.ref(slot["exp_avg"]) for slot in engine.optimizer.optimizer.state.values()]
    engine.close()
    del engine
    return sum(each() is not None for each in owned)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_a_closed_engine_of_deepspeed_leaves_nothing_in_memory(name: str) -> None:
    assert run_on_ranks(1, left_after_close, name) == [0]


def waits_of_a_step(name: str) -> tuple[int, list[str]]:
    """Calls of ``synchronize``, and what is read on the host, in a steady step."""
    from deepspeed.accelerator import get_accelerator

    config = settings(name)
    engine = engine_of(config)
    assert isinstance(engine, DeepSpeedEngine)
    for seed in range(2):
        step(engine, config, seed=seed)
    batch = random_batch(config, slice(0, 4), 2)
    # Adam's step counts are on the host, also on a GPU
    counts = {slot["step"].data_ptr() for slot in engine.optimizer.optimizer.state.values()}
    calls: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "synchronize", lambda *arguments: calls.append(arguments))
        with HostReads(counts) as reads:
            engine.backward(losses_of(config, engine(batch, 2), batch, None, 2).total, last=True)
            engine.step(1e-3)
    return len(calls), reads.found


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_a_steady_step_of_deepspeed_waits_for_the_device_at_its_gradients_norm_alone(name: str) -> None:
    [(synchronized, reads)] = run_on_ranks(1, waits_of_a_step, name)
    assert synchronized == 0
    assert reads == 3 * ["aten::_local_scalar_dense"]  # is it finite, asked in three places


def bytes_of_buckets(name: str, precision: str, overlap: bool) -> tuple[int, int, int]:
    """Most bytes of communication buffers while gradients are reduced, and after the step; and bytes of all gradients."""
    config = settings(name, precision)
    config = config.model_copy(update={"train": config.train.model_copy(update={"overlap_comm": overlap})})
    engine = engine_of(config)
    assert isinstance(engine, DeepSpeedEngine)
    held = lambda: sum(
        each.numel() * each.element_size() for bucket in engine.optimizer.ipg_buckets.values() for each in bucket.buffer
    )
    trained, sizes = [p for p in engine.module.parameters() if p.requires_grad], []
    for parameter in trained:
        parameter.register_hook(lambda gradient: sizes.append(held()))
    for seed in range(2):
        step(engine, config, seed=seed)
    assert len(sizes) > 50
    return max(sizes), held(), sum(p.numel() * p.element_size() for p in trained)


@pytest.mark.distributed
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_buffers_of_deepspeed_take_at_most_twice_the_bytes_of_the_gradients(
    name: str, precision: str, overlap: bool
) -> None:
    [(most, left, gradients)] = run_on_ranks(1, bytes_of_buckets, name, precision, overlap)
    assert 0 < most <= 2 * gradients
    assert left == 0


@pytest.mark.parametrize(("overlap", "most"), [(None, BUCKET), (True, OVERLAPPING_BUCKET)])
@pytest.mark.parametrize("trained", [1_000_000, 160_000_000])
def test_buckets_hold_at_most_the_trained_gradients_and_never_all_of_a_large_model(
    overlap: bool | None, most: int, trained: int
) -> None:
    config = small_config(zero_stage=2, overlap_comm=overlap)
    found = deepspeed_settings(config.train, 1, trained, CPU)["zero_optimization"]
    assert found["reduce_bucket_size"] == min(trained, most)
    on_gpu = deepspeed_settings(config.train, 1, trained, torch.device("cuda"))["zero_optimization"]
    assert on_gpu["overlap_comm"]
    assert on_gpu["reduce_bucket_size"] == min(trained, OVERLAPPING_BUCKET)
