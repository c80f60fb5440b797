"""A pool for fits that stand alone: every actor gets its rows by itself, from an array or out of object storage, and gets
them again after it was lost, so that the fit ends as if nothing had happened.

N rows, D dimensions.
"""

import logging
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError

from cmcgns.clustering.embeddings import Embeddings
from cmcgns.clustering.kmeans import Array, Assign, check_faiss
from cmcgns.clustering.pool import (
    PooledRows,
    Shard,
    ShardLost,
    actor_options,
    answered,
    settled,
    threads_per_actor,
)
from cmcgns.clustering.rows import RowArray, check_rows
from cmcgns.clustering.stores import StreamedRows, load_rows
from cmcgns.config import PoolConfig
from cmcgns.errors import UserError, first_line, last_line

logger = logging.getLogger(__name__)

MOST_LOSSES = 3
"""Times that each actor may be lost before the fit fails."""
PATIENCE_S = 30.0
"""After which actors that wait for a place are mentioned."""


class Source(Protocol):
    """Where an actor gets its rows, also when it has to get them again."""

    def rows(self, assign: Assign) -> RowArray:
        """The rows of this part; one that has no direction is refused."""

    def __str__(self) -> str:
        """What to call it in a message."""


@dataclass(frozen=True)
class ArraySource:
    """Rows that lie in Ray's object store, with the ordinal of the first."""

    reference: tuple[Any, ...]
    """The reference to (N, D), in a tuple: bare, Ray would hand on the array."""
    first: int

    def rows(self, assign: Assign) -> RowArray:
        rows_ND: Array = ray.get(self.reference[0])
        check_rows(rows_ND, lambda row: f"{self}: row {row}")
        return RowArray(rows_ND, np.arange(self.first, self.first + len(rows_ND)), assign)

    def __str__(self) -> str:
        return f"array from row {self.first} on"


@dataclass(frozen=True)
class ParquetSource:
    """Rows that each actor reads from object storage by itself."""

    part: Embeddings
    memory_bytes: float
    """Up to which rows are held in memory."""
    scratch: str | None
    """Folder for what memory does not hold."""
    streamed: bool
    """Hold nothing, and read what is asked for each time; without weights."""

    def rows(self, assign: Assign) -> RowArray:
        if self.streamed:
            return RowArray(StreamedRows(self.part), self.part.ordinals_N, assign)
        store, weights_N = load_rows(self.part, self.memory_bytes, self.scratch)
        return RowArray(store, self.part.ordinals_N, assign, weights_N)

    def __str__(self) -> str:
        return f"{self.part.uri} ({self.part.rows} rows)"


def array_sources(rows_ND: Array, bounds: Sequence[int]) -> list[ArraySource]:
    """One source for each run of rows between neighbouring ``bounds``."""
    return [ArraySource((ray.put(rows_ND[a:b]),), a) for a, b in pairwise(bounds)]


class SourceShard(Shard):
    """A shard whose rows come from a source."""

    source: Source | None = None

    @ray.method(max_task_retries=-1)  # waits for an actor that is being started anew
    def load(self, index: int, source: Source) -> int:
        """Get the rows, unless they are there; their number."""
        if self.rows is None:
            try:
                self.source, self.rows = source, source.rows(self.assign_rows)
            except UserError as error:
                raise UserError(f"clustering shard {index}: {error}") from None
        return len(self.rows)

    def run(self, function: Callable[..., Any], index: int, *arguments: Any) -> Any:
        """``function(index, source, rows, search, *arguments)`` in this process."""
        if self.rows is None:
            raise ShardLost("no rows are held")
        return function(index, self.source, self.rows, self.search, *arguments)

    def peak_memory(self) -> int:
        """Most bytes that the process has held in memory so far."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class SourcePool:
    """Shards that get their rows by themselves, each actor on a process of its own and spread over the machines.

    A shard that is lost gets its rows again; no pass goes on without it, and none waits for a timer.
    """

    def __init__(self, sources: Sequence[Source], config: PoolConfig) -> None:
        check_faiss(config.device)
        self.sources = sources
        self.losses = [0] * len(sources)
        """Times that each actor was lost."""
        options = actor_options(config) | {"scheduling_strategy": "SPREAD", "max_restarts": MOST_LOSSES}
        make, threads = ray.remote(SourceShard).options(**options), threads_per_actor(config)
        self.shards = [make.remote(config.device, threads) for _ in sources]
        try:
            wait_until_up([shard.ready.remote() for shard in self.shards])
            self.counts = self._load(range(len(sources)))
        except BaseException:
            self.stop()
            raise
        self.rows = PooledRows(self.shards, self.counts, self.recover)

    def recover(self, lost: dict[int, Exception]) -> None:
        """Wait until the shards that were lost have their rows again."""
        for i, error in lost.items():
            self.losses[i] += 1
            logger.warning(
                "clustering actor %d of %d was lost (%s); it is started anew and gets its rows again from %s",
                i, len(self.shards), first_line(error), self.sources[i],
            )  # fmt: skip
        before = time.perf_counter()
        for i, count in zip(lost, self._load(lost), strict=True):
            if count != self.counts[i]:
                raise UserError(f"{self.sources[i]} gave {count} rows, and {self.counts[i]} before; it must not change")
            logger.warning("clustering actor %d has its %d rows again (%.1f s)", i, count, time.perf_counter() - before)

    def _load(self, indices: Iterable[int]) -> list[int]:
        """Rows of the shards named, once each has got them."""
        loading = [(i, self.shards[i].load.remote(i, self.sources[i])) for i in indices]
        counts = []
        for i, reference in loading:
            try:
                counts.append(answered(reference))
            except (RayActorError, OutOfMemoryError) as error:
                raise RuntimeError(
                    f"clustering actor {i} of {len(self.shards)} was lost more than {MOST_LOSSES} times, at last because: "
                    f"{first_line(error)}. If memory ran out, lower clustering.memory_gib or use more actors"
                ) from error
        return counts

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(index, source, rows, search, *arguments)`` of every shard, in its process."""
        return settled(lambda i: self.shards[i].run.remote(function, i, *arguments), len(self.shards), self.recover)

    def peak_memory(self) -> list[int]:
        """Most bytes that each actor has held so far."""
        return settled(lambda i: self.shards[i].peak_memory.remote(), len(self.shards), self.recover)

    def stop(self) -> None:
        """End all actors."""
        for shard in self.shards:
            ray.kill(shard)


def wait_until_up(ready: Sequence[Any]) -> None:
    """Wait for actors, saying what they wait for where it takes long."""
    waiting = list(ready)
    while waiting:
        up, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=PATIENCE_S)
        try:
            ray.get(up)
        except ActorDiedError as error:
            if not error.actor_init_failed:
                raise
            # FAISS that does not load, or sees no GPU
            raise UserError(last_line(error).split("UserError: ")[-1]) from error
        if waiting:
            free = ray.available_resources()
            logger.warning(
                "%d of %d clustering actors wait for a place; free are %g CPUs and %g GPUs",
                len(waiting), len(ready), free.get("CPU", 0), free.get("GPU", 0),
            )  # fmt: skip
