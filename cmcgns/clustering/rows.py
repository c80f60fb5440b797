"""Rows in one place: the part of one actor of a pool, or a whole set, the oracle of the pool in tests.

N rows, M rows of one chunk, n seeds, K centroids, D dimensions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from cmcgns.clustering.kmeans import (
    BLOCK_ROWS,
    DECIMALS,
    Array,
    Assign,
    NearestCentroids,
    PassTotals,
    ScoredRow,
    faiss_assign,
    normalised,
)
from cmcgns.errors import UserError

CHUNK_ROWS = 4 * BLOCK_ROWS
"""Rows read and assigned at a time."""
CACHED_ROWS = 512
"""Rows converted to float64 at a time: few enough for the processor's cache."""
GRID = 2.0**24
"""Entries of rows are multiples of 1 / GRID: half a billion of them can be summed without rounding."""
MIN_LENGTH = np.float32(1e-12)
"""Shorter rows count as zero."""


class RowStore(Protocol):
    """Normalised float32 rows on the grid, in memory or in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""

    def __getitem__(self, index: Any) -> Array:
        """The rows of a slice, or one row."""


class KeyedRows(NamedTuple):
    """Rows, and the keys that decide their order."""

    key_n: Array
    rows_nD: Array


class RowArray:
    """Rows in one store (numpy arrays are rounded to the grid), their positions ``ordinals_N`` in the whole set, and weights.

    Weighted sums are rounded, so the sum of parts agrees with the whole only to about 1e-12.
    """

    def __init__(
        self,
        rows_ND: Array | RowStore,
        ordinals_N: Array | None = None,
        assign: Assign | None = None,
        weights_N: Array | None = None,
    ) -> None:
        self.rows_ND = round_to_grid(rows_ND) if isinstance(rows_ND, np.ndarray) else rows_ND
        self.ordinals_N = np.arange(len(self)) if ordinals_N is None else ordinals_N
        self.weights_N = weights_N
        self._assign = assign or faiss_assign("cpu")
        self._seed_cache = NearestSeeds(np.empty((0, 0)), np.empty(0), np.empty(0, np.int64))
        self._last_pass: LastPass | None = None

    def __len__(self) -> int:
        return self.rows_ND.shape[0]

    def count(self) -> int:
        return len(self)

    def mean(self) -> Array:
        return self.total() / max(len(self), 1)

    def total(self) -> Array:
        """Float64 sum of all rows, (D,)."""
        sums_1D = np.zeros((1, self.rows_ND.shape[1]))
        for _, rows_MD in self._chunks():
            add_members(sums_1D, rows_MD, np.zeros(len(rows_MD), np.int64), None)
        return sums_1D[0]

    def subset(self, number: int, seed: int) -> Array:
        return self.subset_with_keys(number, seed).rows_nD

    def subset_with_keys(self, number: int, seed: int) -> KeyedRows:
        """The ``number`` rows with the lowest random keys; those of a whole are among those of its parts."""
        key_N = uniform_by_ordinal(seed, self.ordinals_N)
        chosen_n = np.argsort(key_N, kind="stable")[:number]
        return KeyedRows(key_N[chosen_n], self._take(chosen_n))

    def nearest(self, direction_D: Array) -> ScoredRow:
        similarity_N = self._similarity(direction_D)
        return self._row(int(np.argmax(similarity_N)), similarity_N)

    def farthest(self, seeds_nD: Array) -> ScoredRow:
        similarity_N = self._nearest_seeds(seeds_nD).similarity_N
        return self._row(int(np.argmin(similarity_N)), similarity_N)

    def total_distance(self, seeds_nD: Array) -> float:
        # on the grid, so that summing does not round
        distance_N = np.rint((1 - self._nearest_seeds(seeds_nD).similarity_N) * GRID) / GRID
        return float(distance_N.sum() if self.weights_N is None else distance_N @ self.weights_N)

    def draw(self, seeds_nD: Array, rate: float, seed: int) -> Array:
        return self.draw_with_keys(seeds_nD, rate, seed).rows_nD

    def draw_with_keys(self, seeds_nD: Array, rate: float, seed: int) -> KeyedRows:
        """Rows of ``draw``, with their ordinals as keys."""
        probability_N = rate * (1 - self._nearest_seeds(seeds_nD).similarity_N)
        if self.weights_N is not None:
            probability_N = probability_N * self.weights_N
        chosen_n = np.flatnonzero(uniform_by_ordinal(seed, self.ordinals_N) < probability_N)
        return KeyedRows(self.ordinals_N[chosen_n], self._take(chosen_n))

    def seed_weights(self, seeds_nD: Array) -> Array:
        return np.bincount(self._nearest_seeds(seeds_nD).seed_N, self.weights_N, minlength=len(seeds_nD)).astype(
            np.float64
        )

    def assign(self, centroids_KD: Array, blocks: Array | None = None) -> PassTotals:
        sums_KD, counts_K = np.zeros(centroids_KD.shape), np.zeros(len(centroids_KD), np.int64)
        nearest_N, weight, near_ties = np.full(len(self), -1, np.int64), 0.0, 0
        for chunk, rows_MD in self._chunks(blocks):
            found = self._assign(rows_MD, centroids_KD)
            weights_M = None if self.weights_N is None else self.weights_N[chunk]
            add_members(sums_KD, rows_MD, found.nearest_N, weights_M)
            counts_K += np.bincount(found.nearest_N, minlength=len(centroids_KD))
            nearest_N[chunk] = found.nearest_N
            weight += float(len(rows_MD) if weights_M is None else weights_M.sum())
            near_ties += found.near_ties
        self._last_pass = LastPass(centroids_KD, blocks, nearest_N)
        return PassTotals(sums_KD, counts_K, weight, near_ties)

    def worst_assigned(self, centroids_KD: Array, number: int, blocks: Array | None = None) -> list[ScoredRow]:
        if self._last_pass is None or not self._last_pass.matches(centroids_KD, blocks):
            self.assign(centroids_KD, blocks)
        assert self._last_pass is not None
        nearest_N = self._last_pass.nearest_N
        similarity_N = np.full(len(self), np.inf)
        for chunk, rows_MD in self._chunks(blocks):
            similarity_N[chunk] = dot(rows_MD, centroids_KD, nearest_N[chunk])
        worst_n = np.argsort(similarity_N, kind="stable")[: np.count_nonzero(similarity_N < np.inf)]
        found: dict[bytes, ScoredRow] = {}
        start, size = 0, number
        while len(found) < number and start < len(worst_n):  # repeats only if some rows were equal
            indices = worst_n[start : start + size]
            for i, row_D in zip(indices, self._take(indices), strict=True):
                found.setdefault(row_D.tobytes(), ScoredRow(float(similarity_N[i]), int(self.ordinals_N[i]), row_D))
            start, size = start + size, 2 * size
        return list(found.values())[:number]

    def _nearest_seeds(self, seeds_nD: Array) -> "NearestSeeds":
        """Each row's nearest seed. Seeds that the last call had too come from the cache."""
        known = self._seed_cache
        new_from = len(known.seeds_nD)
        if new_from == 0 or not np.array_equal(known.seeds_nD, seeds_nD[:new_from]):
            known, new_from = NearestSeeds(seeds_nD[:0], np.full(len(self), -np.inf), np.zeros(len(self), np.int64)), 0
        if new_from < len(seeds_nD):
            new_nD = seeds_nD[new_from:]
            for chunk, rows_MD in self._chunks():
                found = self._nearest(rows_MD, new_nD)
                similarity_M = dot(rows_MD, new_nD, found.nearest_N)
                better_M = similarity_M > known.similarity_N[chunk]
                known.similarity_N[chunk][better_M] = similarity_M[better_M]
                known.seed_N[chunk][better_M] = new_from + found.nearest_N[better_M]
        self._seed_cache = NearestSeeds(seeds_nD, known.similarity_N, known.seed_N)
        return self._seed_cache

    def _nearest(self, rows_MD: Array, seeds_nD: Array) -> NearestCentroids:
        return (
            self._assign(rows_MD, seeds_nD)
            if len(seeds_nD) > 1
            else NearestCentroids(np.zeros(len(rows_MD), np.int64), 0)
        )

    def _chunks(self, blocks: Array | None = None) -> Iterator[tuple[slice, Array]]:
        """Slices, with their rows, of all rows or of some (ascending) blocks of ordinals."""
        runs = [slice(0, len(self))] if blocks is None else block_slices(self.ordinals_N, blocks)
        for run in runs:
            for start in range(run.start, run.stop, CHUNK_ROWS):
                chunk = slice(start, min(start + CHUNK_ROWS, run.stop))
                yield chunk, self.rows_ND[chunk]

    def _similarity(self, direction_D: Array) -> Array:
        """Each row's similarity to ``direction_D``, (N,) in float64."""
        zeros = np.zeros(CHUNK_ROWS, np.int64)
        parts = [dot(rows_MD, direction_D[None], zeros[: len(rows_MD)]) for _, rows_MD in self._chunks()]
        return np.concatenate(parts or [np.empty(0)])

    def _take(self, indices: Array) -> Array:
        """Rows at ``indices``, (n, D), in that order; read in ascending order."""
        taken_nD = np.empty((len(indices), self.rows_ND.shape[1]), np.float32)
        for position in np.argsort(indices, kind="stable"):
            taken_nD[position] = self.rows_ND[int(indices[position])]
        return taken_nD

    def _row(self, index: int, similarity_N: Array) -> ScoredRow:
        return ScoredRow(float(similarity_N[index]), int(self.ordinals_N[index]), np.array(self.rows_ND[index]))


