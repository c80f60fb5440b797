"""K-means on a pool of actors beside FAISS alone and scikit-learn, and how its time grows; start-up of actors apart."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from cmcgns.clustering.kmeans import Array, kmeans, normalised
from cmcgns.clustering.pool import SourcePool, array_sources
from cmcgns.config import PoolConfig
from tests.benchmarks.measure import Line, interleaved, ratio_of_medians

ROWS, DIM, ITERATIONS = 200_000, 768, 10
WANTED = {128: 1.15, 512: 1.05}
"""Most times FAISS's time, by K."""
ALL = -1.0
"""A tolerance that lets every iteration run."""


def mixture(rows: int, dim: int, components: int = 300, seed: int = 0) -> Array:
    """Normalised rows around overlapping directions, (rows, dim) float32."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(components, dim)).astype(np.float32)
    noise = random.standard_normal((rows, dim), dtype=np.float32)
    return normalised(centres[random.integers(0, components, rows)] + 1.5 * noise)


@contextmanager
def array_pool(rows_ND: Array, actors: int, cpus: float = 1.0) -> Iterator[SourcePool]:
    """A pool over equal runs of rows."""
    bounds = np.linspace(0, len(rows_ND), actors + 1).astype(int).tolist()
    pool = SourcePool(array_sources(rows_ND, bounds), PoolConfig(actors=actors, cpus_per_actor=cpus))
    try:
        yield pool
    finally:
        pool.stop()


def faiss_kmeans(rows_ND: Array, start_KD: Array, threads: int, iterations: int = ITERATIONS) -> Any:
    """FAISS's own k-means on all rows."""
    import faiss

    faiss.omp_set_num_threads(threads)
    model = faiss.Kmeans(
        rows_ND.shape[1], len(start_KD), niter=iterations, spherical=True, max_points_per_centroid=10**9
    )
    model.train(rows_ND, init_centroids=start_KD)
    return model


def sklearn_kmeans(rows_ND: Array, start_KD: Array) -> Any:
    """scikit-learn's Lloyd iterations, none left out."""
    from sklearn.cluster import KMeans

    return KMeans(len(start_KD), init=start_KD, n_init=1, max_iter=ITERATIONS, tol=0).fit(rows_ND)


def beside_others(
    rows: int = ROWS, dim: int = DIM, clusters: tuple[int, ...] = (128, 512), rounds: int = 5
) -> list[Line]:
    """Two one-thread actors beside FAISS with two threads and scikit-learn with two."""
    rows_ND, began = mixture(rows, dim), time.perf_counter()
    lines = []
    with array_pool(rows_ND, 2) as pool:
        lines.append(Line("start-up of two actors and their rows", f"{time.perf_counter() - began:.1f} s"))
        for number in clusters:
            start_KD = rows_ND[np.random.default_rng(1).choice(rows, number, replace=False)]
            runs = {
                "pool": partial(kmeans, pool.rows, start_KD, ITERATIONS, ALL),
                "faiss": partial(faiss_kmeans, rows_ND, start_KD, 2),
                "sklearn": partial(sklearn_kmeans, rows_ND, start_KD),
            }
            seconds = interleaved(runs, rounds, warm_up=1)
            for name, wanted in (("faiss", WANTED.get(number, 1.15)), ("sklearn", 1.0)):
                ratio = ratio_of_medians(seconds, "pool", name)
                what = f"{rows} x {dim}, K={number}, {ITERATIONS} iterations: pool beside {name}"
                times = f"{median(seconds['pool']):.2f} s / {median(seconds[name]):.2f} s"
                lines.append(Line(what, f"{times} = {ratio:.2f}", f"<= {wanted}", ratio <= wanted))
    return lines


def growth(rows: int = 25_000, dim: int = 256, doublings: int = 4, rounds: int = 3) -> list[Line]:
    """Time of an iteration against rows at K=128, and against K at the smallest number of rows."""
    seconds: dict[str, list[float]] = {}
    sizes = [rows * 2**i for i in range(doublings + 1)]
    for size in sizes:
        rows_ND = mixture(size, dim)
        with array_pool(rows_ND, 2) as pool:
            runs = {f"{size} rows, K=128": partial(kmeans, pool.rows, rows_ND[:128], 3, ALL)}
            if size == sizes[-2]:
                runs |= {
                    f"{size} rows, K={k}": partial(kmeans, pool.rows, rows_ND[:k], 3, ALL) for k in (64, 256, 512, 1024)
                }
            seconds |= interleaved(runs, rounds, warm_up=1)
    by_rows = [(f"{size} rows", median(seconds[f"{size} rows, K=128"]) / 3) for size in sizes]
    by_k = [(f"K={k}", median(seconds[f"{sizes[-2]} rows, K={k}"]) / 3) for k in (64, 128, 256, 512, 1024)]
    lines = []
    for what, table in ((f"K=128, D={dim}", by_rows), (f"{sizes[-2]} rows, D={dim}", by_k)):
        lines.append(Line(f"{what}: {table[0][0]}", f"{table[0][1] * 1e3:.0f} ms an iteration"))
        lines += [
            Line(f"{what}: {name}", f"{now * 1e3:.0f} ms, {now / before:.2f} x the half")
            for (_, before), (name, now) in pairwise(table)
        ]
    return lines


def coordinator(
    actors: tuple[int, ...] = (2, 8, 32), rows: int = 500, dim: int = 256, clusters: int = 256
) -> list[Line]:
    """What the coordinator's process spends on an iteration, with shards so small that little else happens."""
    lines = []
    for number in actors:
        rows_ND = mixture(rows * number, dim)
        with array_pool(rows_ND, number, cpus=0.01) as pool:
            kmeans(pool.rows, rows_ND[:clusters], 3, ALL)
            wall, spent, iterations = time.perf_counter(), time.process_time(), 20
            kmeans(pool.rows, rows_ND[:clusters], iterations, ALL)
            wall, spent = time.perf_counter() - wall, time.process_time() - spent
        measured = f"{spent / iterations * 1e3:.1f} ms CPU, {wall / iterations * 1e3:.0f} ms in all"
        lines.append(Line(f"coordinator, {number} actors of {rows} x {dim}, K={clusters}, an iteration", measured))
    return lines


def lines() -> list[Line]:
    """The table; starts a Ray of its own."""
    import ray

    ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        return [*beside_others(), *growth(), *coordinator()]
    finally:
        ray.shutdown()


if __name__ == "__main__":
    from tests.benchmarks.measure import where

    print(where())
    print(*lines(), sep="\n")
