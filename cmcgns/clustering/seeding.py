"""Where k-means starts: farthest points (the paper), k-means|| for large sets, or plain random rows.

K centroids, C candidates, D dimensions.
"""

from collections.abc import Callable

import numpy as np

from cmcgns.clustering.kmeans import Array, Rows, normalised
from cmcgns.errors import UserError

SAME_ROW = 1 - 1e-6
"""Rows at least this similar count as one."""
OVERSAMPLING = 1.0
"""Candidates that one round of k-means|| draws, in units of K."""
ROUNDS = 5
"""Rounds of k-means||; more only where they have not found K distinct candidates."""
MOST_ROUNDS = 50


def farthest_point_seeds(rows: Rows, num_clusters: int, seed: int = 0) -> Array:
    """K rows, each the least similar to those before it, the first nearest to the mean; (K, D) float32.

    Nothing is drawn: ``seed`` changes nothing.
    """
    mean_D = rows.mean()
    seeds = [rows.nearest((mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)).astype(np.float32)).vector_D]
    while len(seeds) < num_clusters:
        row = rows.farthest(np.stack(seeds))
        if row.similarity >= SAME_ROW:
            raise _too_few(num_clusters, len(seeds), rows)
        seeds.append(row.vector_D)
    return np.stack(seeds)


def random_seeds(rows: Rows, num_clusters: int, seed: int = 0) -> Array:
    """K rows drawn by ``seed``, (K, D) float32."""
    return rows.subset(num_clusters, seed)


def parallel_seeds(rows: Rows, num_clusters: int, seed: int = 0) -> Array:
    """K centroids by k-means|| (Bahmani et al. 2012), (K, D) float32: a few rounds each draw some K rows, likelier the
    worse they are served so far; k-means++ then picks K of those candidates, weighed by the rows that they serve."""
    candidates_CD = rows.subset(1, seed)
    for number in range(MOST_ROUNDS):
        distance = rows.distance(candidates_CD)
        if distance == 0 or (number >= ROUNDS and len(candidates_CD) >= num_clusters):
            break
        drawn_nD = rows.draw(candidates_CD, OVERSAMPLING * num_clusters / distance, seed + 1 + number)
        candidates_CD = np.concatenate([candidates_CD, drawn_nD])
    distinct_CD = np.unique(candidates_CD, axis=0)
    if len(distinct_CD) < num_clusters:
        raise _too_few(num_clusters, len(distinct_CD), rows)
    return _best_of(candidates_CD, rows.shares(candidates_CD), num_clusters, seed)


def _best_of(candidates_CD: Array, weight_C: Array, num_clusters: int, seed: int) -> Array:
    """K centroids of the weighted candidates, by k-means++ and Lloyd's iterations on them alone."""
    from sklearn.cluster import KMeans  # slow to import, and needed here alone
    from threadpoolctl import threadpool_limits

    # Euclidean on the sphere: |a - b|^2 = 2 (1 - cosine)
    model = KMeans(num_clusters, init="k-means++", n_init=1, max_iter=10, random_state=seed)
    with threadpool_limits(1):  # threads add up in the order in which they end
        model.fit(candidates_CD.astype(np.float64), sample_weight=weight_C)
    return normalised(model.cluster_centers_)


def _too_few(num_clusters: int, distinct: int, rows: Rows) -> UserError:
    return UserError(
        f"{num_clusters} clusters need {num_clusters} distinct rows; there are {distinct} among {rows.count()}"
    )


Seeding = Callable[[Rows, int, int], Array]
"""From rows, K and a seed to the first centroids."""
SEEDINGS: dict[str, Seeding] = {
    "farthest": farthest_point_seeds,
    "parallel": parallel_seeds,
    "random": random_seeds,
}
