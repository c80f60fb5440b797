"""A learning rate for each encoder, and frozen encoders, with both engines and every ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from cmcgns.config import Config
from cmcgns.methods.cm_cgns.model import RECONSTRUCTION_PARTS
from cmcgns.train.engine import Engine, build_engine
from cmcgns.train.optimizer import build_optimizer
from cmcgns.train.setup import FREE_TO_CHANGE
from cmcgns.train.shards import copied
from tests.ranks import run_on_ranks
from tests.small import small_config, small_model
from tests.train.test_engine import config_of, engine_of, run_step, train
from tests.train.test_trainer import config_of as trainer_config
from tests.train.test_trainer import start

CPU = torch.device("cpu")
IMAGE, TEXT = "image_encoder.backbone.", "text_encoder.backbone."
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch", "zero_stage": 0},
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
}
RATE, FACTOR = 1e-3, 0.25


def rates_of(name: str, ranks: int = 1, image: float = 0.0, text: float = FACTOR) -> Config:
    """A ResNet, whose batch normalisation has statistics, of which the image encoder is frozen, and a slow text encoder."""
    return config_of(
        ranks, **ENGINES[name], image_encoder_rate=image, text_encoder_rate=text, model__image_encoder="resnet-tiny",
        data__image_size=64, data__resize=72, weight_decay=0.0,
    )  # fmt: skip


def test_with_factors_of_one_the_groups_are_the_two_of_one_learning_rate() -> None:
    config = config_of(weight_decay=0.3)
    model = small_model(config)
    first, second = build_optimizer(model, config.train).param_groups
    parameters = list(model.parameters())
    expected = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    for group, those, decay in zip((first, second), expected, (0.3, 0.0), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in those]
        assert (group["rate"], group["weight_decay"], group["lr"]) == (1.0, decay, config.train.learning_rate)


def test_each_factor_has_a_group_with_and_one_without_weight_decay() -> None:
    config = config_of(weight_decay=0.3, image_encoder_rate=0.1, text_encoder_rate=0.5)
    model = small_model(config)
    groups = build_optimizer(model, config.train).param_groups
    assert {(group["rate"], group["weight_decay"]) for group in groups} == {
        (rate, decay) for rate in (0.1, 0.5, 1.0) for decay in (0.3, 0.0)
    }
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        for parameter in group["params"]:
            name = names[parameter]
            assert group["rate"] == (0.1 if name.startswith(IMAGE) else 0.5 if name.startswith(TEXT) else 1.0), name
            assert (group["weight_decay"] > 0) == (parameter.dim() > 1), name
    same = build_optimizer(small_model(config), config_of(image_encoder_rate=0.1, text_encoder_rate=0.1).train)
    assert len(same.param_groups) == 4


def movement(engine: Engine, before: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest change of each weight and buffer."""
    return {name: float((value.float() - before[name].float()).abs().max()) for name, value in engine.weights().items()}


def on_ranks(ranks: int) -> dict[str, dict[str, Any]]:
    """What two steps of each engine did."""
    found: dict[str, dict[str, Any]] = {}
    for name in ENGINES:
        config = rates_of(name, ranks)
        engine = engine_of(config)
        before = {key: value.clone() for key, value in engine.weights().items()}
        losses = [run_step(engine, config, 0)]
        engine.step(RATE)
        first = movement(engine, before)
        losses.append(run_step(engine, config, 1))
        engine.step(RATE / 2)
        groups = engine.optimizer.param_groups  # type: ignore[attr-defined]
        state = copied(engine.optimizer_state())
        found[name] = {
            "first": first,
            "both": movement(engine, before),
            "rates": sorted({group["lr"] for group in groups}),
            "averages": {key.removeprefix("exp_avg.") for key in state if key.startswith("exp_avg.")},
            "trains": {key for key, module in engine.module.named_modules() if module.training},
            "gradients": any(
                p.grad is not None for key, p in engine.module.named_parameters() if key.startswith(IMAGE)
            ),
        }
        if name == "zero1":
            saved = engine.weights(), state
        found[name]["losses"] = losses + train(engine, config, range(2, 4))
    for name in ("torch", "zero2", "zero3"):  # the state of ZeRO-1 with groups of other rates, by name
        config = rates_of(name, ranks)
        model = small_model(config, seed=5)
        model.load_state_dict(saved[0])
        engine = build_engine(model, config.train, CPU, RECONSTRUCTION_PARTS)
        engine.load_optimizer_state(saved[1])
        engine.module.train()
        found[name]["resumed"] = train(engine, config, range(2, 4))
    return found


