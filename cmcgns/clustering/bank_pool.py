"""A worker's client of the clustering pool of a training run."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError
from torch import Tensor

from cmcgns import distributed
from cmcgns.clustering.bank import BankState, PoolHandles, Pushers, RefreshRequest, RefreshResult, serving_actor
from cmcgns.errors import first_line

logger = logging.getLogger(__name__)


class RayPool:
    """This rank's client of one bank of the pool. A thread sends the features, so that training never waits for a copy."""

    def __init__(self, handles: PoolHandles, bank: str) -> None:
        self.handles, self.bank = handles, bank
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

    @property
    def _pushers(self) -> Pushers:
        return Pushers(self.attempt, distributed.world_size())

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
            shard.push.remote(self.bank, attempt, step, rank, first_ordinal, host_nD.numpy())

        self._outbox.put(send)

    def request(self, request: RefreshRequest) -> None:
        pool = self.handles
        self._pending = pool.bank_coordinator.refit.remote(pool.shards, pool.config, self.bank, request, self._pushers)

    def result(self) -> RefreshResult:
        try:
            found: RefreshResult = ray.get(self._pending)
        except RayActorError as error:
            return RefreshResult(None, f"the coordinator of the clustering pool was lost: {first_line(error)}")
        logger.info("clustering of %s: %s", self.bank, found.report)
        return found

    def save(self, step: int, first_ordinal: int, stop_ordinal: int) -> BankState:
        self._drain()
        shards, wanted = self.handles.shards, (first_ordinal, stop_ordinal)
        ray.get([shard.snapshot.remote(self.bank, step, *wanted, self._pushers) for shard in shards])
        parts = [part for part in ray.get([s.rows_between.remote(self.bank, *wanted) for s in shards]) if len(part[1])]
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
                shard.reset.remote(self.bank, self.attempt, step, bank.rows_ND[start:stop], bank.ordinals_N[start:stop])
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