class LastPass(NamedTuple):
    """Arguments of the last pass, and each row's centroid (-1 for a row outside the blocks)."""

    centroids_KD: Array
    blocks: Array | None
    nearest_N: Array

    def matches(self, centroids_KD: Array, blocks: Array | None) -> bool:
        """Whether it was a pass with these centroids over these blocks."""
        if (self.blocks is None) != (blocks is None):
            return False
        same_blocks = self.blocks is None or blocks is None or np.array_equal(self.blocks, blocks)
        return same_blocks and np.array_equal(self.centroids_KD, centroids_KD)


class NearestSeeds(NamedTuple):
    """The nearest seed of each row, and its similarity."""

    seeds_nD: Array
    similarity_N: Array
    seed_N: Array


def round_to_grid(rows_ND: Array) -> Array:
    """Normalised float32 rows whose entries are multiples of 1 / GRID."""
    return np.rint(normalised(rows_ND) * np.float32(GRID)) / np.float32(GRID)


def check_rows(rows_ND: Array, name_row: Callable[[int], str], first: int = 0) -> None:
    """Raise on NaN, infinite and zero rows, which have no direction. ``name_row`` describes a row by its number; ``first`` is
    the number of the first."""
    length_N = np.linalg.norm(rows_ND.astype(np.float32, copy=False), axis=1)
    wrong_N = ~(length_N > MIN_LENGTH) | ~np.isfinite(length_N)
    if wrong_N.any():
        row = int(np.flatnonzero(wrong_N)[0])
        what = "is zero" if length_N[row] <= MIN_LENGTH else "has NaN or infinity"
        raise UserError(
            f"{name_row(first + row)} {what} and no direction ({int(wrong_N.sum())} such rows of {len(rows_ND)} "
            "checked); remove such rows from the set"
        )


