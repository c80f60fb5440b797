"""Linear probes: separable classes are found, unknown labels are ignored, classes without examples never win."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from cmcgns.evaluate.scores import Floats
from cmcgns.evaluate.tasks.classification import STRENGTHS, linear_probe

SIZES = (120, 60, 80)


def blobs(classes: int, apart: float, seed: int = 0) -> tuple[list[Floats], list[Floats]]:
    """Features of three splits around one centre per class, with different scales per channel, and labels 0 and 1."""
    random = np.random.default_rng(seed)
    centre_KC = apart * np.eye(classes, 8)
    scale_C = np.logspace(-3, 3, 8)
    class_of = [random.integers(0, classes, number) for number in SIZES]
    features = [(centre_KC[each] + random.normal(size=(len(each), 8))) * scale_C + 5 for each in class_of]
    return features, [np.eye(classes)[each] for each in class_of]


def probe(features: list[Floats], labels: list[Floats], exclusive: bool) -> Floats:
    train, valid, test = features
    return linear_probe(train, labels[0], valid, labels[1], test, exclusive)


def test_separable_classes_are_told_apart() -> None:
    features, labels = blobs(3, 20.0)
    score_NK = probe(features, labels, exclusive=False)
    assert [roc_auc_score(labels[2][:, k], score_NK[:, k]) for k in range(3)] == [1.0, 1.0, 1.0]
    assert (probe(features, labels, exclusive=True).argmax(1) == labels[2].argmax(1)).all()


def test_features_that_know_nothing_are_at_chance() -> None:
    features, labels = blobs(2, 0.0)
    area = roc_auc_score(labels[2][:, 0], probe(features, labels, exclusive=False)[:, 0])
    # 80 test images: the standard error of a random area is 0.065
    assert area == pytest.approx(0.5, abs=0.2)


def test_the_probe_is_the_regression_that_the_validation_split_likes_best() -> None:
    """Each strength fitted separately from scratch, on features standardised by hand."""
    features, labels = blobs(2, 1.0, seed=3)
    spread = [(each - features[0].mean(0)) / features[0].std(0) for each in features]
    fits = [LogisticRegression(C=strength, tol=1e-8, max_iter=2000) for strength in STRENGTHS]
    areas = []
    for fit in fits:
        fit.fit(spread[0], labels[0][:, 0])
        areas.append(roc_auc_score(labels[1][:, 0], fit.decision_function(spread[1])))
    assert len(set(areas)) > 1
    expected = fits[int(np.argmax(areas))].decision_function(spread[2])
    # stopped earlier, and initialised from the previous strength
    assert probe(features, labels, exclusive=False)[:, 0] == pytest.approx(expected, abs=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan])
def test_a_class_with_one_side_alone_scores_0_everywhere(value: float) -> None:
    features, labels = blobs(2, 5.0)
    labels[0][:, 1] = value
    score_NK = probe(features, labels, exclusive=False)
    assert (score_NK[:, 1] == 0).all()
    assert roc_auc_score(labels[2][:, 0], score_NK[:, 0]) > 0.9


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_validation_split_of_one_side_alone_is_no_error(value: float) -> None:
    features, labels = blobs(2, 5.0)
    labels[1][:] = value
    score_NK = probe(features, labels, exclusive=False)
    assert roc_auc_score(labels[2][:, 0], score_NK[:, 0]) > 0.9


def test_a_class_never_seen_in_training_never_wins() -> None:
    features, labels = blobs(3, 5.0)
    seen = labels[0][:, 2] == 0
    score_NK = probe([features[0][seen], *features[1:]], [labels[0][seen], *labels[1:]], exclusive=True)
    assert set(score_NK.argmax(1)) == {0, 1}
    alone = labels[0][:, 1] == 1
    score_NK = probe([features[0][alone], *features[1:]], [labels[0][alone], *labels[1:]], exclusive=True)
    assert set(score_NK.argmax(1)) == {1}


def test_images_of_unknown_label_take_no_part() -> None:
    """Each image twice, its second label unknown: features are standardised over all images, which are the same set."""
    features, labels = blobs(2, 1.0)
    expected = probe(features, labels, exclusive=False)
    twice = [np.concatenate([each, each]) for each in features[:2]]
    unknown = [np.concatenate([each, np.full_like(each, np.nan)]) for each in labels[:2]]
    found = probe([*twice, features[2]], [*unknown, labels[2]], exclusive=False)
    assert found == pytest.approx(expected, abs=1e-3 * np.abs(expected).max())
    wrong = [np.nan_to_num(each) for each in unknown]  # treated as absent, they would shift every score
    shifted = probe([*twice, features[2]], [*wrong, labels[2]], exclusive=False)
    assert np.abs(shifted - expected).max() > 0.1 * np.abs(expected).max()
