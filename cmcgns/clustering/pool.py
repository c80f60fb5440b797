"""A pool of Ray actors that holds rows: each runs FAISS over its own, and the answers are merged two levels deep.

K centroids, D dimensions.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from cmcgns.clustering.kmeans import Array, AssignmentPass, Row, assign_by, faiss_search, merge_passes
from cmcgns.clustering.rows import Drawn, RowArray, merge_lowest, merge_worst
from cmcgns.config import PoolConfig
from cmcgns.errors import UserError, first_line

logger = logging.getLogger(__name__)

FAN_IN = 4
"""Answers that the coordinator merges by itself; of more, actors merge about the square root each."""


class ShardLost(RuntimeError):
    """The actor has been started anew since it was given its rows."""


LOST = (RayActorError, ObjectLostError, OutOfMemoryError, ShardLost)
"""What Ray raises for an answer whose actor, or whose machine, has gone, or that was killed to free memory."""


class Shard:
    """One actor's rows and its FAISS passes."""

    def __init__(self, device: str, threads: int) -> None:
        self.search = faiss_search(device, threads)
        self.assign_rows = assign_by(self.search)
        self.rows: RowArray | None = None

    def ready(self) -> None:
        """Answers once the actor is up."""

    def answer(self, method: str, *arguments: Any) -> tuple[bool, Any]:
        """Whether this shard has rows, and what ``RowArray.method`` says of them: two objects, so that the coordinator
        learns how a call went without fetching what it gave."""
        if self.rows is None:
            raise ShardLost("no rows are held")
        return (True, getattr(self.rows, method)(*arguments)) if len(self.rows) else (False, None)

    def merge(self, merge: Callable[..., Any], *parts: Any) -> Any:
        """``merge`` of what some shards answered, for the coordinator."""
        return merge(*parts)


Recover = Callable[[dict[int, Exception]], None]
"""Brings back the shards that were lost, given why."""


class PooledRows:
    """The rows of all shards as one set. Without ``recover`` the loss of a shard is the caller's to handle."""

    def __init__(
        self, shards: Sequence[ActorHandle[Any]], counts: Sequence[int], recover: Recover | None = None
    ) -> None:
        self.shards, self.counts, self._recover = shards, counts, recover

    def count(self) -> int:
        return sum(self.counts)

    def mean(self) -> Array:
        total_D: Array = self._merged(add_up, "total")
        return total_D / max(self.count(), 1)

    def subset(self, number: int, seed: int) -> Array:
        drawn: Drawn = self._merged(partial(merge_lowest, number), "lowest", number, seed)
        return drawn.rows_nD

    def nearest(self, direction_D: Array) -> Row:
        row: Row = self._merged(most_similar, "nearest", direction_D)
        return row

    def farthest(self, seeds_nD: Array) -> Row:
        row: Row = self._merged(least_similar, "farthest", seeds_nD)
        return row

    def distance(self, seeds_nD: Array) -> float:
        return float(self._merged(add_up, "distance", seeds_nD))

    def draw(self, seeds_nD: Array, rate: float, seed: int) -> Array:
        drawn: Drawn = self._merged(partial(merge_lowest, None), "drawn", seeds_nD, rate, seed)
        return drawn.rows_nD

    def shares(self, seeds_nD: Array) -> Array:
        share_n: Array = self._merged(add_up, "shares", seeds_nD)
        return share_n

    def assign(self, centroids_KD: Array, blocks: Array | None = None) -> AssignmentPass:
        found: AssignmentPass = self._merged(merge_passes, "assign", centroids_KD, blocks)
        return found

    def worst_served(self, centroids_KD: Array, number: int, blocks: Array | None = None) -> list[Row]:
        rows: list[Row] = self._merged(partial(merge_worst, number), "worst_served", centroids_KD, number, blocks)
        return rows

    def _merged(self, merge: Callable[..., Any], method: str, *arguments: Any) -> Any:
        """What all shards answer, merged in their order."""
        # one copy in the object store, not one for each actor
        shared = [ray.put(argument) if isinstance(argument, np.ndarray) else argument for argument in arguments]
        while True:
            answers = self._answers(method, shared)
            try:
                if len(answers) <= FAN_IN:
                    return merge(*ray.get([answer for _, answer in answers]))
                return merge(*ray.get(self._merged_by_shards(merge, answers)))
            except LOST as error:  # one that had answered already: its answer went with it
                if self._recover is None:
                    raise
                logger.warning(
                    "clustering: an answer was lost while it was merged (%s); asking again", first_line(error)
                )

    def _answers(self, method: str, arguments: Sequence[Any]) -> list[tuple[int, Any]]:
        """Index of each shard that has rows, and a reference to its answer."""
        answers: dict[int, Any] = {}

        def send(i: int) -> Any:
            there, answers[i] = self.shards[i].answer.options(num_returns=2).remote(method, *arguments)
            return there

        there = settled(send, len(self.shards), self._recover)
        return [(i, answers[i]) for i in range(len(self.shards)) if there[i]]

    def _merged_by_shards(self, merge: Callable[..., Any], answers: list[tuple[int, Any]]) -> list[Any]:
        """References to about sqrt(n) merged answers: what reaches the coordinator does not grow with the pool."""
        size = math.isqrt(len(answers) - 1) + 1
        groups = [answers[start : start + size] for start in range(0, len(answers), size)]
        return [self.shards[group[0][0]].merge.remote(merge, *(answer for _, answer in group)) for group in groups]


def settled(send: Callable[[int], Any], number: int, recover: Recover | None) -> list[Any]:
    """Answers to what ``send`` asks shard after shard, all at once; asked again of those that were lost."""
    answers: dict[int, Any] = {}
    waiting = list(range(number))
    while waiting:
        sent, lost = {i: send(i) for i in waiting}, {}
        for i, reference in sent.items():
            try:
                answers[i] = answered(reference)
            except LOST as error:
                if recover is None:
                    raise
                lost[i] = error
        if lost and recover is not None:
            recover(lost)
        waiting = list(lost)
    return [answers[i] for i in range(number)]


def answered(reference: Any) -> Any:
    """What an actor answered; a ``UserError`` in it is raised as it was, without Ray's report of the place."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def actor_options(config: PoolConfig) -> dict[str, Any]:
    """What Ray reserves for one actor."""
    return {"num_cpus": config.cpus_per_actor, "num_gpus": config.gpus_per_actor}


def threads_per_actor(config: PoolConfig) -> int:
    """FAISS threads of one actor: its whole CPUs."""
    return max(int(config.cpus_per_actor), 1)


def add_up(*parts: Any) -> Any:
    """Sum of numbers or arrays."""
    return np.sum(parts, axis=0)


def most_similar(*rows: Row) -> Row:
    """The most similar row, of equals the lowest ordinal."""
    return min(rows, key=lambda row: (-row.similarity, row.ordinal))


def least_similar(*rows: Row) -> Row:
    """The least similar row, of equals the lowest ordinal."""
    return min(rows, key=lambda row: (row.similarity, row.ordinal))