def add_members(sums_KD: Array, rows_MD: Array, nearest_M: Array, weights_M: Array | None) -> None:
    """Add each row, times its weight, to the float64 sum of its centroid, in place."""
    import torch  # here: takes seconds, and the coordinator of a pool and actors that wait for rows do without

    sums, nearest = torch.from_numpy(sums_KD), torch.from_numpy(nearest_M)
    rows = torch.from_numpy(rows_MD)
    weights = None if weights_M is None else torch.from_numpy(weights_M.astype(np.float64, copy=False))[:, None]
    for start in range(0, len(rows_MD), CACHED_ROWS):
        part = slice(start, start + CACHED_ROWS)
        wide = rows[part].double()
        sums.index_add_(0, nearest[part], wide if weights is None else wide * weights[part])


def dot(rows_MD: Array, others_nD: Array, other_M: Array) -> Array:
    """Similarity of each row to one of ``others_nD``, (M,) in float64; independent of the row's position."""
    similarity_M = np.empty(len(rows_MD))
    for start in range(0, len(rows_MD), CACHED_ROWS):
        part = slice(start, start + CACHED_ROWS)
        wide_MD = rows_MD[part].astype(np.float64)
        if len(others_nD) == 1:
            similarity_M[part] = wide_MD @ others_nD[0].astype(np.float64)
        else:
            similarity_M[part] = np.einsum("md,md->m", wide_MD, others_nD[other_M[part]].astype(np.float64))
    return similarity_M.round(DECIMALS)


def uniform_by_ordinal(seed: int, ordinals_N: Array) -> Array:
    """A number in [0, 1) for each ordinal, a function of it and ``seed`` only (SplitMix64, Steele et al. 2014)."""
    mixed_N = ordinals_N.astype(np.uint64) + np.random.default_rng(seed).integers(0, 2**63, dtype=np.uint64)
    for multiplier, shift in ((0x9E3779B97F4A7C15, 0), (0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        mixed_N = (mixed_N ^ (mixed_N >> np.uint64(shift)) if shift else mixed_N) * np.uint64(multiplier)
    return ((mixed_N ^ (mixed_N >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def block_slices(ordinals_N: Array, blocks: Array) -> list[slice]:
    """Slices of ascending ``ordinals_N``, one for each block of ordinals that has rows."""
    starts, stops = (
        np.searchsorted(ordinals_N, blocks * BLOCK_ROWS),
        np.searchsorted(ordinals_N, (blocks + 1) * BLOCK_ROWS),
    )
    return [slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True) if stop > start]


def merge_lowest(number: int | None, *parts: KeyedRows) -> KeyedRows:
    """The ``number`` rows of all parts with the lowest keys (None: all rows), in ascending order of their keys."""
    key_n = np.concatenate([part.key_n for part in parts])
    order_n = np.argsort(key_n, kind="stable")[:number]
    return KeyedRows(key_n[order_n], np.concatenate([part.rows_nD for part in parts])[order_n])


def merge_worst(number: int, *parts: Sequence[ScoredRow]) -> list[ScoredRow]:
    """The worst assigned distinct rows of all parts, worst first; ties go to the lowest ordinal."""
    found: dict[bytes, ScoredRow] = {}
    for row in sorted((row for part in parts for row in part), key=lambda row: (row.similarity, row.ordinal)):
        found.setdefault(row.vector_D.tobytes(), row)
    return list(found.values())[:number]
