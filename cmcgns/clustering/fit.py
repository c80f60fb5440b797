"""The kmeans job: fit centroids to a set of embeddings, assign its rows, and write both to a run folder."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from cmcgns import storage
from cmcgns.cluster.placement import bundles
from cmcgns.clustering.assignments import PartialStatistics, statistics, write_assignments
from cmcgns.clustering.config import FitConfig, KMeansConfig
from cmcgns.clustering.embeddings import Columns, Embeddings, open_embeddings
from cmcgns.clustering.kmeans import SEEDINGS, Array, Fit, NearestSearch, Rows, kmeans, normalised
from cmcgns.clustering.pool import ParquetSource, SourcePool
from cmcgns.clustering.rows import RowArray, check_rows
from cmcgns.errors import UserError, first_line, with_prefix
from cmcgns.faiss_install import check_faiss
from cmcgns.job import Job, check_capacity
from cmcgns.run_folder import RunFolder, open_folder, refuse_changes, write_config

SHOWN_CLUSTERS = 5


def show_clusters(terminal: Console, found: dict[str, Any]) -> None:
    """Print the largest clusters, with the rows nearest to their centroids."""
    largest = sorted(found["clusters"], key=lambda cluster: -cluster["size"])[:SHOWN_CLUSTERS]
    table = Table("cluster", "size", "cohesion", "nearest", box=None, pad_edge=False)
    for cluster in largest:
        nearest = " | ".join(str(row.get("text") or row["id"]) for row in cluster["nearest"])
        cohesion = f"{cluster['cohesion']:.3f}" if cluster["size"] else "-"
        table.add_row(str(cluster["cluster"]), str(cluster["size"]), cohesion, escape(nearest))
    terminal.print(table)


STATE, METRICS = "fit.safetensors", "metrics.jsonl"


def initial_fit(config: KMeansConfig, folder: RunFolder, embeddings: Embeddings) -> Fit | None:
    """The fit to resume or to start from; None if its centroids have to be seeded."""
    settings = config.clustering
    if folder.resumed and storage.exists(folder.file(STATE)):
        fit = from_bytes(storage.read_bytes(folder.file(STATE)))
        if fit.centroids_KD.shape[1] != embeddings.dim:
            raise UserError(
                f"run.resume {folder.name} clusters vectors of {fit.centroids_KD.shape[1]} numbers; those of "
                f"{embeddings.uri} have {embeddings.dim}"
            )
        return fit
    if settings.start_from is None:
        return None
    return Fit(read_centroids(settings.start_from, (settings.num_clusters, embeddings.dim)))


def read_centroids(uri: str, shape: tuple[int, int]) -> Array:
    """Unit-length centroids of a fit or a pretraining export; raises unless they have ``shape`` (K, D)."""
    key = f"clustering.start_from {uri}"
    try:
        tensors = safetensors.load(storage.read_bytes(uri))
    except UserError as error:
        raise UserError(f"clustering.start_from {with_prefix(uri, str(error))}") from None
    except SafetensorError as error:
        raise UserError(f"{key} is not a safetensors file ({error}); give a centroids.safetensors") from None
    rows_KD = tensors.get("rows_KD")
    if rows_KD is None or rows_KD.shape != shape:
        given = f"has shape {rows_KD.shape}" if rows_KD is not None else f"has {', '.join(tensors)} but no rows_KD"
        raise UserError(f"{key} {given}; it must have shape {shape} (K, D)")
    # an export has zero rows if clustering never started in its run
    check_rows(rows_KD, lambda row: f"{key}: row {row}")
    unit = np.allclose(np.linalg.norm(rows_KD, axis=1), 1.0, rtol=0, atol=1e-6)
    return rows_KD if unit else normalised(rows_KD)  # normalising unit rows again would change their last bits


def save_state(folder: RunFolder, fit: Fit) -> None:
    """Write all that is needed to resume from ``fit``."""
    storage.write_bytes(folder.file(STATE), to_bytes(fit))


def to_bytes(fit: Fit) -> bytes:
    """``fit`` as safetensors."""
    figures = np.array([fit.iteration, fit.objective, fit.reseeded, fit.near_ties, fit.converged], np.float64)
    totals = {} if fit.totals_KD is None else {"totals_KD": fit.totals_KD}
    return bytes(safetensors.save({"centroids_KD": fit.centroids_KD, "figures": figures} | totals))


def from_bytes(data: bytes) -> Fit:
    """The ``Fit`` that ``to_bytes`` wrote."""
    tensors = safetensors.load(data)
    iteration, objective, reseeded, near_ties, converged = tensors["figures"].tolist()
    return Fit(
        tensors["centroids_KD"],
        int(iteration),
        objective,
        int(reseeded),
        int(near_ties),
        bool(converged),
        tensors.get("totals_KD"),
    )


class MetricsLog:
    """metrics.jsonl: one row per iteration, continued by a resumed fit."""

    def __init__(self, folder: RunFolder, iteration: int) -> None:
        self.folder, self.last = folder, time.perf_counter()
        lines = storage.read_bytes(folder.file(METRICS)).decode().splitlines() if iteration else []
        self.rows = [row for row in map(json.loads, lines) if row["iteration"] <= iteration]

    def write(self, fit: Fit, actors_lost: int) -> str:
        """Write the row of ``fit``. Returns it as text."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.rows.append(
            {
                "iteration": fit.iteration,
                "objective": fit.objective,
                "reseeded": fit.reseeded,
                "near_ties": fit.near_ties,
                "actors_lost": actors_lost,
                "seconds": seconds,
            }
        )
        storage.write_bytes(self.folder.file(METRICS), "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        return (
            f"iteration {fit.iteration}: mean similarity {fit.objective:.6f}, {fit.reseeded} re-seeded, "
            f"{fit.near_ties} near ties, {seconds:.2f} s"
        )


