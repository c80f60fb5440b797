"""Settings for speed: compiled backbones train the same model, and a CPU is left as it is."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from cmcgns.config import Config
from cmcgns.train import speed
from cmcgns.train.engine import Engine, build_engine
from cmcgns.train.speed import BACKBONES, set_up_torch
from tests.small import losses_of, random_batch, small_config, small_model

CPU = torch.device("cpu")
TORCH: dict[str, Any] = {"engine": "torch", "zero_stage": 0}
STEPS = 10


def config_of(**train: object) -> Config:
    return small_config(num_workers=1, microbatch_size=4, global_batch_size=4, **train)


def engine_of(config: Config) -> Engine:
    speed.BACKEND = "aot_eager"  # all but the code generator, which takes minutes on a CPU
    engine = build_engine(small_model(config), config.train, CPU)
    engine.module.train()
    return engine


def losses_in(engine: Engine, config: Config, steps: int = STEPS) -> list[float]:
    """Losses of some steps on reports of different lengths."""
    losses = []
    for seed in range(steps):
        batch = random_batch(config, slice(0, 4), seed)
        loss = losses_of(config, engine(batch, 2), batch, None, 2).total
        engine.backward(loss, last=True)
        engine.step(1e-3)
        losses.append(float(loss.detach()))
    return losses


def trained(**train: object) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the weights after the steps."""
    config = config_of(**train)
    engine = engine_of(config)
    return losses_in(engine, config), engine.weights()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No compiled graphs, counts or settings of torch stay behind."""
    yield
    speed.BACKEND = "inductor"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("encoder", ["vit-tiny", "resnet-tiny"])
def test_a_compiled_backbone_is_one_graph(encoder: str) -> None:
    model = small_model(config_of(model__image_encoder=encoder)).train()
    batch = random_batch(config_of(), slice(0, 4))
    mask_B1TT = model.text_encoder._attention_mask(batch.token_mask_BT)
    inputs: dict[str, dict[str, Tensor]] = {
        "image_encoder.backbone": {"pixel_values": batch.image_B1HW.expand(-1, 3, -1, -1)},
        "text_encoder.backbone": {"input_ids": batch.token_BT, "attention_mask": mask_B1TT},
    }
    assert inputs.keys() == BACKBONES.keys()
    for name, given in inputs.items():
        found = torch._dynamo.explain(model.get_submodule(name))(**given)
        assert (found.graph_count, [each.reason for each in found.break_reasons]) == (1, [])


def test_compiled_backbones_train_the_same_model_without_a_break_in_the_loop() -> None:
    plain, weights = trained(**TORCH)
    assert not torch._dynamo.utils.counters["stats"]
    compiled, found = trained(**TORCH, compile=True)
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert found.keys() == weights.keys()  # the names of checkpoints and exports
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # one of films and one of reports, whatever their lengths


def test_a_closed_engine_with_compiled_backbones_leaves_nothing_in_memory() -> None:
    config = config_of(**TORCH, compile=True)
    engine = engine_of(config)
    losses_in(engine, config, 1)
    owned = [weakref.ref(parameter) for parameter in engine.module.parameters()]
    engine.close()
    del engine
    gc.collect()
    assert [each for each in owned if each() is not None] == []


@pytest.mark.parametrize(
    ("train", "named"),
    [
        ({"zero_stage": 3}, "train.zero_stage 3"),
        ({"contrast": "global_batch"}, "train.contrast global_batch"),
        ({"sync_batchnorm": True, "use_gpu": True}, "train.sync_batchnorm"),
        ({**TORCH, "log_term_gradients": True}, "train.log_term_gradients"),
        ({"zero_stage": 3, "contrast": "global_batch"}, "train.zero_stage 3 .*, train.contrast global_batch"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(train: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=f"train.compile does not work with {named} .*; remove train.compile"):
        config_of(**train, compile=True)
    config_of(**train)


@pytest.fixture(name="flags")
def fixture_flags() -> Iterator[Any]:
    """Reads torch's settings for GPUs, and restores them."""
    read = lambda: (
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    before = read()
    yield read
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[:3]
    torch.use_deterministic_algorithms(before[3])


def test_tf32_is_the_default_on_gpus_alone(flags: Any) -> None:
    before = flags()
    set_up_torch(config_of().train, CPU)
    assert flags() == before
    set_up_torch(config_of().train, torch.device("cuda"))
    assert flags() == (True, True, True, False)
    set_up_torch(config_of(tf32=False, deterministic=True).train, torch.device("cuda"))
    assert flags() == (False, False, False, True)
