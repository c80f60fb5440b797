"""Compiled backbones train like plain ones: by the code generator with the default method, and traced with every method."""

import pytest
import torch
from torch._dynamo.utils import counters

from cmcgns.train import speed
from cmcgns.train.engine import build_engine
from tests.methods.test_ranks import CONFIGS, centroids
from tests.ranks import run_on_ranks
from tests.small import losses_of, random_batch, small_config, small_model
from tests.train.test_speed import TORCH as PLAIN
from tests.train.test_speed import forgotten as forgotten  # a fixture
from tests.train.test_speed import trained

CPU = torch.device("cpu")
TORCH = {"engine": "torch", "zero_stage": 0, "num_workers": 1, "microbatch_size": 4, "global_batch_size": 4}
LOCKED = ("gloria published", "mgca published", "mgca vit")
"""They ask for hidden states or attention, which transformers records under a lock: graph breaks around each backbone's graph."""


def losses_in(steps: int, settings: dict[str, object]) -> list[float]:
    """Losses of the method's last stage, on reports of different lengths."""
    config, losses = small_config(**TORCH, **settings), list[float]()
    engine, stage = build_engine(small_model(config), config.train, CPU), config.objective.stages
    engine.module.train()
    for seed in range(steps):
        batch = random_batch(config, slice(0, 4), seed)
        loss = losses_of(config, engine(batch, stage), batch, centroids(), stage).total
        engine.backward(loss, last=True)
        engine.step(1e-3)
        losses.append(float(loss.detach()))
    return losses


def compared(steps: int, settings: dict[str, object]) -> tuple[float, int, int]:
    """Largest relative difference of a loss with and without compilation; graphs, and graph breaks."""
    plain, compiled = losses_in(steps, settings), losses_in(steps, {**settings, "compile": True})
    off = max(abs(a / b - 1) for a, b in zip(compiled, plain, strict=True))
    return off, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


def test_ten_steps_by_the_code_generator_have_the_losses_of_plain_torch() -> None:
    off, graphs, breaks = compared(10, {})
    print(f"inductor: losses of 10 steps within {off:.1e}, {graphs} graphs, {breaks} graph breaks")
    assert off < 1e-5
    assert (graphs, breaks) == (2, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_trains_with_compiled_backbones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "BACKEND", "aot_eager")
    off, graphs, breaks = compared(3, CONFIGS[name])
    print(f"{name}: losses of 3 steps within {off:.1e}, {graphs} graphs, {breaks} graph breaks")
    assert off < 1e-4
    assert graphs in (1, 2)  # films, and reports if there are any
    assert bool(breaks) == (name in LOCKED)


@pytest.mark.usefixtures("forgotten")
def test_checkpointed_backbones_in_bf16_compile() -> None:
    half = {**PLAIN, "precision": "bf16", "activation_checkpointing": True}
    plain, _ = trained(**half)
    compiled, _ = trained(**half, compile=True)
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 3  # in its first call BERT also warns about its cache


def with_deepspeed() -> tuple[list[float], list[float], int]:
    plain, _ = trained(zero_stage=2)
    compiled, _ = trained(zero_stage=2, compile=True)
    return plain, compiled, counters["stats"]["unique_graphs"]


def test_deepspeed_trains_compiled_backbones() -> None:
    [(plain, compiled, graphs)] = run_on_ranks(1, with_deepspeed)
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert graphs == 2