FREE_TO_CHANGE = {
    "data": {"uri"},
    "clustering": {
        "actors",
        "cpus_per_actor",
        "gpus_per_actor",
        "device",
        "iterations",
        "memory_gib",
        "scratch",
        "nearest",
    },
    "run": {"name", "storage", "resume"},
}
"""Settings that may change when a fit is resumed."""


class StopRequested(KeyboardInterrupt):
    """The user asked to stop; the state has been saved."""


class KMeansJob(Job):
    """K-means over a set of embeddings, resumable after every iteration."""

    script = "kmeans"
    resumes_from = "the last iteration"
    packages = ("cmcgns", "ray", "numpy", "pyarrow", "torch")

    def __init__(self, config: KMeansConfig) -> None:
        self.config, self.settings = config, config.clustering
        check_faiss(self.settings.device)
        self.folder = open_folder(config.run, "kmeans")
        if self.folder.resumed:
            refuse_changes(config, self.folder, FREE_TO_CHANGE)
        self.embeddings = open_data(config)
        self.start = initial_fit(config, self.folder, self.embeddings)

    def needed(self) -> list[dict[str, float]]:
        return bundles(self.settings.actors, self.settings.cpus_per_actor, self.settings.gpus_per_actor)

    def check_cluster(self, cpus: float) -> None:
        own = self.settings
        check_capacity("clustering", "actor", own.actors, own.cpus_per_actor, own.gpus_per_actor)

    def plan(self, cpus: float) -> dict[str, str]:
        settings, embeddings, start = self.settings, self.embeddings, self.start
        files = len({group.uri for group in embeddings.groups})
        share = embeddings.rows / settings.actors * embeddings.dim * 4 / 2**30
        place = (
            "in memory" if share <= settings.memory_gib else f"on disk (clustering.memory_gib {settings.memory_gib:g})"
        )
        if settings.streamed:
            place = "read again for each pass"
        fit = f"K = {settings.num_clusters}, at most {settings.iterations} iterations"
        if settings.batch_rows is not None:
            fit += f" of about {settings.batch_rows} rows"
        begin = f"{settings.seeding} seeding" if start is None else settings.start_from or "k-means"
        if self.folder.resumed and start is not None:
            begin = f"iteration {start.iteration} of {self.folder.name}"
        return {
            "data": f"{embeddings.uri}: {embeddings.rows} rows of {embeddings.dim} in {files} files",
            "fit": f"{fit}, from {begin}",
            "pool": f"{settings.actors} actors of {settings.cpus_per_actor:g} CPUs and {settings.gpus_per_actor:g} GPUs "
            f"({settings.device}); {share:.2f} GiB of rows each, {place}",
            "folder": self.folder.uri,
        }

    def run(self, terminal: Console) -> dict[str, Any]:
        return fit_and_write(terminal, self.config, self.folder, self.embeddings, self.start)

    def reason(self, error: Exception) -> str:
        return first_line(error)

    def write_result(self, result: dict[str, Any]) -> None:
        if self._has_begun(result):
            super().write_result(result)

    def report(self, terminal: Console, result: dict[str, Any]) -> None:
        if self._has_begun(result):
            super().report(terminal, result)
        else:
            terminal.print("stopped before the first iteration; nothing was written", highlight=False)

    def _has_begun(self, result: dict[str, Any]) -> bool:
        return result["status"] == "finished" or storage.exists(self.folder.file("config.yaml"))

    def summary(self, result: dict[str, Any]) -> dict[str, str]:
        return {
            "finished": f"{result['iterations']} iterations, mean similarity {result['mean_similarity']:.6f}, "
            f"{result['empty_clusters']} empty clusters, {result['seconds']} s",
            "centroids": self.folder.file("centroids.safetensors"),
            "assignments": self.folder.file("assignments"),
            "statistics": self.folder.file("statistics.json"),
        }


