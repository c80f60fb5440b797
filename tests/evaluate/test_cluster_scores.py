"""Purity and mutual information of clusters with their intervals, against scikit-learn and slow loops."""

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from cmcgns.data.reports import parse_report
from cmcgns.evaluate.pairs import Pairs
from cmcgns.evaluate.scores import Score
from cmcgns.evaluate.tasks.clusters import cluster_scores, mutual_information, purity, sentence_classes
from cmcgns.phantom import PhantomCorpus

STUDIES = 60


def table(cluster_n: np.ndarray, class_n: np.ndarray) -> np.ndarray:
    found = np.zeros((cluster_n.max() + 1, class_n.max() + 1))
    for cluster, klass in zip(cluster_n, class_n, strict=True):
        found[cluster, klass] += 1
    return found / len(cluster_n)


@pytest.mark.parametrize("clusters", [1, 2, 7])
@pytest.mark.parametrize("classes", [1, 3, 5])
@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
def test_mutual_information_is_scikit_learns(clusters: int, classes: int, alike: float) -> None:
    random = np.random.default_rng(clusters * 10 + classes)
    class_n = random.integers(0, classes, 80)
    cluster_n = np.where(random.random(80) < alike, class_n % clusters, random.integers(0, clusters, 80))
    expected = normalized_mutual_info_score(class_n, cluster_n)
    assert mutual_information(table(cluster_n, class_n)) == pytest.approx(expected, abs=1e-12)


def test_purity_is_that_of_a_loop_over_clusters() -> None:
    random = np.random.default_rng(0)
    cluster_n, class_n = random.integers(0, 6, 100), random.integers(0, 4, 100)
    commonest = [max(np.sum(class_n[cluster_n == k] == g) for g in range(4)) for k in range(6)]
    assert purity(cluster_n, class_n) == pytest.approx(sum(commonest) / 100)


def pairs_of(noise: float) -> Pairs:
    """The phantom's sentences, each with a feature of its class plus noise."""
    corpus, random = PhantomCorpus(STUDIES, seed=3), np.random.default_rng(0)
    sentences = [parse_report(corpus.study(i).report).sentences for i in range(STUDIES)]
    text_n = [text for each in sentences for text in each]
    class_n, _ = sentence_classes(text_n)
    feature_nD = np.eye(class_n.max() + 1, dtype=np.float32)[class_n]
    feature_nD += noise * random.normal(size=feature_nD.shape).astype(np.float32)
    feature_nD /= np.linalg.norm(feature_nD, axis=1, keepdims=True)
    nothing = np.zeros((STUDIES, 2), np.float32)
    return Pairs(
        study_N=np.arange(STUDIES), group_N=np.array([corpus.study(i).patient_id for i in range(STUDIES)], object),
        path_N=np.arange(STUDIES).astype(str), image_ND=nothing, report_ND=nothing, report_hash_N=np.arange(STUDIES),
        text_n=np.array(text_n, object), study_of_n=np.repeat(np.arange(STUDIES), [len(each) for each in sentences]),
        attended_nD=feature_nD, weight_nP=np.zeros((len(text_n), 1), np.float32),
        film_MHW=np.zeros((0, 8, 8), np.uint8),
    )  # fmt: skip


def measured(pairs: Pairs, clusters: int) -> dict[str, Score]:
    return {score.metric: score for score in cluster_scores(pairs, "run", "phantom", clusters, 200, 0)}


def test_intervals_lie_around_the_number_of_the_whole_split() -> None:
    """Duplicate rows bias scores upwards: without the shift, resamples would be above the score of the whole split."""
    pairs = pairs_of(0.4)
    for score in measured(pairs, 20).values():
        assert score.resampled_R is not None
        assert score.resampled_R.mean() == pytest.approx(score.value)
        low, high = score.interval or (1.0, 0.0)
        assert 0.01 < high - low < 0.3
        assert low < score.value < high
    kept_n = sentence_classes(list(pairs.text_n))[1]
    assert measured(pairs, 20)["NMI"].number == kept_n.sum() < len(kept_n)


def test_features_that_show_the_class_are_better_than_features_that_do_not() -> None:
    classes = len(set(sentence_classes(list(pairs_of(0).text_n))[0]))
    clear, blind = measured(pairs_of(0.01), classes), measured(pairs_of(100.0), classes)
    assert clear["NMI"].value > 0.9
    assert clear["purity"].value > 0.9
    assert blind["purity"].value == pytest.approx(float(blind["purity"].note.split()[-1]), abs=0.05)
