"""Gradient caching: the losses and gradients of a step's microbatches are those of one large microbatch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from cmcgns import distributed
from cmcgns.methods.base import Losses, load_method
from cmcgns.train.global_batch import cached_step, join_batches, join_outputs, joined
from tests.methods.test_ranks import CONFIGS, FLOAT32, GLOBAL_BATCH, Found, centroids, loss_and_gradients
from tests.ranks import run_on_ranks
from tests.small import losses_of, random_batch, small_config, small_model
from tests.train.test_trainer import config_of, start

CACHED = {"contrast": "global_batch", "model__dropout": 0.0, "log_every": 1}


def of_microbatches(name: str, sizes: tuple[int, ...]) -> Found:
    """Loss, its parts and the gradients by gradient caching over microbatches of ``sizes``."""
    config = small_config(**CONFIGS[name])
    model, stage = small_model(config).double(), config.objective.stages
    model.train()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    batches = [random_batch(config, slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]

    def backward(loss: Tensor, last: bool) -> None:
        (loss / len(batches)).backward()  # as engines do

    def losses(outputs: Any, batch: Any) -> Losses:
        return losses_of(config, outputs, batch, centroids(), stage)

    cached = cached_step(lambda batch: model(batch, stage), backward, losses, model, batches)
    cached.backward()
    found = cached.losses
    frozen = load_method(config).frozen(stage)
    gradients = {
        key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and not key.startswith(frozen)
    }
    return float(found.total.detach()), torch.cat([found.terms, found.statistics]).tolist(), gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_microbatches_give_the_loss_and_gradient_of_one_large_microbatch(name: str) -> None:
    loss, parts, gradients = loss_and_gradients(name)
    exact = 1e-5 if name in FLOAT32 else 1e-10
    for sizes in ((2, 2, 2), (1, 5)):
        assert sum(sizes) == GLOBAL_BATCH
        own_loss, own_parts, own_gradients = of_microbatches(name, sizes)
        assert own_loss == pytest.approx(loss, rel=exact)
        assert own_parts == pytest.approx(parts, rel=1e-5, abs=1e-6)  # float32
        assert own_gradients.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(own_gradients[key], gradient, rtol=exact, atol=exact, msg=key)


def test_both_passes_drop_the_same_features_and_count_statistics_once() -> None:
    config = small_config(model__image_encoder="resnet-tiny", data__image_size=64, data__resize=72, model__dropout=0.3)
    model = small_model(config)
    model.train()
    slow, batches = copy.deepcopy(model), [random_batch(config, slice(i, i + 3)) for i in (0, 3, 6)]

    def losses(outputs: Any, batch: Any) -> Losses:
        return losses_of(config, outputs, batch, centroids())

    torch.manual_seed(3)
    cached = cached_step(lambda batch: model(batch, 1), lambda loss, _: (loss / 3).backward(), losses, model, batches)
    cached.backward()
    after = torch.rand(4)
    torch.manual_seed(3)
    # the same with the graphs of all microbatches in memory
    outputs = [slow(batch, 1) for batch in batches]
    whole = losses(join_outputs(outputs, 9), join_batches(batches))
    whole.total.backward()
    assert float(cached.losses.total.detach()) == float(whole.total.detach())
    assert torch.equal(after, torch.rand(4))
    for (name, ours), theirs in zip(model.named_parameters(), slow.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    for ours, theirs in zip(model.buffers(), slow.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_run_in_microbatches_equals_that_of_large_batches_with_clustering_on(tmp_path: Path) -> None:
    steps = {"stage1_steps": 17, "stage2_steps": 3, "validate_every": None, "clustering__refresh_every": 2}
    large = start(config_of(**CACHED, **steps, microbatch_size=32), tmp_path / "large")
    assert large.trainer.train()
    cached = start(config_of(**CACHED, **steps, microbatch_size=8), tmp_path / "cached")
    assert cached.trainer.train()
    apart = start(config_of(**CACHED | {"contrast": "microbatch"}, microbatch_size=8), tmp_path / "apart")
    apart.trainer.next_step()
    assert cached.rows()[-1]["centroids_version"] > 1
    for ours, theirs in zip(cached.rows(), large.rows(), strict=True):
        assert ours["studies_digest"] == theirs["studies_digest"]
        assert ours["centroids_version"] == theirs["centroids_version"]
        # after tens of steps of Adam float32 differences have grown
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6 if ours["step"] == 1 else 2e-3), ours["step"]
    # fewer films to tell apart: the setting does matter
    assert apart.rows()[0]["loss"] < cached.rows()[0]["loss"] - 0.5


def on_two_ranks(folder: str) -> list[float]:
    """Losses of 12 steps with ZeRO-2, in four microbatches of two ranks each."""
    config = config_of(
        **CACHED, num_workers=2, engine="deepspeed", zero_stage=2, microbatch_size=4, stage1_steps=12, stage2_steps=0
    )
    run = start(config, Path(folder) / str(distributed.rank()))
    assert run.trainer.train()
    return [row["loss"] for row in run.rows()]


@pytest.mark.distributed
def test_two_ranks_with_zero_2_train_like_one_large_microbatch(tmp_path: Path) -> None:
    alone = start(config_of(**CACHED, microbatch_size=32, stage1_steps=12, stage2_steps=0), tmp_path / "alone")
    assert alone.trainer.train()
    expected = [row["loss"] for row in alone.rows()]
    for losses in run_on_ranks(2, on_two_ranks, str(tmp_path)):
        assert losses == pytest.approx(expected, rel=1e-3)
        assert losses[0] == pytest.approx(expected[0], rel=1e-6)


def test_an_output_without_its_shape_in_its_name_is_refused() -> None:
    with pytest.raises(ValueError, match="output film needs its shape in its name, such as film_BD"):
        joined("film", [torch.zeros(4, 8)] * 2, 8)
    with pytest.raises(ValueError, match=r"output film_BPD has 2 dimensions, \(4, 8\)"):
        joined("film_BPD", [torch.zeros(4, 8)] * 2, 8)


def test_gradients_of_single_terms_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"log_term_gradients needs train\.contrast=microbatch"):
        config_of(contrast="global_batch", log_term_gradients=True)
