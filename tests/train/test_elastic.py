"""How many workers a run starts with, and when it stops for more of them."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cmcgns.cluster.coordinator import RunCoordinator
from cmcgns.config import Config
from cmcgns.errors import UserError
from cmcgns.run_folder import RunFolder
from cmcgns.train import elastic
from cmcgns.train.checkpoint import Contents, Progress, save_checkpoint
from cmcgns.train.elastic import Growth, Room, count_workers, most_allowed, run_workers
from cmcgns.train.run import DataCpus
from tests.ray_head import RayHead, connected, joined_node, running_head
from tests.small import small_config


def setup_of(**train: Any) -> Any:
    """What these functions take of a run: its settings."""
    numbers = {"num_workers": 3, "min_workers": 1, "microbatch_size": 4, "global_batch_size": 24, "cpus_per_worker": 1}
    return SimpleNamespace(config=small_config(**numbers | train))


@pytest.mark.parametrize(
    ("cpus", "room", "number"), [(20, 8, 8), (20, 7, 4), (20, 3, 2), (20, 1, 0), (6, 8, 4), (5.1, 8, 2), (3, 8, 0)]
)
def test_the_number_of_workers_divides_the_global_batch_and_leaves_a_cpu_for_data(
    cpus: float, room: int, number: int
) -> None:
    setup = setup_of(num_workers=8, min_workers=2, global_batch_size=32)
    assert setup.config.train.numbers_of_workers == [2, 4, 8]
    assert most_allowed(setup, room, cpus) == number  # the clustering has 0.2 CPUs


def test_a_run_whose_films_no_cpu_can_read_says_so_once_and_not_for_a_moment_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster, now = {"CPU": 4.0}, [0.0]
    monkeypatch.setattr(ray, "cluster_resources", lambda: cluster)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = DataCpus(setup_of().config, workers=2)  # and 0.2 for clustering; a task that reads needs half a CPU

    def look_until(seconds: int) -> None:
        while now[0] < seconds:
            now[0] += 0.5
            watch.look()

    with caplog.at_level(logging.WARNING, logger="cmcgns"):
        look_until(100)
        cluster["CPU"] = 2.5
        look_until(120)
        cluster["CPU"] = 2.75
        look_until(200)
        assert not caplog.records
        cluster["CPU"] = 2.5
        look_until(400)
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        "no CPU is left for reading films: the cluster has 2.5 CPUs, workers and clustering hold 2.2 of them, and a task that "
        "reads needs 0.5"
    )


@pytest.fixture(scope="module", name="head")
def fixture_head() -> Iterator[RayHead]:
    with running_head(cpus=3) as head, connected(head):
        yield head


@pytest.mark.ray
def test_a_run_begins_with_as_many_workers_as_there_is_room_for_and_stops_for_more(
    head: RayHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "SETTLE_S", 3.0)
    setup = setup_of()
    coordinator = ray.remote(RunCoordinator).options(num_cpus=0).remote(100, 0.1, {})
    asked = lambda: ray.get(coordinator.stop_requested.remote())
    workers = count_workers(setup, lambda: False)
    assert workers == 1, "of three CPUs one is left for reading films, and the pool has 0.2"
    running = Room(workers, setup)
    monkeypatch.setattr(elastic, "LOOK_S", 0.1)
    growth = Growth(setup, workers, coordinator)
    with joined_node(head, cpus=1):
        look_for(growth, 2.0)
        assert growth.room.groups == [], "it takes nothing before the workers train"
        ray.get(coordinator.mark.remote("training"))
        look_for(growth, 1.0)
        assert len(growth.room.groups) == 1, "of four CPUs one is left for reading films"
        assert not asked(), "room has to be there for a while"
        look_for(growth, 60.0, asked)
        assert asked()
        assert growth.room.groups == [], "what it held is free for the workers that start now"
    running.close()
    growth = Growth(setup, workers, coordinator)
    ray.get(coordinator.mark.remote("training"))
    look_for(growth, 2.5)
    assert growth.room.groups == [], "with three CPUs there is nothing to wait for"


@pytest.mark.ray
def test_a_run_does_not_stop_for_more_workers_if_another_job_has_the_cpu_that_data_would_need(
    head: RayHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"SETTLE_S": 1.0, "LOOK_S": 0.1, "DATA_CPU_S": 1.0, "PAUSE_S": 0.0}.items():
        monkeypatch.setattr(elastic, name, seconds)
    setup = setup_of()
    coordinator = ray.remote(RunCoordinator).options(num_cpus=0).remote(100, 0.1, {})
    running, other_job = Room(1, setup), Room(1, setup)
    try:
        growth = Growth(setup, 1, coordinator)
        ray.get(coordinator.mark.remote("training"))
        with joined_node(head, cpus=1):
            third = Room(1, setup)
            asked = lambda: ray.get(coordinator.stop_requested.remote())
            look_for(growth, 8.0, asked)
            assert not asked(), "of four CPUs the run has one and others two: one more would leave none for data"
            third.close()
            look_for(growth, 60.0, asked)
            assert asked()
    finally:
        for room in (running, other_job):
            room.close()


def look_for(growth: Growth, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        growth.look()
        time.sleep(0.05)


@pytest.mark.ray
def test_without_room_for_the_fewest_workers_it_says_so_and_stops_when_asked_to(
    head: RayHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "NODE_START_S", 2.0)
    with pytest.raises(
        UserError, match=r"no room for train.min_workers 2: the job needs 2\.\d+ CPUs; the cluster has 3 CPUs"
    ):
        count_workers(setup_of(min_workers=2), lambda: False)
    assert count_workers(setup_of(min_workers=2), lambda: True) == 0


@dataclass(frozen=True)
class Setup:
    """The part of a run's setup that changes from one attempt to the next, or decides it."""

    config: Config
    folder: RunFolder
    checkpoint: str | None = None
    there_before: tuple[str, ...] = ()


