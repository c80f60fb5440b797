"""Spherical k-means on a small protocol, which one array and a pool of actors both implement. The only user of FAISS.

N rows, K centroids, D dimensions; all rows have length 1, and similarity is their cosine.

The result is the same to the last bit however the rows are split into parts: entries are on a grid on which float64 sums are
exact, and similarities too close for float32 are compared again in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from cmcgns.config import ClusteringConfig
from cmcgns.errors import UserError
from cmcgns.faiss_install import load_faiss

BLOCK_ROWS = 4096
"""Consecutive rows that a mini-batch includes or omits together."""
NEAR_TIE = 1e-5
"""float32 similarities that differ by less may be in the wrong order."""
DECIMALS = 12
"""Digits kept of float64 similarities: the last ones depend on how BLAS blocks the product."""
MAX_TABLE_CELLS = 2**23
"""Most float64 similarities in memory at a time."""
Array = np.ndarray[Any, Any]


class ScoredRow(NamedTuple):
    """A row, its similarity to what was asked for, and its position in the whole set."""

    similarity: float
    ordinal: int
    vector_D: Array


class PassTotals(NamedTuple):
    """Totals of one assignment pass, by centroid."""

    sums_KD: Array
    """Float64 sums of the members, times their weights."""
    counts_K: Array
    """Number of members, int64."""
    weight: float
    """Sum of the weights of all rows in the pass; their number if there are no weights."""
    near_ties: int
    """Rows whose two highest similarities differ by less than ``NEAR_TIE``; float64 decided these."""

    def objective(self, centroids_KD: Array) -> float:
        """Mean similarity of a row to its centroid; larger is better. Takes the centroids of the pass."""
        return float((self.sums_KD * centroids_KD).sum()) / max(self.weight, 1e-12)


class Rows(Protocol):
    """A set of normalised rows, in one place or several.

    Answers depend only on the rows and their ordinals. An implementation may cache what it computed for the last seeds or
    centroids, and recomputes it if the cache is lost.
    """

    def count(self) -> int:
        """Number of rows N."""

    def mean(self) -> Array:
        """Float64 mean row, (D,), not normalised."""

    def subset(self, number: int, seed: int) -> Array:
        """``number`` random rows (all, if there are fewer), (n, D), in random order."""

    def nearest(self, direction_D: Array) -> ScoredRow:
        """The row most similar to ``direction_D``; ties go to the lowest ordinal."""

    def farthest(self, seeds_nD: Array) -> ScoredRow:
        """The row least similar to its nearest seed; ties go to the lowest ordinal."""

    def total_distance(self, seeds_nD: Array) -> float:
        """Sum over the rows of weight x (1 - similarity to the nearest seed)."""

    def draw(self, seeds_nD: Array, rate: float, seed: int) -> Array:
        """Random rows (n, D), each drawn with probability ``rate`` x weight x (1 - similarity to the nearest seed)."""

    def seed_weights(self, seeds_nD: Array) -> Array:
        """For each seed, the weight of the rows that are nearest to it, (n,) float64."""

    def assign(self, centroids_KD: Array, blocks: Array | None = None) -> PassTotals:
        """One assignment pass over all rows, or over some blocks of ordinals."""

    def worst_assigned(self, centroids_KD: Array, number: int, blocks: Array | None = None) -> list[ScoredRow]:
        """Up to ``number`` distinct rows least similar to their centroid, worst first; ties go to the lowest ordinal."""


@dataclass(frozen=True)
class Fit:
    """State of a fit: enough to resume it."""

    centroids_KD: Array
    iteration: int = 0
    """Number of passes."""
    objective: float = -np.inf
    """Mean similarity of a row to its centroid in the last pass."""
    reseeded: int = 0
    """Empty clusters that were re-seeded with a badly assigned row, over all iterations."""
    near_ties: int = 0
    """Near ties of the last pass."""
    converged: bool = False
    """Whether the objective changed by no more than the tolerance."""
    totals_KD: Array | None = None
    """Mini-batches: float64 sums of all members of all iterations."""


def kmeans(
    rows: Rows,
    start: Array | Fit,
    iterations: int,
    tolerance: float,
    batch_rows: int | None = None,
    seed: int = 0,
    after: Callable[[Fit], None] = lambda fit: None,
) -> Fit:
    """Spherical k-means until the objective changes by at most ``tolerance`` of itself, or for ``iterations``.

    Starts from centroids (K, D), whose order it keeps, or resumes from a ``Fit`` that ``after`` received. With ``batch_rows``
    each iteration uses another random choice of blocks with about that many rows, and a centroid is the mean of all members it
    ever had (mini-batch k-means, Sculley 2010); the fit then runs for all ``iterations``.
    """
    fit = start if isinstance(start, Fit) else Fit(start.astype(np.float32))
    while fit.iteration < iterations and not fit.converged:
        fit = _full(rows, fit, tolerance) if batch_rows is None else _mini_batch(rows, fit, batch_rows, seed)
        after(fit)
    return fit


def cluster(rows: Rows, start_KD: Array | None, num_clusters: int, config: ClusteringConfig) -> Fit:
    """The clusterer `kmeans` of a bank: from ``start_KD``, or first from ``num_clusters`` farthest points."""
    start = farthest_point_seeds(rows, num_clusters) if start_KD is None else start_KD
    return kmeans(rows, start, config.iterations, config.tolerance)


def _full(rows: Rows, fit: Fit, tolerance: float) -> Fit:
    found = rows.assign(fit.centroids_KD)
    objective = found.objective(fit.centroids_KD)
    centroids_KD, reseeded = _update_centroids(rows, fit.centroids_KD, found.sums_KD, found.counts_K, None)
    converged = not reseeded and objective - fit.objective <= tolerance * abs(objective)
    return Fit(centroids_KD, fit.iteration + 1, objective, fit.reseeded + reseeded, found.near_ties, converged)


def _mini_batch(rows: Rows, fit: Fit, batch_rows: int, seed: int) -> Fit:
    blocks = batch_blocks(rows.count(), batch_rows, seed, fit.iteration)
    found = rows.assign(fit.centroids_KD, blocks)
    totals_KD = found.sums_KD if fit.totals_KD is None else fit.totals_KD + found.sums_KD
    ever_K = found.counts_K + np.any(totals_KD != 0, axis=1)
    centroids_KD, reseeded = _update_centroids(rows, fit.centroids_KD, totals_KD, ever_K, blocks)
    return replace(
        fit,
        centroids_KD=centroids_KD,
        iteration=fit.iteration + 1,
        objective=found.objective(fit.centroids_KD),
        reseeded=fit.reseeded + reseeded,
        near_ties=found.near_ties,
        totals_KD=totals_KD,
    )


def _update_centroids(
    rows: Rows, centroids_KD: Array, sums_KD: Array, counts_K: Array, blocks: Array | None
) -> tuple[Array, int]:
    """Normalised sums, and the number of empty clusters, which are re-seeded with the worst assigned rows."""
    moved_KD = normalised(np.where(counts_K[:, None] > 0, sums_KD, centroids_KD))
    empty_k = np.flatnonzero(counts_K == 0)
    worst = rows.worst_assigned(centroids_KD, len(empty_k), blocks) if len(empty_k) else []
    for k, row in zip(empty_k, worst, strict=False):
        moved_KD[k] = row.vector_D
    return moved_KD, len(worst)


def batch_blocks(count: int, batch_rows: int, seed: int, iteration: int) -> Array:
    """Indices of the blocks of ``BLOCK_ROWS`` ordinals in the mini-batch of ``iteration``, ascending."""
    blocks = -(-count // BLOCK_ROWS)
    wanted = min(-(-batch_rows // BLOCK_ROWS), blocks)
    return np.sort(np.random.default_rng([seed, iteration]).choice(blocks, wanted, replace=False))


def merge_passes(*passes: PassTotals) -> PassTotals:
    """Totals of a pass over all rows, from those over its parts."""
    return PassTotals(
        np.sum([part.sums_KD for part in passes], axis=0),
        np.sum([part.counts_K for part in passes], axis=0),
        float(np.sum([part.weight for part in passes])),
        sum(part.near_ties for part in passes),
    )


def normalised(rows_ND: Array) -> Array:
    """Rows scaled to length 1, float32; zero rows stay zero."""
    wide_ND = rows_ND.astype(np.float64 if rows_ND.dtype == np.float64 else np.float32, copy=False)
    length_N1 = np.linalg.norm(wide_ND, axis=1, keepdims=True)
    return (wide_ND / np.maximum(length_N1, 1e-12)).astype(np.float32, copy=False)


class NearestCentroids(NamedTuple):
    """The most similar centroid of each row; ties go to the lower index."""

    nearest_N: Array
    """Index into the centroids, int64."""
    near_ties: int


Assign = Callable[[Array, Array], NearestCentroids]
"""From rows (N, D) and centroids (K, D) to assignments."""


def numpy_assign(rows_ND: Array, centroids_KD: Array) -> NearestCentroids:
    """The slow, obvious assignment: all similarities in float64, then the largest."""
    pieces = -(-len(rows_ND) * len(centroids_KD) // MAX_TABLE_CELLS)
    found = [_numpy_assign(rows_MD, centroids_KD) for rows_MD in np.array_split(rows_ND, max(pieces, 1))]
    return NearestCentroids(np.concatenate([part.nearest_N for part in found]), sum(part.near_ties for part in found))


def _numpy_assign(rows_MD: Array, centroids_KD: Array) -> NearestCentroids:
    similarity_MK = (rows_MD.astype(np.float64) @ centroids_KD.T.astype(np.float64)).round(DECIMALS)
    nearest_M = similarity_MK.argmax(1)
    if len(centroids_KD) == 1:
        return NearestCentroids(nearest_M, 0)
    two_M2 = np.partition(similarity_MK, -2, axis=1)[:, -2:]
    return NearestCentroids(nearest_M, int((two_M2[:, 1] - two_M2[:, 0] < NEAR_TIE).sum()))


NearestSearch = Callable[[Array, Array, int], tuple[Array, Array]]
"""From rows (N, D), centroids (K, D) and n to the n highest similarities of each row and their centroids, both (N, n)."""


def faiss_search(device: str, threads: int | None = None) -> NearestSearch:
    """Exact search by FAISS on ``cpu`` (with this many threads) or ``gpu``."""
    faiss = load_faiss(device)
    if threads is not None:
        faiss.omp_set_num_threads(threads)
    resources = faiss.StandardGpuResources() if device == "gpu" else None

    def search(rows_ND: Array, centroids_KD: Array, number: int) -> tuple[Array, Array]:
        index: Any = faiss.IndexFlatIP(centroids_KD.shape[1])
        if resources is not None:
            index = faiss.index_cpu_to_gpu(resources, 0, index)
        index.add(np.ascontiguousarray(centroids_KD, dtype=np.float32))
        similarity_Nn, nearest_Nn = index.search(np.ascontiguousarray(rows_ND), min(number, len(centroids_KD)))
        return similarity_Nn, nearest_Nn

    return search


def assign_by(search: NearestSearch) -> Assign:
    """Assignment by a float32 search; float64 decides near ties."""

    def assign(rows_ND: Array, centroids_KD: Array) -> NearestCentroids:
        similarity_N2, nearest_N2 = search(rows_ND, centroids_KD, 2)
        nearest_N: Array = nearest_N2[:, 0].astype(np.int64)
        if len(centroids_KD) == 1:
            return NearestCentroids(nearest_N, 0)
        near_tie_N = similarity_N2[:, 0] - similarity_N2[:, 1] < NEAR_TIE
        nearest_N[near_tie_N] = numpy_assign(rows_ND[near_tie_N], centroids_KD).nearest_N
        return NearestCentroids(nearest_N, int(near_tie_N.sum()))

    return assign


def faiss_assign(device: str, threads: int | None = None) -> Assign:
    """Assignment by an exact FAISS index on ``cpu`` or ``gpu``."""
    return assign_by(faiss_search(device, threads))


DUPLICATE_COSINE = 1 - 1e-6
"""Rows with a higher cosine count as equal."""
OVERSAMPLING = 1.0
"""Expected number of candidates of one round of k-means||, in units of K."""
ROUNDS = 5
"""Rounds of k-means||; more only until there are K distinct candidates."""
MAX_ROUNDS = 50


def farthest_point_seeds(rows: Rows, num_clusters: int, seed: int = 0) -> Array:
    """K rows, each the least similar to those before it, the first the nearest to the mean; (K, D) float32.

    Deterministic: ``seed`` has no effect.
    """
    mean_D = rows.mean()
    seeds = [rows.nearest((mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)).astype(np.float32)).vector_D]
    while len(seeds) < num_clusters:
        row = rows.farthest(np.stack(seeds))
        if row.similarity >= DUPLICATE_COSINE:
            raise _too_few_rows(num_clusters, len(seeds), rows)
        seeds.append(row.vector_D)
    return np.stack(seeds)


def random_seeds(rows: Rows, num_clusters: int, seed: int = 0) -> Array:
    """K random rows, (K, D) float32."""
    return rows.subset(num_clusters, seed)


def parallel_seeds(rows: Rows, num_clusters: int, seed: int = 0) -> Array:
    """K centroids by k-means|| (Bahmani et al. 2012), (K, D) float32. A few rounds each draw about K rows, with probability
    proportional to their distance to the candidates so far; k-means++ then reduces the candidates, weighted by their members."""
    candidates_CD = rows.subset(1, seed)
    for number in range(MAX_ROUNDS):
        distance = rows.total_distance(candidates_CD)
        if distance == 0 or (number >= ROUNDS and len(candidates_CD) >= num_clusters):
            break
        drawn_nD = rows.draw(candidates_CD, OVERSAMPLING * num_clusters / distance, seed + 1 + number)
        candidates_CD = np.concatenate([candidates_CD, drawn_nD])
    distinct_CD = np.unique(candidates_CD, axis=0)
    if len(distinct_CD) < num_clusters:
        raise _too_few_rows(num_clusters, len(distinct_CD), rows)
    return _reduce_candidates(candidates_CD, rows.seed_weights(candidates_CD), num_clusters, seed)


def _reduce_candidates(candidates_CD: Array, weight_C: Array, num_clusters: int, seed: int) -> Array:
    """K centroids of the weighted candidates, by k-means++ and Lloyd's iterations."""
    from sklearn.cluster import KMeans  # slow to import, and only needed here
    from threadpoolctl import threadpool_limits

    # Euclidean on the sphere: |a - b|^2 = 2 (1 - cosine)
    model = KMeans(num_clusters, init="k-means++", n_init=1, max_iter=10, random_state=seed)
    with threadpool_limits(1):  # with several threads the order of summation varies
        model.fit(candidates_CD.astype(np.float64), sample_weight=weight_C)
    return normalised(model.cluster_centers_)


def _too_few_rows(num_clusters: int, distinct: int, rows: Rows) -> UserError:
    return UserError(
        f"{num_clusters} clusters need {num_clusters} distinct rows; there are {distinct} among {rows.count()} rows"
    )


Seeding = Callable[[Rows, int, int], Array]
"""From rows, K and a random seed to the first centroids."""
SEEDINGS: dict[str, Seeding] = {
    "farthest": farthest_point_seeds,
    "parallel": parallel_seeds,
    "random": random_seeds,
}
