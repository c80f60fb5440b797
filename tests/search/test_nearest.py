"""Nearest vectors against a loop over all of them, in one index and in several shards, exact and approximate."""

import numpy as np
import pytest

from cmcgns.search.nearest import DEPTH, SAMPLE, Shards, build, tune
from tests.clustering.sets import heavy_tailed


def unit_rows(number: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(number, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def by_loop(vectors: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    """The ``k`` nearest rows, the slow way."""
    cosines = [float(sum(float(a) * float(b) for a, b in zip(query, vector, strict=True))) for vector in vectors]
    return sorted(range(len(vectors)), key=lambda row: -cosines[row])[:k]


def cut(vectors: np.ndarray, *bounds: int) -> list[np.ndarray]:
    return np.split(vectors, bounds)


def test_a_flat_index_finds_what_a_loop_over_all_vectors_finds() -> None:
    vectors, queries = unit_rows(300, 16, 0), unit_rows(7, 16, 1)
    found = Shards([build(vectors, "flat")]).search(queries, 9)
    assert found.ordinal_Qk.tolist() == [by_loop(vectors, query, 9) for query in queries]
    np.testing.assert_allclose(
        found.cosine_Qk, np.take_along_axis(queries @ vectors.T, found.ordinal_Qk, axis=1), atol=1e-6
    )


@pytest.mark.parametrize("bounds", [(150,), (1, 2, 299), (0, 300), (100, 100, 200)])
def test_shards_find_what_one_index_finds(bounds: tuple[int, ...]) -> None:
    """Also shards with fewer vectors than neighbours, or none."""
    vectors, queries = unit_rows(300, 16, 0), unit_rows(7, 16, 1)
    one = Shards([build(vectors, "flat")]).search(queries, 9)
    shards = Shards([build(part, "flat") for part in cut(vectors, *bounds)])
    assert len(shards) == 300
    for found in (shards.search(queries, 9), shards.exact(queries, 9)):
        assert np.array_equal(found.ordinal_Qk, one.ordinal_Qk)
        np.testing.assert_allclose(found.cosine_Qk, one.cosine_Qk, atol=1e-6)


def test_of_equal_vectors_the_first_comes_first_in_any_shards() -> None:
    vectors = np.tile(unit_rows(1, 8, 0), (12, 1))
    for bounds in ((), (5,), (3, 4, 9)):
        shards = Shards([build(part, "flat") for part in cut(vectors, *bounds)])
        for k in (5, 12):
            assert shards.search(vectors[:1], k).ordinal_Qk.tolist() == [[*range(k)]]


@pytest.fixture(scope="module")
def large() -> tuple[Shards, dict[str, np.ndarray], np.ndarray]:
    """Three shards of inverted lists, queries from them and from elsewhere, and all vectors."""
    vectors = heavy_tailed(9000, 24, 0)
    shards = Shards([build(part, "ivf") for part in cut(vectors, 4000, 8500)])
    return shards, {"films": shards.sample(SAMPLE), "reports": heavy_tailed(SAMPLE, 24, 1)}, vectors


@pytest.mark.parametrize("least", [0.5, 0.8, 0.95])
def test_the_recall_that_an_approximate_index_states_is_that_of_a_loop(
    least: float, large: tuple[Shards, dict[str, np.ndarray], np.ndarray]
) -> None:
    shards, queries, vectors = large
    tuned = tune(shards, queries, least, own="films")
    for name, query_QD in queries.items():
        own = int(name == "films")
        found = Shards(shards.indexes, tuned.share).search(query_QD, DEPTH + own).ordinal_Qk[:, own:]
        wanted = np.argsort(-(query_QD @ vectors.T), axis=1)[:, own : DEPTH + own]
        hits = [len({*one} & {*other}) / DEPTH for one, other in zip(found.tolist(), wanted.tolist(), strict=True)]
        assert tuned.recall[name] == pytest.approx(np.mean(hits), abs=2e-3)  # near ties
        assert tuned.recall[name] >= least
    assert tuned.share < 1


def test_more_recall_takes_more_lists_and_all_lists_find_everything(
    large: tuple[Shards, dict[str, np.ndarray], np.ndarray],
) -> None:
    shards, queries, _ = large
    shares = [tune(shards, queries, least, own="films").share for least in (0.3, 0.9, 1.0)]
    assert shares == sorted(set(shares))
    assert tune(Shards(shards.indexes), queries, 1.0, own="films").recall == {"films": 1.0, "reports": 1.0}
