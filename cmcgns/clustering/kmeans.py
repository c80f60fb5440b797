"""Spherical k-means, written once against a small protocol: one array and a pool of actors both hold rows.

The only door to FAISS. N rows, K centroids, D dimensions; all rows have length 1 and similarity is their cosine.

How the rows are cut into parts changes no bit of the result: entries lie on a grid on which float64 sums are exact, and
what float32 cannot tell apart is compared again in float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy import sparse

from cmcgns.errors import UserError

SAME_ROW = 1 - 1e-6
"""Rows at least this similar count as one."""
CHUNK_ROWS = 16_384
"""Rows that one assignment turns into float64 at a time."""
GRID = 2.0**24
"""Entries of rows are multiples of 1 / GRID: half a billion of them add up without rounding."""
NEAR_TIE = 1e-5
"""Similarities in float32 that differ by less may be in the wrong order."""
DECIMALS = 12
"""Of similarities in float64, whose last digits depend on how BLAS cuts the product."""

Array = np.ndarray[Any, Any]
Assign = Callable[[Array, Array], Array]
"""From rows (N, D) and centroids (K, D) to the index of each row's most similar centroid, of equals the first."""


class Row(NamedTuple):
    """One row and how well it is served; ``ordinal`` says where it stands in the whole set."""

    similarity: float
    ordinal: int
    vector_D: Array


class AssignmentPass(NamedTuple):
    """What one pass over the rows says of each centroid."""

    sums_KD: Array
    """Float64 sums of members."""
    counts_K: Array
    """Members, int64."""
    objective: float
    """Sum of similarities to the nearest centroid; larger is better."""


class Rows(Protocol):
    """A set of normalised rows, wherever they lie."""

    def count(self) -> int:
        """Number of rows N."""

    def mean(self) -> Array:
        """Float64 mean row, (D,), not normalised."""

    def nearest(self, direction_D: Array) -> Row:
        """The row most similar to ``direction_D``; of equals, the lowest ordinal."""

    def farthest(self, seed_D: Array, first: bool) -> Row:
        """The row least similar to every seed named since ``first``; of equals, the lowest ordinal."""

    def assign(self, centroids_KD: Array) -> AssignmentPass:
        """One assignment pass."""

    def worst_served(self, number: int) -> list[Row]:
        """Up to ``number`` distinct rows that the last pass served worst, worst first, of equals the lowest ordinal."""


@dataclass(frozen=True)
class KMeansResult:
    """Centroids and how they came about."""

    centroids_KD: Array
    objective: float
    """Mean similarity of a row to its centroid at the last pass."""
    iterations: int
    reseeded: int
    """Empty clusters that were given a badly served row, over all iterations."""


def kmeans(rows: Rows, start_KD: Array, iterations: int, tolerance: float) -> KMeansResult:
    """Spherical k-means from ``start_KD`` until the objective changes by at most ``tolerance`` of itself."""
    centroids_KD, previous, reseeded, done = start_KD.astype(np.float32), -np.inf, 0, 0
    while done < iterations:
        done += 1
        found = rows.assign(centroids_KD)
        empty_k = np.flatnonzero(found.counts_K == 0)
        centroids_KD = normalised(np.where(found.counts_K[:, None] > 0, found.sums_KD, centroids_KD))
        if len(empty_k):
            for k, row in zip(empty_k, rows.worst_served(len(empty_k)), strict=False):
                centroids_KD[k] = row.vector_D
                reseeded += 1
        if not len(empty_k) and found.objective - previous <= tolerance * abs(found.objective):
            break
        previous = found.objective
    return KMeansResult(centroids_KD, found.objective / max(rows.count(), 1), done, reseeded)


def farthest_point_seeds(rows: Rows, num_clusters: int) -> Array:
    """K rows, each the least similar to those before it, the first nearest to the mean; (K, D) float32."""
    mean_D = rows.mean()
    seeds = [rows.nearest((mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)).astype(np.float32)).vector_D]
    while len(seeds) < num_clusters:
        row = rows.farthest(seeds[-1], first=len(seeds) == 1)
        if row.similarity >= SAME_ROW:
            raise ValueError(
                f"{num_clusters} clusters need {num_clusters} distinct rows; there are {len(seeds)} among {rows.count()}"
            )
        seeds.append(row.vector_D)
    return np.stack(seeds)


