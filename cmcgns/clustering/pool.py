"""A pool of Ray actors that hold rows: each runs FAISS on its own rows, and answers are merged in two levels.

K centroids, D dimensions.
"""

import logging
import math
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from cmcgns.clustering.embeddings import Embeddings, StreamedRows, load_rows
from cmcgns.clustering.kmeans import Array, Assign, PassTotals, ScoredRow, assign_by, faiss_search, merge_passes
from cmcgns.clustering.rows import KeyedRows, RowArray, check_rows, merge_lowest, merge_worst
from cmcgns.config import PoolConfig
from cmcgns.errors import UserError, first_line, last_line
from cmcgns.faiss_install import check_faiss

logger = logging.getLogger(__name__)
FAN_IN = 4
"""Answers that the coordinator merges itself; if there are more, actors merge about sqrt(n) each first."""


class RowsLost(RuntimeError):
    """The actor has been restarted since it received its rows."""


LOSS_ERRORS = (RayActorError, ObjectLostError, OutOfMemoryError, RowsLost)
"""Errors of Ray if an actor or its node died, or if it was killed to free memory."""


class ShardActor:
    """One actor's rows and its FAISS passes."""

    def __init__(self, device: str, threads: int) -> None:
        self.search = faiss_search(device, threads)
        self.assign_rows = assign_by(self.search)
        self.rows: RowArray | None = None

    def ready(self) -> None:
        """Returns once the actor is up."""

    def rows_of(self, bank: str) -> RowArray:
        """The rows of a pass; ``bank`` is "" for an actor with a single set of them."""
        if self.rows is None:
            raise RowsLost("this actor has no rows")
        return self.rows

    def call(self, bank: str, method: str, *arguments: Any) -> tuple[bool, Any]:
        """Whether this shard has rows, and the result of ``RowArray.method``: two objects, so that the coordinator can check
        for success without fetching the result."""
        rows = self.rows_of(bank)
        return (True, getattr(rows, method)(*arguments)) if len(rows) else (False, None)

    def merge(self, merge: Callable[..., Any], *parts: Any) -> Any:
        """``merge`` of the answers of some shards, for the coordinator."""
        return merge(*parts)


Recover = Callable[[dict[int, Exception]], None]
"""Reloads the lost shards, given by index with the error."""


class PooledRows:
    """The rows of all shards as one set, or those of one ``bank``. Without ``recover`` the caller handles the loss of a shard."""

    def __init__(
        self, shards: Sequence[ActorHandle[Any]], counts: Sequence[int], recover: Recover | None = None, bank: str = ""
    ) -> None:
        self.shards, self.counts, self._recover, self.bank = shards, counts, recover, bank

    def count(self) -> int:
        return sum(self.counts)

    def mean(self) -> Array:
        total_D: Array = self._call_and_merge(sum_parts, "total")
        return total_D / max(self.count(), 1)

    def subset(self, number: int, seed: int) -> Array:
        drawn: KeyedRows = self._call_and_merge(partial(merge_lowest, number), "subset_with_keys", number, seed)
        return drawn.rows_nD

    def nearest(self, direction_D: Array) -> ScoredRow:
        row: ScoredRow = self._call_and_merge(most_similar, "nearest", direction_D)
        return row

    def farthest(self, seeds_nD: Array) -> ScoredRow:
        row: ScoredRow = self._call_and_merge(least_similar, "farthest", seeds_nD)
        return row

    def total_distance(self, seeds_nD: Array) -> float:
        return float(self._call_and_merge(sum_parts, "total_distance", seeds_nD))

    def draw(self, seeds_nD: Array, rate: float, seed: int) -> Array:
        drawn: KeyedRows = self._call_and_merge(partial(merge_lowest, None), "draw_with_keys", seeds_nD, rate, seed)
        return drawn.rows_nD

    def seed_weights(self, seeds_nD: Array) -> Array:
        share_n: Array = self._call_and_merge(sum_parts, "seed_weights", seeds_nD)
        return share_n

    def assign(self, centroids_KD: Array, blocks: Array | None = None) -> PassTotals:
        found: PassTotals = self._call_and_merge(merge_passes, "assign", centroids_KD, blocks)
        return found

    def worst_assigned(self, centroids_KD: Array, number: int, blocks: Array | None = None) -> list[ScoredRow]:
        rows: list[ScoredRow] = self._call_and_merge(
            partial(merge_worst, number), "worst_assigned", centroids_KD, number, blocks
        )
        return rows

    def _call_and_merge(self, merge: Callable[..., Any], method: str, *arguments: Any) -> Any:
        """Answers of all shards, merged in their order."""
        # one copy in the object store for all actors
        shared = [ray.put(argument) if isinstance(argument, np.ndarray) else argument for argument in arguments]
        while True:
            answers = self._call_shards(method, shared)
            try:
                if len(answers) <= FAN_IN:
                    return merge(*ray.get([answer for _, answer in answers]))
                return merge(*ray.get(self._merge_on_shards(merge, answers)))
            except LOSS_ERRORS as error:  # an actor died after it answered, and its answer with it
                if self._recover is None:
                    raise
                logger.warning("clustering: an answer was lost before it was merged (%s); retrying", first_line(error))

    def _call_shards(self, method: str, arguments: Sequence[Any]) -> list[tuple[int, Any]]:
        """Index of each shard that has rows, and a reference to its answer."""
        answers: dict[int, Any] = {}

        def send(i: int) -> Any:
            has_rows, answers[i] = self.shards[i].call.options(num_returns=2).remote(self.bank, method, *arguments)
            return has_rows

        has_rows = call_all(send, len(self.shards), self._recover)
        return [(i, answers[i]) for i in range(len(self.shards)) if has_rows[i]]

    def _merge_on_shards(self, merge: Callable[..., Any], answers: list[tuple[int, Any]]) -> list[Any]:
        """References to about sqrt(n) merged answers, so that the coordinator merges that many instead of n."""
        size = math.isqrt(len(answers) - 1) + 1
        groups = [answers[start : start + size] for start in range(0, len(answers), size)]
        return [self.shards[group[0][0]].merge.remote(merge, *(answer for _, answer in group)) for group in groups]