class Attempts:
    """In place of the workers: how each attempt ends, and with how many of them it ran."""

    def __init__(self, coordinator: Any, folder: Path, *ends: str) -> None:
        self.coordinator, self.folder, self.ends, self.ran = coordinator, folder, list(ends), []

    def __call__(self, config: Any, folder: Any, assignment: Any, workers: int, **named: Any) -> tuple[None, Any]:
        self.ran.append((workers, assignment.verified))
        end = self.ends.pop(0)
        if "checkpoint" in end:
            place = self.folder / f"checkpoint_{len(self.ran):08d}_of_1_abcdef"
            place.mkdir()
            save_checkpoint(place, Progress(step=len(self.ran), ranks=1), Contents({}, {}, {}), {})
        if "resize" in end:
            ray.get(self.coordinator.request_resize.remote())
        if "stop" in end:
            ray.get(self.coordinator.request_stop.remote())
        if "finish" in end or "resize" in end or "stop" in end:
            ray.get(self.coordinator.finish.remote({"finished": "finish" in end, "steps": 1}))
        return None, RuntimeError("a worker died") if "lost" in end else None


@pytest.mark.ray
@pytest.mark.parametrize(
    ("ends", "ran", "failed"),
    [
        (["lost", "lost", "lost"], 3, True),  # train.max_failures is 2
        (["lost", "checkpoint, lost", "lost", "checkpoint, lost", "lost", "finish"], 6, False),
        (["resize", "resize", "resize", "resize", "finish"], 5, False),
        (["lost", "stop"], 2, False),
        (["finish, lost"], 1, False),  # after the export was written
    ],
)
def test_failures_count_in_a_row_without_a_new_checkpoint(
    ends: list[str], ran: int, failed: bool, head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = ray.remote(RunCoordinator).options(num_cpus=0).remote(100, 0.1, {})
    attempts = Attempts(coordinator, tmp_path, *ends)
    monkeypatch.setattr(elastic, "fit", attempts)
    monkeypatch.setattr(elastic, "count_workers", lambda setup, stopped: 2)
    monkeypatch.setattr(elastic, "assign", lambda setup, *rest: SimpleNamespace(verified=setup.checkpoint))
    folder = RunFolder(str(tmp_path.parent), tmp_path.name, resumed=False)
    _, error = run_workers(Setup(setup_of(max_failures=2).config, folder), None, coordinator, None)  # type: ignore[arg-type]
    assert len(attempts.ran) == ran
    assert (error is not None) == failed
    names = [verified for _, verified in attempts.ran if verified]
    assert names == sorted(names), "each goes on from the last checkpoint"
    assert len(set(names)) == sum("checkpoint" in end for end in ends)


@pytest.mark.parametrize(
    ("lost", "resized", "stopped", "failed", "finished", "goes_on"),
    [
        (True, False, False, False, None, True),
        (False, True, False, False, False, True),
        (True, True, False, False, None, True),
        (False, False, False, False, False, False),  # the user's stop had been passed on before
        (False, True, True, False, False, False),
        (True, False, True, False, None, False),
        (True, False, False, True, None, False),
        (False, True, False, False, True, False),  # its last step came before the stop
    ],
)
def test_others_go_on_after_a_loss_or_a_resize_unless_the_run_has_ended(
    lost: bool, resized: bool, stopped: bool, failed: bool, finished: bool | None, goes_on: bool
) -> None:
    coordinator = RunCoordinator(100, 0.1, {})
    if resized:
        coordinator.request_resize()
    if stopped:
        coordinator.request_stop()
    if failed:
        coordinator.fail("a reason")
    if finished is not None:
        coordinator.finish({"finished": finished})
    assert coordinator.stop_requested() == (resized or stopped)
    assert coordinator.start_again(lost) == goes_on
    if goes_on:
        assert not coordinator.stop_requested()
        assert coordinator.account()["outcome"] is None
