"""The banks of features on the side of their actors: a part of each bank on each actor, and re-clusterings over all of them.

The driver starts the actors, so that they survive a restart of the workers; ``bank_pool`` is a worker's client. Starts without
torch. N rows, n rows of one rank at one step, K centroids, D embedding.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.actor import ActorHandle

from cmcgns.cluster.placement import list_nodes, pool_strategies
from cmcgns.clustering.kmeans import Array, Fit, Rows
from cmcgns.clustering.pool import LOSS_ERRORS, PooledRows, RowsLost, ShardActor, actor_options, threads_per_actor
from cmcgns.clustering.rows import RowArray
from cmcgns.config import ClusteringConfig
from cmcgns.errors import UserError, first_line
from cmcgns.faiss_install import check_faiss
from cmcgns.plugins import load_plugin

logger = logging.getLogger(__name__)
ATTEMPTS = 3
"""Attempts at one re-clustering if actors are lost."""


class RefreshRequest(NamedTuple):
    """One global re-clustering: which rows, from which centroids, as which version."""

    version: int
    step: int
    first_ordinal: int
    stop_ordinal: int
    num_clusters: int
    start_KD: Array | None
    """Current centroids, so that cluster ids stay stable; None for farthest-point seeding."""


class Pushers(NamedTuple):
    """The workers whose rows count: ``attempt`` is another one each time that they start."""

    attempt: int
    ranks: int


class RefreshResult(NamedTuple):
    """New centroids, or None and the reason in ``report``."""

    rows_KD: Array | None
    report: str
    counts_K: Array | None = None
    """Members of each new centroid among the rows, int64."""


class BankState(NamedTuple):
    """Rows of the bank and their ordinals, for a checkpoint."""

    rows_ND: Array
    ordinals_N: Array


def serving_actor(step: int, rank: int, ranks: int, actors: int) -> int:
    """Index of the actor that stores what ``rank`` pushes at ``step``: rank mod actors. If there are more actors than ranks, each
    rank alternates between its actors, so that none stays empty."""
    if actors <= ranks:
        return rank % actors
    own = range(rank, actors, ranks)
    return own[step % len(own)]


@dataclass
class BankShard:
    """One actor's part of the bank: the last ``bank_size`` rows of the run.

    A row's ordinal is its position in the run's sentences, ordered by (step, rank, row); it depends on neither the number of
    actors nor that of ranks.
    """

    chunks: dict[tuple[int, int], tuple[Array, Array]] = field(default_factory=dict)
    """(step, rank) -> float16 rows (n, D) and their int64 ordinals (n,)."""

    def push(self, step: int, rank: int, first_ordinal: int, rows_nD: Array) -> None:
        """Store the rows of ``rank`` at ``step``."""
        ordinals_n = np.arange(first_ordinal, first_ordinal + len(rows_nD))
        self.chunks[step, rank] = (rows_nD.astype(np.float16), ordinals_n)

    def restore(self, step: int, rows_ND: Array, ordinals_N: Array) -> None:
        """Store rows from a checkpoint, as of ``step``; ordinals may have gaps if an actor was lost."""
        self.chunks[step, 0] = (rows_ND.astype(np.float16), ordinals_N.copy())

    def rows_between(self, first: int, stop: int) -> tuple[Array, Array]:
        """Float16 rows and their ordinals in [first, stop), by ordinal."""
        chunks = [chunk for chunk in self.chunks.values() if len(chunk[1])]
        chunks.sort(key=lambda chunk: int(chunk[1][0]))
        if not chunks:
            return np.empty((0, 0), np.float16), np.empty(0, np.int64)
        rows_ND = np.concatenate([rows for rows, _ in chunks])
        ordinals_N = np.concatenate([ordinals for _, ordinals in chunks])
        inside_N = (ordinals_N >= first) & (ordinals_N < stop)
        return rows_ND[inside_N], ordinals_N[inside_N]

    def forget_before(self, first: int) -> None:
        """Drop chunks that end before ordinal ``first``; later re-clusterings do not need them."""
        self.chunks = {key: chunk for key, chunk in self.chunks.items() if len(chunk[1]) and chunk[1][-1] >= first}


def recluster(rows: Rows, request: RefreshRequest, config: ClusteringConfig) -> RefreshResult:
    """New centroids for ``request`` from ``rows``, or the reason for their absence."""
    before = time.perf_counter()
    if not rows.count():  # every actor with rows was lost
        return RefreshResult(None, "the pool has no rows of this bank left")
    clusterer = load_plugin("clustering.clusterer", config.clusterer, {"kmeans": "cmcgns.clustering.kmeans"})
    try:
        found: Fit = clusterer.cluster(rows, request.start_KD, request.num_clusters, config)
    except UserError as error:  # too few distinct rows
        return RefreshResult(None, str(error))
    counts_K = rows.assign(found.centroids_KD).counts_K  # the fit's last pass was with the centroids before these
    return RefreshResult(
        found.centroids_KD,
        f"version {request.version} of step {request.step}: {rows.count()} rows, {found.iteration} iterations, "
        f"mean similarity {found.objective:.4f}, {found.reseeded} re-seeded, {time.perf_counter() - before:.2f} s",
        counts_K,
    )


@dataclass
class BankPart:
    """What an actor has of one bank, and whose pushes it waits for."""

    lost: bool
    """The actor has been restarted, has lost the rows, and waits for no pushes before the first request."""
    shard: BankShard = field(default_factory=BankShard)
    attempt: int = 0
    base_step: int = 0
    delivered: set[tuple[int, int]] = field(default_factory=set)
    """(step, rank) of the pushes after ``base_step``."""
    rows: RowArray | None = None
    """Rows of the passes, as of the last snapshot."""


class BankActor(ShardActor):
    """One actor's part of every bank. Has several threads, to accept pushes during a pass."""

    def __init__(self, index: int, actors: int, device: str, threads: int) -> None:
        super().__init__(device, threads)
        self.index, self.actors = index, actors
        self.changed = threading.Condition()
        self.parts: dict[str, BankPart] = {}
        self.restarted = ray.get_runtime_context().was_current_actor_reconstructed

    def part(self, bank: str) -> BankPart:
        """This actor's part of ``bank``; call it with ``changed`` held."""
        return self.parts.setdefault(bank, BankPart(self.restarted))

    def rows_of(self, bank: str) -> RowArray:
        rows = self.parts[bank].rows if bank in self.parts else None
        if rows is None:
            raise RowsLost(f"this actor has no rows of bank {bank}")
        return rows

    def reset(self, bank: str, attempt: int, base_step: int, rows_ND: Array, ordinals_N: Array) -> None:
        """Replace all rows by ``rows_ND`` and expect the pushes of ``attempt`` for steps after ``base_step``."""
        with self.changed:
            part = self.part(bank)
            part.shard, part.delivered, part.lost = BankShard(), set(), False
            part.attempt, part.base_step = attempt, base_step
            part.shard.restore(base_step, rows_ND, ordinals_N)
            self.changed.notify_all()  # stop waiting for workers that have been replaced

    @ray.method(max_task_retries=-1)  # a push lost by the network would block the next pass; a repeated one is harmless
    def push(self, bank: str, attempt: int, step: int, rank: int, first_ordinal: int, rows_nD: Array) -> None:
        """Store the rows of ``rank`` at ``step``; rows of replaced workers are dropped."""
        with self.changed:
            part = self.part(bank)
            if part.lost:
                part.attempt = attempt
            if attempt == part.attempt:
                part.shard.push(step, rank, first_ordinal, rows_nD)
                part.delivered.add((step, rank))
                self.changed.notify_all()

    def snapshot(self, bank: str, step: int, first: int, stop: int, pushers: Pushers) -> int:
        """Number of rows in [first, stop), which the next passes use. Waits for the pushes of ``step`` to this actor."""
        with self.changed:
            part = self.part(bank)
            if part.lost:
                part.lost, part.base_step, part.attempt = False, step, pushers.attempt
                logger.warning("clustering actor %d lost its rows and refills from step %d on", self.index, step)
            replaced = lambda: part.attempt != pushers.attempt
            self.changed.wait_for(lambda: replaced() or self._expected(part, step, pushers.ranks) <= part.delivered)
            if replaced():
                raise RuntimeError(f"the workers that requested the rows of step {step} have been replaced")
            part.base_step = max(part.base_step, step)
            part.delivered = {(each, rank) for each, rank in part.delivered if each > part.base_step}
            rows_ND, ordinals_N = part.shard.rows_between(first, stop)
            part.shard.forget_before(first)
        part.rows = RowArray(rows_ND, ordinals_N, self.assign_rows)
        return len(part.rows)

    def _expected(self, part: BankPart, step: int, ranks: int) -> set[tuple[int, int]]:
        """(step, rank) of all pushes that this actor needs before it has all rows up to ``step``."""
        return {
            (each, rank)
            for each in range(part.base_step + 1, step + 1)
            for rank in range(ranks)
            if serving_actor(each, rank, ranks, self.actors) == self.index
        }

    def rows_between(self, bank: str, first: int, stop: int) -> tuple[Array, Array]:
        """Rows in [first, stop) and their ordinals."""
        with self.changed:
            return self.part(bank).shard.rows_between(first, stop)


