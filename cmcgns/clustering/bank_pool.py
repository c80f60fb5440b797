"""Clustering pool of a training run: actors with the bank of features, and a coordinator that runs k-means over them.

The driver starts it, so that it survives a restart of the workers. The coordinator has no state between requests.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from torch import Tensor

from cmcgns import distributed
from cmcgns.cluster.placement import list_nodes, pool_strategies
from cmcgns.clustering.kmeans import Array
from cmcgns.clustering.online_clustering import (
    BankShard,
    BankState,
    RefreshRequest,
    RefreshResult,
    recluster,
    serving_actor,
)
from cmcgns.clustering.pool import LOSS_ERRORS, PooledRows, ShardActor, actor_options, threads_per_actor
from cmcgns.clustering.rows import RowArray
from cmcgns.config import ClusteringConfig
from cmcgns.errors import first_line
from cmcgns.faiss_install import check_faiss

logger = logging.getLogger(__name__)
ATTEMPTS = 3
"""Attempts at one re-clustering if actors are lost."""


class BankActor(ShardActor):
    """One actor's part of the bank. Has several threads, to accept pushes during a pass."""

    def __init__(self, index: int, actors: int, ranks: int, device: str, threads: int) -> None:
        super().__init__(device, threads)
        self.index, self.actors, self.ranks = index, actors, ranks
        self.changed = threading.Condition()
        self.bank = BankShard()
        # a restarted actor has lost its rows and waits for no pushes before its first request
        self.lost = ray.get_runtime_context().was_current_actor_reconstructed
        self.attempt, self.base_step = 0, 0
        self.delivered: set[tuple[int, int]] = set()

    def reset(self, attempt: int, base_step: int, rows_ND: Array, ordinals_N: Array) -> None:
        """Replace all rows by ``rows_ND`` and expect the pushes of ``attempt`` for steps after ``base_step``."""
        with self.changed:
            self.bank, self.delivered, self.lost = BankShard(), set(), False
            self.attempt, self.base_step = attempt, base_step
            self.bank.restore(base_step, rows_ND, ordinals_N)
            self.changed.notify_all()  # stop waiting for workers that have been replaced

    @ray.method(max_task_retries=-1)  # a push lost by the network would block the next pass; a repeated one is harmless
    def push(self, attempt: int, step: int, rank: int, first_ordinal: int, rows_nD: Array) -> None:
        """Store the rows of ``rank`` at ``step``; rows of replaced workers are dropped."""
        with self.changed:
            if self.lost:
                self.attempt = attempt
            if attempt == self.attempt:
                self.bank.push(step, rank, first_ordinal, rows_nD)
                self.delivered.add((step, rank))
                self.changed.notify_all()

    def snapshot(self, step: int, first: int, stop: int) -> int:
        """Number of rows in [first, stop), which the next passes use. Waits for the pushes of ``step`` by this actor's ranks."""
        with self.changed:
            if self.lost:
                self.lost, self.base_step = False, step
                logger.warning("clustering actor %d lost its rows and refills from step %d on", self.index, step)
            attempt = self.attempt
            self.changed.wait_for(lambda: attempt != self.attempt or self._expected(step) <= self.delivered)
            if attempt != self.attempt:
                raise RuntimeError(f"the workers that requested the rows of step {step} have been replaced")
            self.base_step = max(self.base_step, step)
            self.delivered = {(each, rank) for each, rank in self.delivered if each > self.base_step}
            rows_ND, ordinals_N = self.bank.rows_between(first, stop)
            self.bank.forget_before(first)
        self.rows = RowArray(rows_ND, ordinals_N, self.assign_rows)
        return len(self.rows)

    def _expected(self, step: int) -> set[tuple[int, int]]:
        """(step, rank) of all pushes that this actor needs before it has all rows up to ``step``."""
        return {
            (each, rank)
            for each in range(self.base_step + 1, step + 1)
            for rank in range(self.ranks)
            if serving_actor(each, rank, self.ranks, self.actors) == self.index
        }

    def rows_between(self, first: int, stop: int) -> tuple[Array, Array]:
        """Rows in [first, stop) and their ordinals."""
        with self.changed:
            return self.bank.rows_between(first, stop)


class BankCoordinator:
    """Runs one re-clustering at a time. Each request is complete, so it may be restarted."""

    def refit(
        self, shards: Sequence[ActorHandle[Any]], config: ClusteringConfig, request: RefreshRequest
    ) -> RefreshResult:
        """New centroids. After the loss of an actor, retries with the rows that are left."""
        for attempt in range(ATTEMPTS):
            try:
                wanted = (request.step, request.first_ordinal, request.stop_ordinal)
                counts = ray.get([shard.snapshot.remote(*wanted) for shard in shards])
                return recluster(PooledRows(shards, counts), request, config)
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


