"""Linear classifiers on frozen features, by scikit-learn: the problem is convex, so there is nothing to train by hand.

N images, C channels, K classes.
"""

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from cmcgns.evaluate.scores import weighted_auc

Floats = NDArray[np.float64]
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of the L2 penalty that are tried, on standardised features; the validation split chooses."""
ITERATIONS, TOLERANCE = 300, 1e-3


def linear_probe(
    train_NC: Floats, label_NK: Floats, valid_NC: Floats, valid_label_NK: Floats, test_NC: Floats, exclusive: bool
) -> Floats:
    """Scores (N, K) of the test images, by a logistic regression a class, or one over all classes where they are
    ``exclusive``; NaN labels are left out. A class that the training images have only one side of scores 0 everywhere."""
    mean_C, spread_C = train_NC.mean(0), train_NC.std(0) + 1e-6
    train, valid, test = (((rows - mean_C) / spread_C).astype(np.float32) for rows in (train_NC, valid_NC, test_NC))
    with threadpool_limits(limits=1):  # each task has one CPU
        if exclusive:
            return _exclusive(train, label_NK, valid, valid_label_NK, test)
        columns = [_binary(train, label_NK[:, k], valid, valid_label_NK[:, k], test) for k in range(label_NK.shape[1])]
    return np.stack(columns, axis=1)


def _binary(train: Floats, label_N: Floats, valid: Floats, valid_label_N: Floats, test: Floats) -> Floats:
    known, known_valid = np.isfinite(label_N), np.isfinite(valid_label_N)
    target = label_N[known] > 0.5
    if target.all() or not target.any():
        return np.zeros(len(test))
    valid_target = valid_label_N[known_valid] > 0.5
    one_sided = valid_target.all() or not valid_target.any()
    best, best_auc = None, -1.0
    for model in _path(train[known], target):
        scores = valid[known_valid] @ model[0] + model[1]
        auc = 0.0 if one_sided else float(weighted_auc(scores, valid_target, np.ones((1, len(scores))))[0])
        if auc > best_auc:
            best, best_auc = model, auc
    assert best is not None
    return np.asarray(test @ best[0] + best[1], np.float64)


def _path(train: Floats, target: NDArray[np.bool_]) -> list[tuple[Floats, float]]:
    """Weights and bias for each of ``STRENGTHS``, each begun from the one before."""
    model = LogisticRegression(max_iter=ITERATIONS, tol=TOLERANCE, warm_start=True)
    found = []
    for strength in STRENGTHS:
        model.set_params(C=strength).fit(train, target)
        found.append((model.coef_[0].copy(), float(model.intercept_[0])))
    return found


def _exclusive(train: Floats, label_NK: Floats, valid: Floats, valid_label_NK: Floats, test: Floats) -> Floats:
    """Log-odds of one multinomial regression; classes that no training image has stay at minus infinity's stand-in."""
    target, valid_target = label_NK.argmax(1), valid_label_NK.argmax(1)
    scores = np.full((len(test), label_NK.shape[1]), -1e9)
    if len(np.unique(target)) == 1:
        scores[:, target[0]] = 0.0
        return scores
    model = LogisticRegression(max_iter=ITERATIONS, tol=TOLERANCE, warm_start=True)
    best, best_accuracy = None, -1.0
    for strength in STRENGTHS:
        model.set_params(C=strength).fit(train, target)
        accuracy = float((model.predict(valid) == valid_target).mean())
        if accuracy > best_accuracy:
            best, best_accuracy = model.predict_log_proba(test), accuracy
    assert best is not None
    scores[:, model.classes_] = best
    return scores