class BankCoordinator:
    """Runs one re-clustering at a time, of any bank. Each request is complete, so it may be restarted."""

    def refit(
        self,
        shards: Sequence[ActorHandle[Any]],
        config: ClusteringConfig,
        bank: str,
        request: RefreshRequest,
        pushers: Pushers,
    ) -> RefreshResult:
        """New centroids of ``bank``. After the loss of an actor, retries with the rows that are left."""
        for attempt in range(ATTEMPTS):
            try:
                wanted = (bank, request.step, request.first_ordinal, request.stop_ordinal, pushers)
                counts = ray.get([shard.snapshot.remote(*wanted) for shard in shards])
                return recluster(PooledRows(shards, counts, bank=bank), request, config)
            except LOSS_ERRORS as error:
                lost = f"a clustering actor was lost: {first_line(error)}"
                logger.warning("%s; attempt %d of %d", lost, attempt + 1, ATTEMPTS)
        return RefreshResult(None, lost)


@dataclass(frozen=True)
class PoolHandles:
    """The pool's actors, for the workers."""

    shards: tuple[ActorHandle[Any], ...]
    bank_coordinator: ActorHandle[Any]
    config: ClusteringConfig

    def stop(self) -> None:
        """Kill all actors of the pool."""
        for actor in (*self.shards, self.bank_coordinator):
            ray.kill(actor)


def start_pool(config: ClusteringConfig, shard_type: type[BankActor] = BankActor) -> PoolHandles:
    """A pool of ``config.actors`` actors for all banks, and its coordinator, one process each."""
    check_faiss(config.device)
    threads = threads_per_actor(config)
    # a push must never wait for a pass
    options = {"max_restarts": -1, "max_concurrency": 8, **actor_options(config)}
    # Ray places actors with GPUs
    nodes = [] if config.gpus_per_actor else list_nodes()
    shards = tuple(
        ray.remote(shard_type)
        .options(scheduling_strategy=strategy, **options)
        .remote(i, config.actors, config.device, threads)
        for i, strategy in enumerate(pool_strategies(nodes, config.actors, config.cpus_per_actor))
    )
    ray.get([shard.ready.remote() for shard in shards])
    bank_coordinator = ray.remote(BankCoordinator).options(num_cpus=0, max_restarts=-1).remote()
    return PoolHandles(shards, bank_coordinator, config)