def open_data(config: KMeansConfig) -> Embeddings:
    """The set of embeddings in ``config``; raises if it has fewer rows than clusters."""
    data, num_clusters = config.data, config.clustering.num_clusters
    columns = Columns(data.id_column, data.vector_column, data.weight_column, data.text_column)
    try:
        found = open_embeddings(storage.absolute("data.uri", data.uri), columns)
    except storage.MissingFileError as error:
        raise UserError(f"data.uri {error}") from None
    if num_clusters > found.rows:
        raise UserError(
            f"clustering.num_clusters {num_clusters} is more than the {found.rows} rows of {data.uri}; lower it"
        )
    return found


def fit_and_write(
    terminal: Console, config: KMeansConfig, folder: RunFolder, embeddings: Embeddings, start: Fit | None
) -> dict[str, Any]:
    """Run the fit and write its files. Returns the content of result.json."""
    settings, began = config.clustering, time.perf_counter()
    sources = [
        ParquetSource(part, settings.memory_gib * 2**30, settings.scratch, settings.streamed)
        for part in embeddings.split(settings.actors)
    ]
    pool = SourcePool(sources, settings)
    try:
        terminal.print(
            f"{settings.actors} actors loaded their rows in {time.perf_counter() - began:.1f} s", highlight=False
        )
        start = start or Fit(seed_centroids(terminal, pool.rows, settings))
        if not folder.resumed:  # only now: rows without K distinct ones should not use up the name
            write_config(folder, config)
        save_state(folder, start)
        fit = run_fit(terminal, settings, folder, pool, start)
        storage.write_bytes(folder.file("centroids.safetensors"), safetensors.save({"rows_KD": fit.centroids_KD}))
        found = write_results(settings, folder, pool, fit)
        show_clusters(terminal, found)
        return {
            "rows": embeddings.rows,
            "dim": embeddings.dim,
            "iterations": fit.iteration,
            "converged": fit.converged,
            "mean_similarity": found["mean_similarity"],
            "reseeded": fit.reseeded,
            "empty_clusters": found["empty_clusters"],
            "actors_lost": sum(pool.losses),
            "peak_memory_mib": [round(peak / 2**20) for peak in pool.peak_memory()],
            "seconds": round(time.perf_counter() - began, 1),
        }
    finally:
        pool.stop()


def run_fit(terminal: Console, settings: FitConfig, folder: RunFolder, pool: SourcePool, start: Fit) -> Fit:
    """Run the fit; after every iteration save its state and one row of metrics."""
    log = MetricsLog(folder, start.iteration)
    with stop_between_iterations(terminal) as stopping:

        def after(fit: Fit) -> None:
            line = log.write(fit, sum(pool.losses))  # before the state: a resumed fit needs all rows up to its state
            save_state(folder, fit)
            terminal.print(line, highlight=False)
            if stopping():
                raise StopRequested

        return kmeans(
            pool.rows, start, settings.iterations, settings.tolerance, settings.batch_rows, settings.seed, after
        )


def seed_centroids(terminal: Console, rows: Rows, settings: FitConfig) -> Array:
    """First centroids (K, D); for mini-batches, from a sample of the size of a mini-batch."""
    begun = time.perf_counter()
    if settings.batch_rows is not None:
        rows = RowArray(rows.subset(max(settings.batch_rows, settings.num_clusters), settings.seed))
    centroids_KD = SEEDINGS[settings.seeding](rows, settings.num_clusters, settings.seed)
    terminal.print(f"{settings.seeding} seeding took {time.perf_counter() - begun:.1f} s", highlight=False)
    return centroids_KD


@contextmanager
def stop_between_iterations(terminal: Console) -> Iterator[Callable[[], bool]]:
    """Function that returns whether Ctrl-C was pressed; a second Ctrl-C raises KeyboardInterrupt."""
    requested = False

    def request_stop(signum: int, frame: Any) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, before)
        terminal.print("stopping after this iteration; press Ctrl-C again to stop at once", style="yellow")

    before = signal.signal(signal.SIGINT, request_stop)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, before)


def write_results(settings: FitConfig, folder: RunFolder, pool: SourcePool, fit: Fit) -> dict[str, Any]:
    """Write assignments and statistics.json. Returns the statistics."""
    storage.delete_folder(folder.file("assignments"))  # of a stopped attempt, maybe with another number of actors
    parts = pool.run(_assign_shard, fit.centroids_KD, folder.file("assignments"), settings.nearest)
    found = statistics(parts, settings.nearest)
    folder.write_json("statistics.json", found)
    return found


def _assign_shard(
    index: int,
    source: ParquetSource,
    rows: RowArray,
    search: NearestSearch,
    centroids_KD: Array,
    uri: str,
    nearest: int,
) -> PartialStatistics:
    return write_assignments(index, source.part, rows.rows_ND, centroids_KD, uri, nearest, search)
