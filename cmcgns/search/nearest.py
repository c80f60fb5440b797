"""FAISS: nearest vectors by cosine over several shards, and the recall of an approximate index.

N vectors of one shard, Q queries, D embedding, k neighbours; all vectors have length 1.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmcgns.errors import UserError
from cmcgns.faiss_install import load_faiss

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Kind = Literal["flat", "ivf"]
DEPTH = 10
"""Neighbours of the recall that an index states."""
SAMPLE = 256
"""Vectors of each kind that query the index to measure its recall."""
TRAINING_POINTS = 64
"""Vectors per inverted list from which its centroid is computed."""
SHARES = tuple(2.0**-power for power in range(8, -1, -1))
"""Shares of the inverted lists to look into, tried from the least."""
NEAR_TIE = 1e-6
"""float32 cosines that differ by less are the same."""


class Neighbours(NamedTuple):
    """The nearest vectors of each query, nearest first; fewer than k are padded with -inf and -1."""

    cosine_Qk: Floats
    ordinal_Qk: Ints


def build(vector_ND: Floats, kind: Kind) -> Any:
    """A FAISS index of the vectors: exact, or with about sqrt(N) inverted lists."""
    faiss = load_faiss("cpu")
    number, dim = vector_ND.shape
    index = faiss.IndexFlatIP(dim)
    if kind == "ivf" and number:
        lists = 2 ** round(math.log2(math.sqrt(number)))
        index = faiss.IndexIVFFlat(index, dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.max_points_per_centroid = TRAINING_POINTS
        index.cp.min_points_per_centroid = 1  # else FAISS prints a warning for a small last shard
        index.cp.spherical = True
        index.train(vector_ND)
    index.add(vector_ND)
    return index


def write(index: Any, path: Path) -> None:
    """Write a FAISS index to a local file."""
    load_faiss("cpu").write_index(index, str(path))


def read(path: Path, name: str) -> Any:
    """The FAISS index in a local file, memory-mapped; messages call it ``name``."""
    faiss = load_faiss("cpu")
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError:
        raise UserError(f"{name} is no FAISS index that this version reads; build the index again") from None


class Shards:
    """FAISS indexes of the consecutive parts of one set of vectors, searched one after the other."""

    def __init__(self, indexes: Sequence[Any], share: float = 1.0) -> None:
        self.indexes = list(indexes)
        self.share = share
        """Share of the inverted lists that a search looks into; without meaning for exact indexes."""
        self.start_s = np.cumsum([0, *(index.ntotal for index in self.indexes)])

    def __len__(self) -> int:
        return int(self.start_s[-1])

    def search(self, query_QD: Floats, k: int) -> Neighbours:
        """The ``k`` nearest vectors of all shards; of equal ones the first."""
        best = Neighbours(np.zeros((len(query_QD), 0), np.float32), np.zeros((len(query_QD), 0), np.int64))
        for index, start in zip(self.indexes, self.start_s, strict=False):
            cosine_Qk, row_Qk = index.search(query_QD, k, params=self._parameters(index))
            cosine_Qk = np.where(row_Qk < 0, -np.inf, cosine_Qk)
            best = merged(best, Neighbours(cosine_Qk, np.where(row_Qk < 0, -1, row_Qk + start)), k)
        return best

    def exact(self, query_QD: Floats, k: int) -> Neighbours:
        """The same by comparing every vector, one shard in memory at a time."""
        faiss = load_faiss("cpu")
        best = Neighbours(np.zeros((len(query_QD), 0), np.float32), np.zeros((len(query_QD), 0), np.int64))
        for vector_ND, start in zip(self.vectors(), self.start_s, strict=False):
            if len(vector_ND):
                number = min(k, len(vector_ND))
                found = faiss.knn(query_QD, vector_ND, number, metric=faiss.METRIC_INNER_PRODUCT)
                best = merged(best, Neighbours(found[0], found[1] + start), k)
        return best

    def vectors(self) -> Iterator[Floats]:
        """The vectors of each shard."""
        for index in self.indexes:
            yield index.reconstruct_n(0, index.ntotal)

    def sample(self, number: int, seed: int = 0) -> Floats:
        """``number`` random vectors, or all if there are fewer."""
        random = np.random.default_rng(seed)
        rows = np.sort(random.choice(len(self), min(number, len(self)), replace=False))
        parts = [
            vector_ND[rows[(rows >= start) & (rows < start + len(vector_ND))] - start]
            for vector_ND, start in zip(self.vectors(), self.start_s, strict=False)
        ]
        return np.concatenate(parts)

    def _parameters(self, index: Any) -> Any:
        if not hasattr(index, "nlist"):
            return None
        return load_faiss("cpu").SearchParametersIVF(nprobe=max(math.ceil(self.share * index.nlist), 1))


def merged(one: Neighbours, other: Neighbours, k: int) -> Neighbours:
    """The ``k`` nearest of both."""
    cosine_Qn = np.concatenate([one.cosine_Qk, other.cosine_Qk], axis=1)
    ordinal_Qn = np.concatenate([one.ordinal_Qk, other.ordinal_Qk], axis=1)
    order_Qn = np.lexsort((ordinal_Qn, -cosine_Qn), axis=1)[:, :k]
    take = lambda values_Qn: np.take_along_axis(values_Qn, order_Qn, axis=1)
    return Neighbours(take(cosine_Qn), take(ordinal_Qn))


def recall(shards: Shards, query_QD: Floats, exact: Neighbours, skip: int = 0) -> float:
    """Share of the ``exact`` neighbours that a search finds; one as near as the last of them counts as found.

    ``skip``: nearest ones that do not count.
    """
    found = shards.search(query_QD, exact.cosine_Qk.shape[1])
    return float((found.cosine_Qk[:, skip:] >= exact.cosine_Qk[:, -1:] - NEAR_TIE).mean())


class Tuned(NamedTuple):
    """How many inverted lists a search looks into, and what it finds."""

    share: float
    """Share of the lists."""
    recall: dict[str, float]
    """Recall at ``DEPTH`` by kind of query."""


def tune(shards: Shards, queries: dict[str, Floats], least: float, own: str) -> Tuned:
    """The least of ``SHARES`` with which queries of every kind find at least ``least`` of their ``DEPTH`` nearest vectors.

    Queries of the kind ``own`` are in the shards: that they find themselves does not count.
    """
    skip = {name: int(name == own) for name in queries}
    depth = {name: min(DEPTH + skip[name], len(shards)) for name in queries}
    wanted = {name: shards.exact(query_QD, depth[name]) for name, query_QD in queries.items()}
    found = dict[str, float]()
    for share in SHARES:
        tried = Shards(shards.indexes, share)
        found = {name: recall(tried, query_QD, wanted[name], skip[name]) for name, query_QD in queries.items()}
        if min(found.values()) >= least:
            break
    return Tuned(share, found)
