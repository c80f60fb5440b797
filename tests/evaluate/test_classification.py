"""Fractions of the labels: drawn by groups, nested, the same for every encoder; classes without a score are named."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cmcgns.data.labelled import ImageSet
from cmcgns.data.labelled.base import SPLITS, image_table
from cmcgns.data.readers import PhantomSource
from cmcgns.errors import UserError
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.features import Features
from cmcgns.evaluate.scores import Resampling
from cmcgns.evaluate.tasks.classification import auc_scores, drawn_groups, probe_scores

SETTINGS = EvaluateConfig(fractions=(0.1, 1.0), draws=3, resamples=100)


def labelled(label_NK: np.ndarray, exclusive: bool = False) -> ImageSet:
    """Images in groups of two, a third in each split; the classes are called a, b, c."""
    rows = [
        {
            "image_id": f"image {i}",
            "path": "",
            "group": f"patient {i // 2}",
            "split": SPLITS[3 * i // len(label_NK)],
            "labels": labels.tolist(),
        }
        for i, labels in enumerate(label_NK)
    ]
    classes = tuple("abc"[: label_NK.shape[1]])
    return ImageSet("small", PhantomSource(1, 0, 8, 8), image_table(rows), "as given", classes, exclusive)


def seen(images: ImageSet, label_NK: np.ndarray, noise: float) -> Features:
    """Features that contain the labels plus noise."""
    shown = np.nan_to_num(label_NK, nan=0.5) + noise * np.random.default_rng(5).normal(size=label_NK.shape)
    return Features(images.table["image_id"].to_pylist(), shown.astype(np.float32), None)


def measured(images: ImageSet, features: Features, settings: EvaluateConfig = SETTINGS) -> dict[tuple[str, str], Any]:
    return {(score.setting, score.metric): score for score in probe_scores(features, images, "run", settings)}


@pytest.mark.parametrize("seed", range(3))
def test_a_smaller_share_is_a_part_of_a_larger_one_and_draws_whole_groups(seed: int) -> None:
    groups = [f"patient {i // 3}" for i in range(300)]
    shares = (0.001, 0.01, 0.1, 0.5, 1.0)
    taken = [drawn_groups(groups, share, seed) for share in shares]
    for drawn, share in zip(taken, shares, strict=True):
        by_group = drawn.reshape(100, 3)
        assert (by_group.any(1) == by_group.all(1)).all()
        assert by_group[:, 0].sum() == max(round(share * 100), 1)
    for smaller, larger in itertools.pairwise(taken):
        assert not (smaller & ~larger).any()


def test_draws_differ_by_their_seed_and_do_not_depend_on_the_order_of_the_images() -> None:
    groups = [f"patient {i}" for i in range(200)]
    first = drawn_groups(groups, 0.1, 0)
    assert (first != drawn_groups(groups, 0.1, 1)).any()
    assert (drawn_groups(groups[::-1], 0.1, 0)[::-1] == first).all()
    # two draws of 20 of 200 share two by chance, with a deviation of 1.3: here the mean of 45 pairs
    draws = [drawn_groups(groups, 0.1, seed) for seed in range(10)]
    shared = [(draws[i] & draws[j]).sum() for i in range(10) for j in range(i)]
    assert np.mean(shared) == pytest.approx(2, abs=0.6)


def test_more_labels_and_clearer_features_give_larger_areas() -> None:
    label_NK = np.random.default_rng(0).integers(0, 2, (600, 2)).astype(np.float64)
    images = labelled(label_NK)
    clear, blurred = (measured(images, seen(images, label_NK, noise)) for noise in (0.01, 1.0))
    assert {setting for setting, _ in clear} == {"linear, 10% of labels", "linear, 100% of labels"}
    assert {metric for _, metric in clear} == {"mean AUC", "AUC: a", "AUC: b"}
    assert clear["linear, 100% of labels", "mean AUC"].value == pytest.approx(1.0)  # torchmetrics counts in float32
    assert clear["linear, 100% of labels", "mean AUC"].interval == (1.0, 1.0)
    for setting, low, high in (("linear, 10% of labels", 0.55, 0.8), ("linear, 100% of labels", 0.65, 0.85)):
        score = blurred[setting, "mean AUC"]
        # noise of deviation 1 on a step of 1: an ideal classifier reaches Phi(1 / sqrt(2)) = 0.76
        assert low < score.value < high
        assert score.interval[0] < score.value < score.interval[1]
        assert score.number == 200
        classes = [blurred[setting, f"AUC: {name}"].value for name in "ab"]
        assert score.value == pytest.approx(np.mean(classes))
    assert blurred["linear, 10% of labels", "mean AUC"].value < blurred["linear, 100% of labels", "mean AUC"].value


def test_unusable_images_are_left_out_of_every_split() -> None:
    label_NK = np.random.default_rng(1).integers(0, 2, (300, 1)).astype(np.float64)
    images = labelled(label_NK)
    whole = seen(images, label_NK, 1.0)
    used = np.arange(300) % 10 != 0
    smaller = replace(images, table=images.table.filter(pa.array(used)))
    features = Features(smaller.table["image_id"].to_pylist(), whole.pooled_NC[used], None)
    found, expected = measured(images, features), measured(smaller, features)
    assert {key: (score.value, score.number) for key, score in found.items()} == {
        key: (score.value, score.number) for key, score in expected.items()
    }
    assert found["linear, 100% of labels", "mean AUC"].number == 90
    with pytest.raises(UserError, match="small: the test split has no usable image"):
        measured(images, Features(whole.image_ids[:200], whole.pooled_NC[:200], None))


def test_a_class_without_positives_in_the_test_images_is_left_out_of_the_mean_and_named() -> None:
    label_NK = np.random.default_rng(2).integers(0, 2, (300, 3)).astype(np.float64)
    label_NK[200:, 1] = 0
    label_NK[200:, 2] = np.where(np.arange(100) % 2, 1, np.nan)
    images = labelled(label_NK)
    found = measured(images, seen(images, label_NK, 1.0))
    mean = found["linear, 100% of labels", "mean AUC"]
    assert mean.note == "left out: b (no positives), c (no negatives)"
    assert mean.value == found["linear, 100% of labels", "AUC: a"].value
    assert {metric for _, metric in found} == {"mean AUC", "AUC: a"}
    with pytest.raises(UserError, match="small: no class has both positives and negatives"):
        auc_scores([np.zeros((4, 3))], images, np.zeros((4, 3)), Resampling.of(list("abcd"), 100))


def test_classes_that_exclude_each_other_are_measured_by_accuracy() -> None:
    class_N = np.random.default_rng(3).integers(0, 3, 300)
    images = labelled(np.eye(3)[class_N], exclusive=True)
    found = measured(images, seen(images, np.eye(3)[class_N], 0.01))
    assert {metric for _, metric in found} == {"accuracy"}
    assert found["linear, 100% of labels", "accuracy"].value == 1.0
    blurred = measured(images, seen(images, np.eye(3)[class_N], 1.0))["linear, 100% of labels", "accuracy"]
    assert 0.4 < blurred.value < 0.8
    assert blurred.interval[0] < blurred.value < blurred.interval[1]
