"""Mean average precision, against pycocotools."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest

from cmcgns.evaluate.films import Films
from cmcgns.evaluate.tasks.detection import Detections, mean_average_precision
from tests.evaluate.heads import films_with


def random_boxes(random: np.random.Generator, number: int) -> np.ndarray:
    start_n2, size_n2 = random.uniform(0, 80, (number, 2)), random.uniform(4, 48, (number, 2))
    return np.concatenate([start_n2, start_n2 + size_n2], axis=1)


def random_case(seed: int) -> tuple[list[Detections], Films]:
    """20 films, some without boxes, and predictions: shifted true boxes, some with a wrong class, and false positives."""
    random = np.random.default_rng(seed)
    boxes = [random_boxes(random, random.integers(0, 4)) for _ in range(20)]
    kinds = [random.integers(0, 3, len(each)).astype(np.int32) for each in boxes]
    assert sum(len(each) == 0 for each in boxes) >= 2
    found = []
    for box_n4, kind_n in zip(boxes, kinds, strict=True):
        near_n4 = box_n4 + random.normal(0, 2, box_n4.shape)
        false_n4 = random_boxes(random, random.integers(0, 3))
        kind = np.concatenate(
            [np.where(random.random(len(kind_n)) < 0.8, kind_n, 0), random.integers(0, 3, len(false_n4))]
        )
        score_n = np.round(random.random(len(kind)), 2)  # with ties
        order = np.argsort(-score_n, kind="stable")
        found.append(
            Detections(kind[order].astype(np.int64), score_n[order], np.concatenate([near_n4, false_n4])[order])
        )
    return found, films_with(boxes, kinds)


def by_pycocotools(found: list[Detections], films: Films, kinds: int) -> tuple[float, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def row(i: int, kind: int, box: np.ndarray, **more: Any) -> dict[str, Any]:
        width, height = box[2] - box[0], box[3] - box[1]
        return {
            "image_id": i,
            "category_id": int(kind),
            "bbox": [box[0], box[1], width, height],
            "area": width * height,
        } | more

    truth = [
        row(i, k, b, iscrowd=0) for i in range(len(films)) for k, b in zip(films.kinds[i], films.boxes[i], strict=True)
    ]
    answers = [row(i, k, b, score=s) for i, each in enumerate(found) for k, s, b in zip(*each, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):
        gold = COCO()
        gold.dataset = {
            "images": [{"id": i} for i in range(len(films))],
            "categories": [{"id": k} for k in range(kinds)],
            "annotations": [each | {"id": n + 1} for n, each in enumerate(truth)],
        }
        gold.createIndex()
        measured = COCOeval(gold, gold.loadRes(answers), "bbox")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return measured.stats[0], measured.stats[1]


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_pycocotools(seed: int) -> None:
    found, films = random_case(seed)
    expected = by_pycocotools(found, films, 3)
    assert mean_average_precision(found, films, 3) == pytest.approx(expected, abs=1e-6)
    assert 0.02 < expected[0] < expected[1] < 0.9


def perfect(films: Films) -> list[Detections]:
    return [
        Detections(kind_n.astype(np.int64), np.linspace(0.9, 0.5, len(kind_n)), box_n4.copy())
        for kind_n, box_n4 in zip(films.kinds, films.boxes, strict=True)
    ]


def test_perfect_answers_reach_1_and_a_find_on_an_empty_film_costs() -> None:
    _, films = random_case(0)
    found = perfect(films)
    assert mean_average_precision(found, films, 3) == pytest.approx((1.0, 1.0))
    for i in range(len(films)):
        if not len(films.boxes[i]):
            found[i] = Detections(np.arange(3), np.full(3, 0.95), np.tile([10.0, 10, 40, 40], (3, 1)))
    assert max(mean_average_precision(found, films, 3)) < 0.95


def test_nothing_found_is_0_and_nothing_there_is_no_number() -> None:
    nothing = Detections(np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 4)))
    _, films = random_case(0)
    assert mean_average_precision([nothing] * 20, films, 3) == (0.0, 0.0)
    empty = films_with([np.zeros((0, 4))] * 2, [np.zeros(0, np.int32)] * 2)
    assert np.isnan(mean_average_precision([nothing] * 2, empty, 3)).all()
