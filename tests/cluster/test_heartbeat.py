"""Which rank is told to hang, from what each has said last."""

from typing import Any

import pytest

from cmcgns.cluster import heartbeat
from cmcgns.cluster.heartbeat import FILMS, Activity, Beat, Beats, describe, hanging

NOW, TIMEOUT = 1000.0, 60.0
STEP = "forward and backward"


def beat(count: int, phase: str = STEP, heard: float = 1.0, since: float = 100.0) -> Beat:
    """What a rank has said ``heard`` seconds ago; it began to do so ``since`` seconds ago."""
    return Beat(Activity(count, count // 10, phase), "10.0.0.7", 4711, NOW - heard, NOW - since)


@pytest.mark.parametrize(
    ("beats", "found"),
    [
        ([beat(70), beat(70, heard=61)], [1]),  # frozen
        ([beat(70, FILMS), beat(70, heard=61)], [1]),  # whatever the others do
        ([beat(70), beat(70, heard=61), beat(70, heard=70)], [1, 2]),
        ([beat(70), beat(70, heard=40)], []),  # perhaps only slow
        ([beat(71), beat(70), beat(71)], [1]),  # alive, and keeps the others waiting
        ([beat(71), beat(70, FILMS)], []),  # a slow storage
        ([beat(70), beat(70)], [0, 1]),  # the network between them
        ([beat(70, FILMS), beat(70, FILMS)], []),
        ([beat(71), beat(70, since=59)], []),
        ([beat(70, heard=90), beat(70, heard=90)], []),  # they have ended; Ray Train replaces them
        ([beat(70)], []),  # the other one has not started
        ([], []),
    ],
)
def test_a_rank_hangs_if_it_keeps_the_others_waiting_or_does_not_answer(beats: list[Beat], found: list[int]) -> None:
    ranks = max(len(beats), 2)
    assert hanging(dict(enumerate(beats)), ranks, NOW, TIMEOUT) == found


def test_the_message_names_rank_node_step_and_what_it_does() -> None:
    beats = {0: beat(71, "waiting for the other ranks"), 1: beat(70, heard=63.2, since=65.4)}
    assert describe(beats, [1], NOW) == (
        "rank 1 on node 10.0.0.7 (pid 4711) hangs: it has been in step 7 (forward and backward) for 65 s, and was heard of 63 s "
        "ago while the others are in step 7 (waiting for the other ranks)"
    )


def test_time_counts_from_the_first_word_of_what_a_rank_does(monkeypatch: pytest.MonkeyPatch) -> None:
    beats, clock = Beats(), iter([10.0, 20.0, 30.0])
    monkeypatch.setattr(heartbeat.time, "time", lambda: next(clock))
    said: list[tuple[Any, ...]] = []
    for count in (1, 1, 2):
        beats.add(0, Beat(Activity(count, 1, STEP), "node", 1))
        said.append((beats.last[0].heard, beats.last[0].since))
    assert said == [(10.0, 10.0), (20.0, 10.0), (30.0, 30.0)]