def call_all(send: Callable[[int], Any], number: int, recover: Recover | None) -> list[Any]:
    """Answers to ``send(0)`` ... ``send(number - 1)``, all sent at once; repeated for shards that were lost."""
    answers: dict[int, Any] = {}
    waiting = list(range(number))
    while waiting:
        sent, lost = {i: send(i) for i in waiting}, {}
        for i, reference in sent.items():
            try:
                answers[i] = get_answer(reference)
            except LOSS_ERRORS as error:
                if recover is None:
                    raise
                lost[i] = error
        if lost and recover is not None:
            recover(lost)
        waiting = list(lost)
    return [answers[i] for i in range(number)]


def get_answer(reference: Any) -> Any:
    """Answer of an actor; raises a ``UserError`` as it was, without Ray's traceback."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def actor_options(config: PoolConfig) -> dict[str, Any]:
    """Resources that Ray reserves for one actor."""
    return {"num_cpus": config.cpus_per_actor, "num_gpus": config.gpus_per_actor}


def threads_per_actor(config: PoolConfig) -> int:
    """FAISS threads of one actor: its number of whole CPUs."""
    return max(int(config.cpus_per_actor), 1)


def sum_parts(*parts: Any) -> Any:
    """Sum of numbers or arrays."""
    return np.sum(parts, axis=0)


def most_similar(*rows: ScoredRow) -> ScoredRow:
    """The most similar row; ties go to the lowest ordinal."""
    return min(rows, key=lambda row: (-row.similarity, row.ordinal))


def least_similar(*rows: ScoredRow) -> ScoredRow:
    """The least similar row; ties go to the lowest ordinal."""
    return min(rows, key=lambda row: (row.similarity, row.ordinal))


MAX_RESTARTS = 3
"""How often each actor may be lost before the fit fails."""
WAIT_WARNING_S = 30.0
"""Log a warning about actors that wait for resources this often."""


class RowSource(Protocol):
    """Where an actor reads its rows, again after a restart."""

    def rows(self, assign: Assign) -> RowArray:
        """The rows of this part; raises on a row that has no direction."""

    def __str__(self) -> str:
        """Its name in messages."""


@dataclass(frozen=True)
class ArraySource:
    """Rows in Ray's object store, and the ordinal of the first."""

    reference: tuple[Any, ...]
    """The reference to (N, D), in a tuple: Ray replaces a bare reference argument with the array."""
    first: int

    def rows(self, assign: Assign) -> RowArray:
        rows_ND: Array = ray.get(self.reference[0])
        check_rows(rows_ND, lambda row: f"{self}: row {row}")
        return RowArray(rows_ND, np.arange(self.first, self.first + len(rows_ND)), assign)

    def __str__(self) -> str:
        return f"array, rows from {self.first}"


@dataclass(frozen=True)
class ParquetSource:
    """Rows that each actor reads from storage."""

    part: Embeddings
    memory_bytes: float
    """Largest size of rows kept in memory."""
    scratch: str | None
    """Folder for rows that do not fit in memory."""
    streamed: bool
    """Store no rows and read them on every access; without weights."""

    def rows(self, assign: Assign) -> RowArray:
        if self.streamed:
            return RowArray(StreamedRows(self.part), self.part.ordinals_N, assign)
        store, weights_N = load_rows(self.part, self.memory_bytes, self.scratch)
        return RowArray(store, self.part.ordinals_N, assign, weights_N)

    def __str__(self) -> str:
        return f"{self.part.uri} ({self.part.rows} rows)"