@pytest.fixture(scope="module", name="steps")
def fixture_steps() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = run_on_ranks(2, on_ranks, 2)[0]
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("name", ENGINES)
def test_a_frozen_encoder_keeps_weights_and_statistics_and_the_others_move(
    name: str, steps: dict[str, dict[str, Any]]
) -> None:
    found = steps[name]
    names = {key for key, _ in small_model(rates_of(name)).named_parameters()}
    for key, moved in found["both"].items():
        if key.startswith(IMAGE):
            assert moved == 0.0, key
        elif key in names and not key.endswith(("key.bias", "log_scale")) and not key.startswith(RECONSTRUCTION_PARTS):
            assert moved > 0.0, key
    assert any(key.endswith("running_mean") for key in found["both"])
    assert not found["gradients"]
    trained = {key for key in names if not key.startswith((IMAGE, *RECONSTRUCTION_PARTS))}
    assert found["averages"] == trained
    assert not any(key.startswith("image_encoder.backbone") for key in found["trains"])
    assert {"image_encoder.pool", "text_encoder.backbone.encoder"} <= found["trains"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ENGINES)
def test_each_group_follows_the_schedule_at_its_own_factor(name: str, steps: dict[str, dict[str, Any]]) -> None:
    found = steps[name]
    assert found["rates"] == pytest.approx([RATE / 2 * FACTOR, RATE / 2])
    # Adam's first step moves a weight by the learning rate, whatever the size of its gradient
    for key in ("text_encoder.projection.weight", "image_projection.weight", "cross_attention.text.value.weight"):
        assert found["first"][key] == pytest.approx(RATE, rel=0.01), key
    text = [moved for key, moved in found["first"].items() if key.startswith(TEXT) and key.endswith("dense.weight")]
    assert text == pytest.approx([RATE * FACTOR] * len(text), rel=0.01)


@pytest.mark.distributed
def test_every_engine_learns_alike_and_resumes_from_the_state_of_another(steps: dict[str, dict[str, Any]]) -> None:
    for name, found in steps.items():
        assert found["losses"] == pytest.approx(steps["torch"]["losses"], rel=1e-4), name
    for name in ("torch", "zero2", "zero3"):
        assert steps[name]["resumed"] == pytest.approx(steps["zero1"]["losses"][2:], rel=1e-4), name


def test_a_frozen_encoder_stays_frozen_through_validation_and_stage_2(tmp_path: Path) -> None:
    config = trainer_config(
        image_encoder_rate=0.0,
        text_encoder_rate=0.0,
        stage1_steps=2,
        stage2_steps=2,
        warmup_steps=0,
        checkpoint_every=3,
    )
    run = start(config, tmp_path / "run")
    trainer = run.trainer
    before = trainer.engine.weights()
    assert trainer.train()
    for name, value in trainer.engine.weights().items():
        if name.startswith((IMAGE, TEXT)):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(trainer.engine.weights()["image_projection.weight"], before["image_projection.weight"])
    assert not torch.equal(trainer.engine.weights()["mask_token"], before["mask_token"])
    encoders = trainer.engine.module.image_encoder, trainer.engine.module.text_encoder
    assert all(encoder.training and not encoder.backbone.training for encoder in encoders)
    assert not any(
        name.split(".", 1)[1].startswith((IMAGE, TEXT)) for name in trainer.engine.optimizer_state() if "." in name
    )
    resumed = start(config, tmp_path / "resumed", 3, tmp_path / "run")
    assert resumed.trainer.train()
    assert resumed.rows()[3]["loss"] == run.rows()[3]["loss"]
    assert [row["learning_rate"] for row in run.rows()] == [1e-3, 5e-4, 1e-3, 5e-4]


def test_a_frozen_encoder_trains_with_recomputed_activations_too() -> None:
    plain, recomputed = (
        config_of(engine="torch", zero_stage=0, text_encoder_rate=0.0, activation_checkpointing=each)
        for each in (False, True)
    )
    assert train(engine_of(recomputed), recomputed, range(2)) == train(engine_of(plain), plain, range(2))


def test_encoders_without_a_frozen_part_train_as_ever() -> None:
    model = small_model(config_of()).train()
    assert all(module.training for module in model.modules())
    next(iter(model.text_encoder.backbone.parameters())).requires_grad_(False)  # a part of it: not frozen
    assert all(module.training for module in model.train().modules())
    assert not any(module.training for module in nn.Module.eval(model).modules())


def test_a_negative_factor_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"text_encoder_rate\n.*greater than or equal to 0"):
        small_config(text_encoder_rate=-0.1)


def test_the_factors_cannot_change_when_a_run_is_resumed() -> None:
    assert not {"image_encoder_rate", "text_encoder_rate"} & FREE_TO_CHANGE["train"]
