"""Clusters: agreement of sentence clusters with the findings that the sentences state, known for the phantom.

n sentences, K clusters, G classes.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from cmcgns.clustering.kmeans import kmeans, numpy_assign, parallel_seeds
from cmcgns.clustering.rows import RowArray
from cmcgns.evaluate.base import Inputs, Task
from cmcgns.evaluate.pairs import Pairs
from cmcgns.evaluate.scores import Resampling, Score
from cmcgns.evaluate.sentence_truth import sentence_truth

Array = NDArray[np.float32]
Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]
SHUFFLES = 20


def sentence_classes(texts: Sequence[str]) -> tuple[Numbers, NDArray[np.bool_]]:
    """Class (finding, laterality, negated) of each sentence as a number, and which sentences name a finding."""
    truths = [sentence_truth(text) for text in texts]
    kept_n = np.array([truth is not None for truth in truths])
    return np.unique([str(truth) for truth in truths], return_inverse=True)[1], kept_n


def purity(cluster_n: Numbers, class_n: Numbers) -> float:
    """Fraction of the rows that belong to the most common class of their cluster."""
    return float(contingency_matrix(class_n, cluster_n).max(axis=0).sum() / len(class_n))


def by_chance(measure: Callable[[Numbers, Numbers], float], cluster_n: Numbers, class_n: Numbers) -> float:
    """Mean of ``measure`` with randomly permuted classes."""
    random = np.random.default_rng(0)
    return float(np.mean([measure(cluster_n, random.permutation(class_n)) for _ in range(SHUFFLES)]))


def fit_clusters(rows_nD: Array, clusters: int) -> Numbers:
    """Cluster of each row, by k-means on these rows."""
    rows = RowArray(rows_nD)
    fit = kmeans(rows, parallel_seeds(rows, clusters, 0), 20, 1e-4)
    return np.asarray(numpy_assign(rows_nD, fit.centroids_KD).nearest_N, np.int64)


def cluster_scores(pairs: Pairs, encoder: str, images: str, clusters: int, resamples: int, seed: int) -> list[Score]:
    """Purity and normalised mutual information of a k-means over the attended features, with intervals over patients."""
    class_n, kept_n = sentence_classes(list(pairs.text_n))
    cluster_n, class_n = fit_clusters(pairs.attended_nD, clusters)[kept_n], class_n[kept_n]
    resampling = Resampling.of(list(pairs.group_N[pairs.study_of_n[kept_n]]), resamples, seed)
    pure_R, shared_R = _resampled(cluster_n, class_n, resampling)
    setting, number = f"K {clusters}", len(class_n)
    shared = float(normalized_mutual_info_score(class_n, cluster_n))
    chance = lambda measure: f"by chance {by_chance(measure, cluster_n, class_n):.3f}"
    return [
        Score(
            "clusters", images, setting, "NMI", encoder, shared, number, shared_R, chance(normalized_mutual_info_score)
        ),
        Score(
            "clusters", images, setting, "purity", encoder, purity(cluster_n, class_n), number, pure_R, chance(purity)
        ),
    ]


def _resampled(cluster_n: Numbers, class_n: Numbers, resampling: Resampling) -> tuple[Floats, Floats]:
    """Purity and normalised mutual information in each resample.

    Both are biased upwards by duplicate rows, so the resamples are shifted to have the whole split's score as mean.
    """
    size_K, size_G = int(cluster_n.max()) + 1, int(class_n.max()) + 1
    pure, shared = [], []
    for _, weight_rn in resampling.chunks():
        for weight_n in weight_rn:
            table_KG = np.bincount(cluster_n * size_G + class_n, weight_n, size_K * size_G).reshape(size_K, size_G)
            pure.append(table_KG.max(1).sum() / table_KG.sum())
            shared.append(mutual_information(table_KG / table_KG.sum()))
    whole = purity(cluster_n, class_n), float(normalized_mutual_info_score(class_n, cluster_n))
    pure_R, shared_R = (
        np.array(resampled) - np.mean(resampled) + value for resampled, value in zip((pure, shared), whole, strict=True)
    )
    return pure_R, shared_R


def mutual_information(share_KG: NDArray[np.float64]) -> float:
    """Mutual information of a joint distribution divided by the mean of both entropies (as in scikit-learn)."""
    share_K, share_G = share_KG.sum(1), share_KG.sum(0)
    entropy = lambda share: -float(np.sum(share[share > 0] * np.log(share[share > 0])))
    information = entropy(share_K) + entropy(share_G) - entropy(share_KG)
    mean_entropy = (entropy(share_K) + entropy(share_G)) / 2
    return information / mean_entropy if mean_entropy else 1.0


class Clusters(Task):
    """Clusters of sentence features compared with the findings in the sentences."""

    reads = "pairs"
    needs_attention = True
    needs_truth = True

    def scores(self, inputs: Inputs) -> list[Score]:
        assert inputs.pairs is not None
        own, encoder = inputs.settings, inputs.encoder
        return cluster_scores(
            inputs.pairs, encoder.name, inputs.set_name, encoder.num_clusters, own.resamples, own.seed
        )


TASK = Clusters()