def array_sources(rows_ND: Array, bounds: Sequence[int]) -> list[ArraySource]:
    """One source for each run of rows between consecutive ``bounds``."""
    return [ArraySource((ray.put(rows_ND[a:b]),), a) for a, b in pairwise(bounds)]


class SourceActor(ShardActor):
    """A shard that reads its rows from a source."""

    source: RowSource | None = None

    @ray.method(max_task_retries=-1)  # waits for an actor that is restarting
    def load(self, index: int, source: RowSource) -> int:
        """Read the rows, unless they are loaded. Returns their number."""
        if self.rows is None:
            try:
                self.source, self.rows = source, source.rows(self.assign_rows)
            except UserError as error:
                raise UserError(f"clustering shard {index}: {error}") from None
        return len(self.rows)

    def run(self, function: Callable[..., Any], index: int, *arguments: Any) -> Any:
        """``function(index, source, rows, search, *arguments)`` in this process."""
        if self.rows is None:
            raise RowsLost("this actor has no rows")
        return function(index, self.source, self.rows, self.search, *arguments)

    def peak_memory(self) -> int:
        """Peak resident memory of the process in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class SourcePool:
    """Shards that read their own rows, one process each, spread over the nodes.

    A lost shard reads its rows again; no pass continues without it or waits for a timeout.
    """

    def __init__(self, sources: Sequence[RowSource], config: PoolConfig) -> None:
        check_faiss(config.device)
        self.sources = sources
        self.losses = [0] * len(sources)
        """How often each actor was lost."""
        options = actor_options(config) | {"scheduling_strategy": "SPREAD", "max_restarts": MAX_RESTARTS}
        make, threads = ray.remote(SourceActor).options(**options), threads_per_actor(config)
        self.shards = [make.remote(config.device, threads) for _ in sources]
        try:
            wait_for_actors([shard.ready.remote() for shard in self.shards])
            self.counts = self._load(range(len(sources)))
        except BaseException:
            self.stop()
            raise
        self.rows = PooledRows(self.shards, self.counts, self.recover)

    def recover(self, lost: dict[int, Exception]) -> None:
        """Wait until the lost shards have read their rows again."""
        for i, error in lost.items():
            self.losses[i] += 1
            logger.warning(
                "clustering actor %d of %d was lost (%s); it restarts and reads its rows again from %s",
                i, len(self.shards), first_line(error), self.sources[i],
            )  # fmt: skip
        before = time.perf_counter()
        for i, count in zip(lost, self._load(lost), strict=True):
            if count != self.counts[i]:
                raise UserError(f"{self.sources[i]} had {self.counts[i]} rows and now has {count}; it must not change")
            logger.warning(
                "clustering actor %d has read its %d rows again (%.1f s)", i, count, time.perf_counter() - before
            )

    def _load(self, indices: Iterable[int]) -> list[int]:
        """Row counts of some shards, once they are loaded."""
        loading = [(i, self.shards[i].load.remote(i, self.sources[i])) for i in indices]
        counts = []
        for i, reference in loading:
            try:
                counts.append(get_answer(reference))
            except (RayActorError, OutOfMemoryError) as error:
                raise RuntimeError(
                    f"clustering actor {i} of {len(self.shards)} was lost more than {MAX_RESTARTS} times, most recently: "
                    f"{first_line(error)}. If memory ran out, lower clustering.memory_gib or use more actors"
                ) from error
        return counts

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(index, source, rows, search, *arguments)`` of each shard, run in its process."""
        return call_all(lambda i: self.shards[i].run.remote(function, i, *arguments), len(self.shards), self.recover)

    def peak_memory(self) -> list[int]:
        """Peak resident memory of each actor in bytes."""
        return call_all(lambda i: self.shards[i].peak_memory.remote(), len(self.shards), self.recover)

    def stop(self) -> None:
        """Kill all actors."""
        for shard in self.shards:
            ray.kill(shard)


def wait_for_actors(ready: Sequence[Any]) -> None:
    """Wait for actors to start; log a warning if it takes long."""
    waiting = list(ready)
    while waiting:
        up, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=WAIT_WARNING_S)
        try:
            ray.get(up)
        except ActorDiedError as error:
            if not error.actor_init_failed:
                raise
            # FAISS does not load, or sees no GPU
            raise UserError(last_line(error).split("UserError: ")[-1]) from error
        if waiting:
            free = ray.available_resources()
            logger.warning(
                "%d of %d clustering actors wait for resources; %g CPUs and %g GPUs are free",
                len(waiting), len(ready), free.get("CPU", 0), free.get("GPU", 0),
            )  # fmt: skip
