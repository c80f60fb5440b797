"""Dice against loops over pixels: films with a class, and the cost of false positives."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.segmentation import dice_score

from cmcgns.errors import UserError
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.films import Films
from cmcgns.evaluate.heads import DenseModel, build_dense, fit_head
from cmcgns.evaluate.scores import Score
from cmcgns.evaluate.tasks.segmentation import STRIDE, counts, dice_and_cross_entropy, segmentation_scores
from tests.evaluate.heads import KINDS, SET, joined, rectangles, small_spec

SETTINGS = EvaluateConfig(head_steps=60, head_batch=4, head_rate=5e-3, resamples=100)
SIDE = 32
SPEC = small_spec(size=SIDE, resize=SIDE)
LEARNT = rectangles(4, SIDE)
PLAIN = rectangles(3, SIDE, seed=1, empty=3)
"""Films without any class."""
TRAIN = joined(LEARNT, PLAIN)


def lookalikes() -> Films:
    """Films with rectangles that are missing in the masks."""
    films = rectangles(2, SIDE, seed=2)
    return Films(["a", "b"], films.film_NRR, np.zeros_like(films.mask_NKRR), films.kinds, films.boxes)


@pytest.fixture(scope="module")
def model() -> DenseModel:
    """A head overfitted to these films, trained as in ``segmentation_scores``."""
    built = build_dense(SPEC.load(), SIDE, STRIDE, len(KINDS), False, SETTINGS.seed)
    fit_head(built, dice_and_cross_entropy, TRAIN, TRAIN, SETTINGS, SETTINGS.seed)
    return built


@torch.no_grad()
def answers(model: DenseModel, films: Films) -> np.ndarray:
    """The model's masks, film by film."""
    model.train(False)
    maps = [model(torch.from_numpy(film_RR[None])) for film_RR in films.film_NRR]
    enlarged = [F.interpolate(each, scale_factor=STRIDE, mode="bilinear", align_corners=False) for each in maps]
    return (torch.cat(enlarged).sigmoid() > 0.5).numpy()


def measured(films: Films) -> dict[str, Score]:
    parts = {"train": TRAIN, "valid": TRAIN, "test": films}
    scores = segmentation_scores(SPEC, SET, parts, films.image_ids, 1.0, False, SETTINGS)
    return {score.metric: score for score in scores}


def test_the_pixels_are_counted_as_a_loop_counts_them(model: DenseModel) -> None:
    films = joined(LEARNT, PLAIN, lookalikes())
    answer_NKRR = answers(model, films)
    overlap_NK, area_NK = counts(model, films, 4)
    for n in range(len(films)):
        for k in range(2):
            overlap = area = 0
            for answer, mask in zip(answer_NKRR[n, k].ravel(), films.mask_NKRR[n, k].ravel(), strict=True):
                overlap += int(answer and mask)
                area += int(answer) + int(mask)
            assert (overlap_NK[n, k], area_NK[n, k]) == (overlap, area)
    assert 0 < overlap_NK.sum() < area_NK.sum() / 2


def test_films_are_learnt_by_heart_and_measured_as_torchmetrics_measures_them(model: DenseModel) -> None:
    films, found = TRAIN, measured(TRAIN)
    assert found["mean Dice where present"].value > 0.7
    to_tensor = lambda masks: torch.from_numpy(masks).long()
    dice_NK = dice_score(to_tensor(answers(model, films)), to_tensor(films.mask_NKRR), 2, average=None)
    for k, name in enumerate(KINDS):
        score = found[f"Dice where present: {name}"]
        assert score.value == pytest.approx(float(dice_NK[:4, k].mean()), abs=1e-6)
        assert score.number == 4
    together = 2 * (answers(model, films) & films.mask_NKRR).sum((0, 2, 3))
    together = together / (answers(model, films).sum((0, 2, 3)) + films.mask_NKRR.sum((0, 2, 3)))
    assert [found[f"Dice of all films: {name}"].value for name in KINDS] == pytest.approx(together.tolist())
    for metric in ("Dice where present", "Dice of all films"):
        values = [found[f"{metric}: {name}"].value for name in KINDS]
        assert found[f"mean {metric}"].value == pytest.approx(np.mean(values))
        low, high = found[f"mean {metric}"].interval or (1.0, 0.0)
        assert low <= found[f"mean {metric}"].value <= high
    assert (found["mean Dice where present"].number, found["mean Dice of all films"].number) == (4, 7)


def test_an_empty_answer_to_an_empty_film_is_no_success_and_a_false_alarm_is_a_failure(model: DenseModel) -> None:
    assert not answers(model, PLAIN).any()
    assert answers(model, lookalikes()).any()
    alone, with_plain, with_alarms = (
        measured(films) for films in (LEARNT, joined(LEARNT, PLAIN), joined(LEARNT, lookalikes()))
    )
    right, said = answers(model, LEARNT) & LEARNT.mask_NKRR, answers(model, joined(LEARNT, lookalikes()))
    for k, name in enumerate(KINDS):
        where, every = f"Dice where present: {name}", f"Dice of all films: {name}"
        assert alone[where].value == with_plain[where].value == with_alarms[where].value
        assert alone[every].value == with_plain[every].value
        expected = 2 * right[:, k].sum() / (said[:, k].sum() + LEARNT.mask_NKRR[:, k].sum())
        assert with_alarms[every].value == pytest.approx(expected)
        assert with_alarms[every].value < alone[every].value - 0.02


def test_a_class_on_no_test_film_is_left_out_and_named() -> None:
    films = rectangles(4, SIDE)
    films.mask_NKRR[:, 1] = False
    found = measured(films)
    assert found["mean Dice where present"].note.endswith("left out, on no test film: black")
    assert found["mean Dice where present"].value == found["Dice where present: bright"].value
    assert "Dice where present: black" not in found
    with pytest.raises(UserError, match="rectangles: no test film has any of bright, black"):
        measured(PLAIN)


def test_a_perfect_answer_costs_nothing_and_its_opposite_much() -> None:
    films = rectangles(3, SIDE)
    sure = 40.0 * (2 * torch.from_numpy(films.mask_NKRR).float() - 1)
    assert dice_and_cross_entropy(sure, films) == pytest.approx(0.0, abs=1e-4)
    assert dice_and_cross_entropy(-sure, films) > 30
