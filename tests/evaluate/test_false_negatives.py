"""Precision and recall of false negatives, against a loop over sentences and films."""

import numpy as np
import pytest

from cmcgns.evaluate.sentence_truth import sentence_truth
from cmcgns.phantom.findings import FINDINGS
from tests.evaluate.false_negatives import found_by_clusters, shows_too

EFFUSION, CARDIOMEGALY = FINDINGS.index("effusion"), FINDINGS.index("cardiomegaly")
TEXTS = ["no pleural effusion", "the heart size is normal", "follow up is advised", "no pleural effusion"]


@pytest.fixture(name="shown_NC")
def fixture_shown() -> np.ndarray:
    """Film 0 shows nothing, film 1 an effusion, film 2 a large heart."""
    shown_NC = np.zeros((3, len(FINDINGS)), bool)
    shown_NC[1, EFFUSION] = shown_NC[2, CARDIOMEGALY] = True
    return shown_NC


def test_a_negation_is_shown_by_films_without_the_finding(shown_NC: np.ndarray) -> None:
    assert sentence_truth(TEXTS[0]) is not None
    too_mN, kept_m = shows_too(TEXTS, shown_NC)
    assert kept_m.tolist() == [0, 1, 3]
    assert too_mN.tolist() == [[True, False, True], [True, True, False], [True, False, True]]


def test_precision_and_recall_are_those_of_a_loop(shown_NC: np.ndarray) -> None:
    study_n, random = np.array([0, 0, 1, 2]), np.random.default_rng(0)
    for _ in range(20):
        cluster_n = random.integers(0, 3, 4)
        pairs = []
        for i in (0, 1, 3):
            truth = sentence_truth(TEXTS[i])
            assert truth is not None
            for film in range(3):
                if film != study_n[i]:
                    left_out = any(cluster_n[s] == cluster_n[i] for s in range(4) if study_n[s] == film)
                    pairs.append((left_out, not shown_NC[film, FINDINGS.index(truth.finding)]))
        left_out, too = sum(one for one, _ in pairs), sum(other for _, other in pairs)
        both = sum(one and other for one, other in pairs)
        found = found_by_clusters(cluster_n, study_n, TEXTS, shown_NC)
        assert found == (both / max(left_out, 1), both / max(too, 1), too / len(pairs))
