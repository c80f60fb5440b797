"""Detection: targets decode to the original boxes, and a head can overfit four films."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.heads import DenseModel
from cmcgns.evaluate.tasks.detection import centre_loss, detection_scores, detections, shared_area, targets
from tests.evaluate.heads import BLANK, SET, films_with, rectangles, small_spec


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two boxes by their corners."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(width, 0) * max(height, 0)
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return both / (area(first) + area(second) - both)


def apart(random: np.random.Generator) -> np.ndarray:
    """Boxes from one and a half cells up to half of the film; no two of them touch."""
    kept: list[np.ndarray] = []
    for _ in range(40):
        size = np.exp(random.uniform(np.log(6), np.log(64), 2))
        start = random.uniform(0, BLANK - size)
        box = np.concatenate([start, start + size])
        if all(overlap(box, other) <= 0 for other in kept):
            kept.append(box)
    return np.stack(kept)


class Said(DenseModel):
    """A model with given output maps."""

    def __init__(self, maps: Tensor) -> None:
        self.maps, self.precision = maps, "fp32"
        self.encoder = small_spec().load()  # for its device

    def train(self, mode: bool) -> None: ...

    def __call__(self, film_BRR: Tensor) -> Tensor:
        return self.maps


@pytest.mark.parametrize("seed", range(5))
def test_maps_made_of_boxes_decode_to_these_boxes(seed: int) -> None:
    random = np.random.default_rng(seed)
    boxes = [apart(random), np.zeros((0, 4)), apart(random)]
    kinds = [random.integers(0, 3, len(each)).astype(np.int32) for each in boxes]
    films = films_with(boxes, kinds)
    heat, sides, _ = targets(films, 3, BLANK // 4)
    said = torch.cat([torch.logit(heat, eps=1e-6), torch.expm1(sides).log()], dim=1)  # softplus backwards
    found = detections(Said(said), films, 3, 8)
    assert len(boxes[0]) > 4
    for each, box_n4, kind_n in zip(found, boxes, kinds, strict=True):
        sure = each.score_n > 0.99
        assert sure.sum() == len(box_n4)
        assert (np.diff(each.score_n) <= 0).all()
        for box, kind in zip(box_n4, kind_n, strict=True):
            overlaps = [overlap(box, other) for other in each.box_n4[sure]]
            assert max(overlaps) > 0.9
            assert each.kind_n[sure][int(np.argmax(overlaps))] == kind


def test_the_shared_area_is_intersection_over_union() -> None:
    first, second = torch.rand(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * 4 + 0.1
    found = shared_area(first, second)
    corners = lambda sides: 10 + sides * [-1, -1, 1, 1]
    for b in range(3):
        for y in range(5):
            for x in range(5):
                a, c = (corners(sides[b, :, y, x].numpy()) for sides in (first, second))
                assert float(found[b, y, x]) == pytest.approx(overlap(a, c), rel=1e-5)


def test_the_loss_is_least_for_the_maps_of_the_truth() -> None:
    random = np.random.default_rng(0)
    boxes = [apart(random), np.zeros((0, 4))]
    films = films_with(boxes, [np.zeros(len(each), np.int32) for each in boxes])
    heat, sides, _ = targets(films, 1, 32)
    truth = torch.cat([torch.logit(torch.where(heat == 1, 1.0, 0.0), eps=1e-6), torch.expm1(sides).log()], dim=1)
    assert centre_loss(truth, films) == pytest.approx(0.0, abs=1e-3)
    wrong_boxes = torch.cat([truth[:, :1], truth[:, 1:] + 2], dim=1)
    wrong_centres = torch.cat([truth[:, :1].roll(9, dims=-1), truth[:, 1:]], dim=1)
    assert centre_loss(wrong_boxes, films) > 0.2
    assert centre_loss(wrong_centres, films) > 1


def test_four_films_are_learnt_by_heart() -> None:
    films = rectangles(4)
    parts = dict.fromkeys(("train", "valid", "test"), films)
    settings = EvaluateConfig(head_steps=60, head_batch=4, head_rate=5e-3, resamples=100)
    found = {
        score.metric: score
        for score in detection_scores(small_spec(), SET, parts, films.image_ids, 1.0, False, settings)
    }
    assert found["mAP"].value > 0.5
    assert found["AP at 0.50"].value >= found["mAP"].value
    low, high = found["mAP"].interval or (1.0, 0.0)
    assert low <= found["mAP"].value <= high
    assert found["mAP"].resampled_R is not None
    assert len(found["mAP"].resampled_R) == 100
