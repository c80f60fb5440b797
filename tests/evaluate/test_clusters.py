"""Cluster scores of known clusters."""

import numpy as np

from cmcgns.data.reports import parse_report
from cmcgns.evaluate.sentence_truth import sentence_truth
from cmcgns.evaluate.tasks.clusters import fit_clusters
from cmcgns.phantom import PhantomCorpus
from tests.evaluate.clusters import agreement


def test_the_classes_themselves_agree_wholly_and_chance_not_at_all() -> None:
    corpus = PhantomCorpus(120, seed=1)
    texts = [text for i in range(120) for text in parse_report(corpus.study(i).report).sentences]
    truths = [str(sentence_truth(text)) for text in texts]
    names, class_n = np.unique(truths, return_inverse=True)
    whole = agreement(class_n, texts)
    assert (whole.mutual_information, whole.purity) == (1.0, 1.0)
    assert whole.purity_by_chance < 0.4
    chance = agreement(np.random.default_rng(0).permutation(class_n), texts)
    assert abs(chance.mutual_information) < 0.05
    # k-means finds well-separated classes, and the score shows it
    rows_ND = np.eye(len(names), 64, dtype=np.float32)[class_n] + 0.01
    rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    assert agreement(fit_clusters(rows_ND, len(names)), texts).mutual_information > 0.95
