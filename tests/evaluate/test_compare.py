"""Comparison of evaluations: only scores on the same test images; paired only if the resamples are the same."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cmcgns.data.labelled.base import ImageSet, image_table
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.report import Results
from cmcgns.evaluate.run import add_other_evaluation
from cmcgns.evaluate.scores import Score, differences
from cmcgns.evaluate.tasks import Evaluation


def images(name: str, number: int) -> ImageSet:
    rows = [{"image_id": f"{name}{i}", "path": "", "group": str(i), "split": "test"} for i in range(number)]
    source: Any = SimpleNamespace(uri="nowhere")
    return ImageSet(name, source, image_table(rows), "all of them")


def score(name: str, value: float, encoder: str = "pretrained") -> Score:
    return Score("classification", name, "linear", "mean AUC", encoder, value, 5, value + np.linspace(-0.1, 0.1, 101))


def evaluation(*sets: ImageSet) -> Evaluation:
    found = Evaluation(EvaluateConfig(run="ours"), [], list(sets), {})
    found.scores = [score(each.name, 0.8) for each in sets]
    return found


def test_the_same_test_images_are_compared_in_pairs_and_others_are_told() -> None:
    rsna, nih = images("rsna", 5), images("nih", 5)
    found = evaluation(rsna, nih)
    theirs = Results(
        [score("rsna", 0.7), score("nih", 0.6)], {"rsna": rsna.digest("test"), "nih": "of other images"}, seed=0
    )
    add_other_evaluation(found, "earlier", theirs)
    assert [(each.images, each.encoder) for each in found.scores] == [
        ("rsna", "pretrained"), ("nih", "pretrained"), ("rsna", "pretrained in earlier")
    ]  # fmt: skip
    (gap,) = differences(found.scores, "pretrained")
    assert gap.value == pytest.approx(0.1)
    assert gap.interval == pytest.approx((0.1, 0.1))
    assert found.skipped == ["nih of earlier: not the same test images as in this evaluation"]


def test_other_resamples_give_no_interval() -> None:
    rsna = images("rsna", 5)
    found = evaluation(rsna)
    add_other_evaluation(found, "earlier", Results([score("rsna", 0.7)], {"rsna": rsna.digest("test")}, seed=1))
    (gap,) = differences(found.scores, "pretrained")
    assert gap.value == pytest.approx(0.1)
    assert gap.interval is None
    assert found.skipped == ["intervals of earlier: it was resampled with seed 1, not 0"]


def test_an_evaluation_of_nothing_that_is_here_is_told() -> None:
    found = evaluation(images("rsna", 5))
    add_other_evaluation(found, "earlier", Results([], {}, seed=0))
    assert found.skipped == ["all of earlier: not the same test images as in this evaluation"]