class RowArray:
    """Rows in one array: the holder inside each actor, and alone the oracle of a pool."""

    def __init__(self, rows_ND: Array, ordinals_N: Array | None = None, assign: Assign | None = None) -> None:
        self.rows_ND = np.rint(normalised(rows_ND) * np.float32(GRID)) / np.float32(GRID)
        self.ordinals_N = np.arange(len(rows_ND)) if ordinals_N is None else ordinals_N
        self._assign = assign or faiss_assign("cpu")
        self._seeded_N = np.empty(0)
        self._served_by: tuple[Array, Array] | None = None  # centroids of the last pass, and each row's

    def count(self) -> int:
        return len(self.rows_ND)

    def mean(self) -> Array:
        return self.total() / max(self.count(), 1)

    def total(self) -> Array:
        """Float64 sum of all rows, (D,)."""
        return np.sum([rows_MD.sum(0) for _, rows_MD in self._chunks()] or [np.zeros(self.rows_ND.shape[1])], axis=0)

    def nearest(self, direction_D: Array) -> Row:
        similarity_N = self._similarity(direction_D)
        return self._row(int(np.argmax(similarity_N)), similarity_N)

    def farthest(self, seed_D: Array, first: bool) -> Row:
        similarity_N = self._similarity(seed_D)
        self._seeded_N = similarity_N if first else np.maximum(self._seeded_N, similarity_N)
        return self._row(int(np.argmin(self._seeded_N)), self._seeded_N)

    def assign(self, centroids_KD: Array) -> AssignmentPass:
        sums_KD, counts_K = np.zeros(centroids_KD.shape), np.zeros(len(centroids_KD), np.int64)
        nearest_N = np.empty(self.count(), np.int64)
        for chunk, rows_MD in self._chunks():
            nearest_M = nearest_N[chunk] = self._assign(self.rows_ND[chunk], centroids_KD)
            shape = (len(centroids_KD), len(rows_MD))
            member_KM = sparse.csr_matrix((np.ones(len(rows_MD)), (nearest_M, np.arange(len(rows_MD)))), shape=shape)
            sums_KD += member_KM @ rows_MD
            counts_K += np.bincount(nearest_M, minlength=len(centroids_KD))
        self._served_by = centroids_KD, nearest_N
        return AssignmentPass(sums_KD, counts_K, float((sums_KD * centroids_KD).sum()))

    def worst_served(self, number: int) -> list[Row]:
        assert self._served_by is not None, "there has been no pass"
        centroids_KD, nearest_N = self._served_by
        parts = [(rows_MD * centroids_KD[nearest_N[chunk]]).sum(1) for chunk, rows_MD in self._chunks()]
        served_N = np.concatenate(parts).round(DECIMALS) if parts else np.empty(0)
        found: dict[bytes, Row] = {}
        for i in np.argsort(served_N, kind="stable"):
            found.setdefault(self.rows_ND[i].tobytes(), self._row(int(i), served_N))
            if len(found) == number:
                break
        return list(found.values())

    def _chunks(self) -> Iterator[tuple[slice, Array]]:
        """Slices of the rows, and those rows in float64."""
        for start in range(0, self.count(), CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            yield chunk, self.rows_ND[chunk].astype(np.float64)

    def _similarity(self, direction_D: Array) -> Array:
        """Each row's similarity to ``direction_D``, (N,) in float64."""
        return np.concatenate([rows_MD @ direction_D for _, rows_MD in self._chunks()] or [np.empty(0)]).round(DECIMALS)

    def _row(self, index: int, similarity_N: Array) -> Row:
        return Row(float(similarity_N[index]), int(self.ordinals_N[index]), self.rows_ND[index])


def merge_passes(passes: list[AssignmentPass]) -> AssignmentPass:
    """The pass over all rows, from the passes over its parts, added in the order given."""
    return AssignmentPass(
        np.sum([part.sums_KD for part in passes], axis=0),
        np.sum([part.counts_K for part in passes], axis=0),
        float(np.sum([part.objective for part in passes])),
    )


def normalised(rows_ND: Array) -> Array:
    """Rows scaled to length 1, float32; zero rows stay zero."""
    wide_ND = rows_ND.astype(np.float64 if rows_ND.dtype == np.float64 else np.float32)
    length_N1 = np.linalg.norm(wide_ND, axis=1, keepdims=True)
    return (wide_ND / np.maximum(length_N1, 1e-12)).astype(np.float32)


def numpy_assign(rows_ND: Array, centroids_KD: Array) -> Array:
    """The slow, obvious assignment: every similarity in float64, then the largest."""
    return (rows_ND.astype(np.float64) @ centroids_KD.T.astype(np.float64)).round(DECIMALS).argmax(1)


def faiss_assign(device: str, threads: int | None = None) -> Assign:
    """Assignment by an exact FAISS index on ``cpu`` or ``gpu``; near ties are settled in float64."""
    check_faiss(device)
    import faiss

    if threads is not None:
        faiss.omp_set_num_threads(threads)
    resources = faiss.StandardGpuResources() if device == "gpu" else None

    def assign(rows_ND: Array, centroids_KD: Array) -> Array:
        index: Any = faiss.IndexFlatIP(centroids_KD.shape[1])
        if resources is not None:
            index = faiss.index_cpu_to_gpu(resources, 0, index)
        index.add(np.ascontiguousarray(centroids_KD, dtype=np.float32))
        similarity_N2, nearest_N2 = index.search(np.ascontiguousarray(rows_ND), min(2, len(centroids_KD)))
        near_tie_N = similarity_N2[:, 0] - similarity_N2[:, -1] < NEAR_TIE
        nearest_N: Array = nearest_N2[:, 0].astype(np.int64)
        nearest_N[near_tie_N] = numpy_assign(rows_ND[near_tie_N], centroids_KD)
        return nearest_N

    return assign


def check_faiss(device: str) -> None:
    """Refuse an installation without FAISS, with both of its packages, or without a GPU build where one is asked for."""
    present = [name for name in ("faiss-cpu", "faiss-gpu") if _installed(name)]
    if len(present) != 1:
        state = "both faiss-cpu and faiss-gpu are installed" if present else "FAISS is not installed"
        remove = "pip uninstall faiss-cpu faiss-gpu, then " if present else ""
        raise UserError(f"{state}: {remove}pip install 'cmcgns[cpu]' or, with CUDA, pip install 'cmcgns[gpu]'")
    if device == "gpu" and present != ["faiss-gpu"]:
        raise UserError("clustering.device gpu needs faiss-gpu: pip uninstall faiss-cpu, pip install 'cmcgns[gpu]'")


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
