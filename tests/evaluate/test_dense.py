"""Heads on encoders: a frozen encoder is unchanged bit for bit, a tuned one changes, and the best weights are restored."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.films import Films
from cmcgns.evaluate.heads import DenseModel, Loss, build_dense, fit_head, mean_loss
from cmcgns.evaluate.tasks.detection import STRIDE as BOX_STRIDE
from cmcgns.evaluate.tasks.detection import centre_loss, detection_scores
from cmcgns.evaluate.tasks.segmentation import STRIDE as MASK_STRIDE
from cmcgns.evaluate.tasks.segmentation import dice_and_cross_entropy, segmentation_scores
from cmcgns.library.film_encoder import FilmEncoder
from tests.evaluate.heads import SET, Kept, rectangles, small_spec

SIDE = 64
Task = Literal["segmentation", "detection"]
LOSSES: dict[str, tuple[Loss, int, int]] = {
    "segmentation": (dice_and_cross_entropy, MASK_STRIDE, 2),
    "detection": (centre_loss, BOX_STRIDE, 6),
}
SETTINGS = EvaluateConfig(head_steps=4, head_batch=4, resamples=100)


def state_of(encoder: FilmEncoder) -> dict[str, Tensor]:
    """Every weight and buffer."""
    return {name: value.detach().clone() for name, value in encoder.state_dict().items()}


def changed(before: dict[str, Tensor], encoder: FilmEncoder) -> set[str]:
    """Names of the tensors that are not equal bit for bit."""
    after = encoder.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def built(task: str, tuned: bool, seed: int = 0, name: str = "resnet-tiny") -> DenseModel:
    _, stride, outputs = LOSSES[task]
    return build_dense(small_spec(name, SIDE).load(), SIDE, stride, outputs, tuned, seed)


def fit(model: DenseModel, task: str, train: Films, valid: Films, settings: EvaluateConfig = SETTINGS) -> int:
    return fit_head(model, LOSSES[task][0], train, valid, settings, seed=0)


@pytest.mark.parametrize("task", LOSSES)
def test_a_frozen_encoder_is_the_same_to_the_bit_after_its_task(task: str) -> None:
    """Weights, and the running statistics of its batch normalisation, after training and scoring."""
    kept, films = Kept.of(small_spec(size=SIDE)), rectangles(6, SIDE)
    assert kept.opened is not None
    before = state_of(kept.opened)
    assert sum("running" in name for name in before) > 10
    scores: Any = segmentation_scores if task == "segmentation" else detection_scores
    parts = dict.fromkeys(("train", "valid", "test"), films)
    assert scores(kept, SET, parts, films.image_ids, 1.0, False, SETTINGS)
    assert changed(before, kept.opened) == set()


@pytest.mark.parametrize("task", LOSSES)
def test_the_head_of_a_frozen_encoder_learns(task: str) -> None:
    films, model = rectangles(6, SIDE), built(task, tuned=False)
    before, untrained = state_of(model.encoder), mean_loss(model, LOSSES[task][0], films, 4)
    fit(model, task, films, films)
    assert changed(before, model.encoder) == set()
    assert mean_loss(model, LOSSES[task][0], films, 4) < untrained


@pytest.mark.parametrize("task", LOSSES)
def test_a_tuned_encoder_changes_with_its_batch_statistics(task: str) -> None:
    films, model = rectangles(6, SIDE), built(task, tuned=True)
    before = state_of(model.encoder)
    fit(model, task, films, films)
    touched = changed(before, model.encoder)
    of_backbone = {name for name in before if ".backbone." in name}
    # the pool and the projection to the reports are not used for maps
    assert touched == of_backbone
    assert any(name.endswith("running_var") for name in touched)


def test_the_same_seed_gives_the_same_head() -> None:
    heads = []
    for seed in (0, 0, 1):
        model = built("segmentation", tuned=False, seed=seed)
        fit(model, "segmentation", rectangles(6, SIDE), rectangles(4, SIDE, seed=1))
        heads.append(model.head.state_dict())
    first, same, other = heads
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("tuned", [False, True])
def test_training_goes_back_to_the_best_validation_state(tuned: bool) -> None:
    """Validation films with inverted masks: training makes the loss worse, so that the initial weights are best."""
    train = rectangles(6, SIDE)
    valid = Films(train.image_ids, train.film_NRR, ~train.mask_NKRR, train.kinds, train.boxes)
    model = built("segmentation", tuned)
    settings = EvaluateConfig(head_steps=100, head_batch=6, head_rate=1e-2)
    validated: list[tuple[float, dict[str, Tensor], dict[str, Tensor]]] = []

    def watched(maps: Tensor, films: Films) -> Tensor:
        loss = dice_and_cross_entropy(maps, films)
        if not torch.is_grad_enabled():
            head = {name: value.clone() for name, value in model.head.state_dict().items()}
            validated.append((float(loss), head, state_of(model.encoder)))
        return loss

    steps = fit_head(model, watched, train, valid, settings, seed=0)
    losses = [loss for loss, _, _ in validated]
    best = losses.index(min(losses))
    # a validation every tenth of the steps; stops after three without a better loss
    assert (steps, len(losses) - 1 - best) == (10 * len(losses), 3)
    assert steps < 100
    _, head, encoder = validated[best]
    assert all(torch.equal(head[name], value) for name, value in model.head.state_dict().items())
    assert changed(encoder, model.encoder) == set()


@pytest.mark.parametrize("name", ["resnet-tiny", "vit-tiny"])
@pytest.mark.parametrize("side", [32, 64, 96])
@pytest.mark.parametrize("stride", [MASK_STRIDE, BOX_STRIDE])
def test_maps_have_their_size_whatever_the_encoder(name: str, side: int, stride: int) -> None:
    model = build_dense(small_spec(name, side, side).load(), side, stride, 3, tuned=False, seed=0)
    maps = model(torch.zeros(2, side, side, dtype=torch.uint8))
    assert maps.shape == (2, 3, side // stride, side // stride)
    assert len(model.head.skips) == (1 if name == "vit-tiny" else 4)
