"""What each rank is doing: one that hangs is found by its silence or by the others' waiting, named, and killed, so that Ray
Train replaces it. A thread of each worker tells the coordinator what was marked last, and the driver looks.

Ray is imported in functions: the trainer marks without it.
"""

import itertools
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)
STARTING, FILMS, CLUSTERING = "starting", "waiting for films", "waiting for the clustering pool"
WRITING, EXPORT = "waiting for the checkpoint before", "writing the export"
COPYING = "copying the state"
PATIENT = (STARTING, FILMS, CLUSTERING, WRITING, EXPORT)
"""What may take long on a slow storage or a busy machine: only silence counts."""
BEATS = 20
"""Heartbeats within ``train.hang_timeout_s``."""
LONGEST_BEAT_S, SILENT_BEATS = 30.0, 3
ANSWER_S = 10.0
LOOK_S = 2.0


@dataclass(frozen=True)
class Activity:
    """What a rank does. All ranks do the same in the same order, so one with a smaller ``count`` is behind."""

    count: int
    step: int
    phase: str


_counts = itertools.count(1)
_current = Activity(0, 0, STARTING)


def mark(phase: str, step: int | None = None) -> None:
    """Record that this rank begins ``phase``; ``step`` if it is another one than before."""
    global _current
    _current = Activity(next(_counts), _current.step if step is None else step, phase)


@dataclass(frozen=True)
class Beat:
    """The last word of a rank, and times of the coordinator's clock."""

    activity: Activity
    node: str
    pid: int
    heard: float = 0.0
    since: float = 0.0
    """When ``activity`` was first heard of."""


def beat_s(timeout_s: float) -> float:
    """Seconds between heartbeats."""
    return min(timeout_s / BEATS, LONGEST_BEAT_S)


class Heartbeat:
    """A thread that tells the coordinator what this rank does, while it is entered."""

    def __init__(self, coordinator: Any, rank: int, timeout_s: float) -> None:
        self.coordinator, self.rank, self.every_s = coordinator, rank, beat_s(timeout_s)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        import ray

        self.coordinator.enlist.remote(self.rank, ray.get_runtime_context().current_actor)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(self.every_s)
        self.coordinator.leave.remote(self.rank)  # others may write the export for long

    def _beat(self) -> None:
        import ray

        node, pid = ray.util.get_node_ip_address(), os.getpid()
        while not self._done.is_set():
            self.coordinator.beat.remote(self.rank, Beat(_current, node, pid))
            self._done.wait(self.every_s)


class Beats:
    """The coordinator's side: the last beat of each rank of the workers that run now."""

    def __init__(self) -> None:
        self.last: dict[int, Beat] = {}
        self.actors: dict[int, Any] = {}

    def add(self, rank: int, beat: Beat) -> None:
        """Record a beat."""
        now, before = time.time(), self.last.get(rank)
        same = before is not None and before.activity == beat.activity
        since = before.since if same and before is not None else now
        self.last[rank] = Beat(beat.activity, beat.node, beat.pid, now, since)


class HangWatch:
    """The driver's side: finds ranks that hang and kills them."""

    def __init__(self, coordinator: Any, ranks: int, timeout_s: float) -> None:
        self.coordinator, self.ranks, self.timeout_s = coordinator, ranks, timeout_s
        self._looked = time.monotonic()

    def look(self) -> None:
        """Kill the ranks that hang. Call it often: it looks every few seconds."""
        import ray

        if time.monotonic() - self._looked < LOOK_S:
            return
        try:
            beats, actors, now = ray.get(self.coordinator.beats.remote(), timeout=ANSWER_S)
            found = hanging(beats, self.ranks, now, self.timeout_s)
            if found:
                message = (
                    f"{describe(beats, found, now)}. See that node's `ray stack` and `dmesg`, and train.hang_timeout_s"
                )
                logger.warning("%s. It is killed", message)
                ray.get(self.coordinator.hangs.remote(message), timeout=ANSWER_S)
                for rank in found:
                    ray.kill(actors[rank])
        except ray.exceptions.RayError:  # it does not answer, or is gone, which others will notice
            pass
        self._looked = time.monotonic()


def hanging(beats: Mapping[int, Beat], ranks: int, now: float, timeout_s: float) -> list[int]:
    """Ranks that keep all ``ranks`` from going on for ``timeout_s``; [] if none does, or if no rank is alive to wait for it."""
    silent_s = min(SILENT_BEATS * beat_s(timeout_s), timeout_s)
    alive = [rank for rank, beat in beats.items() if now - beat.heard < silent_s]
    if len(beats) < ranks or not alive or any(now - beat.since < timeout_s for beat in beats.values()):
        return []
    silent = [rank for rank in beats if rank not in alive]
    if silent:
        return silent if all(now - beats[rank].heard >= timeout_s for rank in silent) else []
    last = min(beat.activity.count for beat in beats.values())
    behind = sorted(rank for rank, beat in beats.items() if beat.activity.count == last)
    return [] if beats[behind[0]].activity.phase in PATIENT else behind


def describe(beats: Mapping[int, Beat], found: list[int], now: float) -> str:
    """Where the ranks in ``found`` are, since when, and what the others do."""
    lines = []
    for rank in found:
        beat, doing = beats[rank], beats[rank].activity
        lines.append(
            f"rank {rank} on node {beat.node} (pid {beat.pid}) hangs: it has been in step {doing.step} ({doing.phase}) for "
            f"{now - beat.since:.0f} s, and was heard of {now - beat.heard:.0f} s ago"
        )
    others = {f"step {each.activity.step} ({each.activity.phase})" for rank, each in beats.items() if rank not in found}
    waiting = f" while the others are in {', '.join(sorted(others))}" if others else ""
    return "; ".join(lines) + waiting