def start_pool(config: ClusteringConfig, ranks: int, shard_type: type[BankActor] = BankActor) -> PoolHandles:
    """A pool of ``config.actors`` actors for ``ranks`` workers, and its coordinator, one process each."""
    check_faiss(config.device)
    threads = threads_per_actor(config)
    # a push must never wait for a pass
    options = {"max_restarts": -1, "max_concurrency": 8, **actor_options(config)}
    # Ray places actors with GPUs
    nodes = [] if config.gpus_per_actor else list_nodes()
    shards = tuple(
        ray.remote(shard_type)
        .options(scheduling_strategy=strategy, **options)
        .remote(i, config.actors, ranks, config.device, threads)
        for i, strategy in enumerate(pool_strategies(nodes, config.actors, config.cpus_per_actor))
    )
    ray.get([shard.ready.remote() for shard in shards])
    bank_coordinator = ray.remote(BankCoordinator).options(num_cpus=0, max_restarts=-1).remote()
    return PoolHandles(shards, bank_coordinator, config)


class RayPool:
    """This rank's client of the pool. A thread sends the features, so that training never waits for a copy."""

    def __init__(self, handles: PoolHandles) -> None:
        self.handles = handles
        self.attempt = 0
        self._outbox: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=256)
        self._pending: Any = None
        self._error: Exception | None = None
        threading.Thread(target=self._deliver, name="clustering-push", daemon=True).start()

    def _deliver(self) -> None:
        while (send := self._outbox.get()) is not None:
            try:
                send()
            except Exception as error:  # raised by the next push or wait
                self._error = error
            finally:
                self._outbox.task_done()

    def _drain(self) -> None:
        """Wait until everything has been sent."""
        self._outbox.join()
        if self._error is not None:
            raise self._error

    def push(self, step: int, first_ordinal: int, rows_nD: Tensor, counts: Sequence[int]) -> None:
        rank, ranks = distributed.rank(), len(counts)
        shard = self.handles.shards[serving_actor(step, rank, ranks, len(self.handles.shards))]
        host_nD, copied = to_host(rows_nD)
        attempt = self.attempt
        if self._error is not None:
            raise self._error

        def send() -> None:
            if copied is not None:
                copied.synchronize()
            shard.push.remote(attempt, step, rank, first_ordinal, host_nD.numpy())

        self._outbox.put(send)

    def request(self, request: RefreshRequest) -> None:
        self._pending = self.handles.bank_coordinator.refit.remote(self.handles.shards, self.handles.config, request)

    def result(self) -> RefreshResult:
        try:
            found: RefreshResult = ray.get(self._pending)
        except RayActorError as error:
            return RefreshResult(None, f"the coordinator of the clustering pool was lost: {first_line(error)}")
        logger.info("clustering: %s", found.report)
        return found

    def save(self, step: int, first_ordinal: int, stop_ordinal: int) -> BankState:
        self._drain()
        ray.get([shard.snapshot.remote(step, first_ordinal, stop_ordinal) for shard in self.handles.shards])
        parts = [
            p
            for p in ray.get([s.rows_between.remote(first_ordinal, stop_ordinal) for s in self.handles.shards])
            if len(p[1])
        ]
        if not parts:
            return BankState(np.empty((0, 0), np.float16), np.empty(0, np.int64))
        rows_ND, ordinals_N = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        order_N = np.argsort(ordinals_N, kind="stable")
        return BankState(rows_ND[order_N], ordinals_N[order_N])

    def reset(self, step: int, state: BankState | None) -> None:
        self._drain()
        fresh = int(np.random.default_rng().integers(1, 2**62)) if distributed.rank() == 0 else 0
        self.attempt = distributed.broadcast_object(fresh)
        if distributed.rank() == 0:
            self._reset_shards(step, state)
        distributed.exchange([step])  # no rank pushes before the actors know the attempt

    def _reset_shards(self, step: int, state: BankState | None) -> None:
        bank = state if state is not None else BankState(np.empty((0, 0), np.float16), np.empty(0, np.int64))
        bounds = np.linspace(0, len(bank.ordinals_N), len(self.handles.shards) + 1).astype(int)
        ray.get(
            [
                shard.reset.remote(self.attempt, step, bank.rows_ND[start:stop], bank.ordinals_N[start:stop])
                for shard, start, stop in zip(self.handles.shards, bounds[:-1], bounds[1:], strict=True)
            ]
        )


def to_host(rows_nD: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """``rows_nD`` in float16 on the host; on a GPU also the event after which the copy is complete."""
    half_nD = rows_nD.detach().half()
    if half_nD.device.type == "cpu":
        return half_nD, None
    host_nD = torch.empty(half_nD.shape, dtype=half_nD.dtype, pin_memory=True)
    host_nD.copy_(half_nD, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host_nD, copied
