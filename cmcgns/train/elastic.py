"""How many workers run: ``train.num_workers``, or as many as there is room for if ``train.min_workers`` allows fewer.

To change their number the run stops at a checkpoint and goes on from it like a resumed one, with the same global batches and
every study of an epoch once.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cmcgns.cluster.placement import NODE_START_S, bundles, can_scale_up, describe_request, list_nodes, run_bundles
from cmcgns.cluster.session import ONE_CPU
from cmcgns.clustering.bank import PoolHandles
from cmcgns.errors import UserError, last_line
from cmcgns.train.launch import assign, fit
from cmcgns.train.resume import (
    delete_half_written,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    step_in_name,
    write_snapshot,
)
from cmcgns.train.run import CpuShare, reserved_cpus, whole_cluster
from cmcgns.train.setup import Pretraining

logger = logging.getLogger(__name__)
SETTLE_S = 30.0
"""How long the room must not change before a run starts with fewer workers, or stops to get more: machines come one by one."""
LOOK_S = 1.0
DEAD_S = 90.0
"""After this long Ray knows of any node that is dead."""
DATA_CPU_S = 10.0
"""Longer than a data task takes."""
PAUSE_S = 300.0
"""Until a run looks again, after there was room that it could not use."""


def run_workers(
    setup: Pretraining, pool: PoolHandles | None, coordinator: Any, cpus: CpuShare | None
) -> tuple[str | None, Exception | None]:
    """Run the workers of ``setup`` to the end. Returns the URI of the last checkpoint, and the error if the run failed.

    ``cpus``: the run's share of a cluster, where lost workers are left to the caller; None if it has the cluster to itself.
    """
    config, folder, number = setup.config, setup.folder, setup.config.train.num_workers
    if cpus is None and config.train.min_workers is not None:
        try:
            return _run_elastic(setup, pool, coordinator)
        except (UserError, ray.exceptions.RayActorError) as error:
            # no room, or the coordinator is gone: what the run has done is reported all the same
            return latest_checkpoint(folder), error
    share = whole_cluster(config, list_nodes(), number) if cpus is None else cpus
    return fit(config, folder, assign(setup, pool, coordinator, share, number), number, replace_lost=cpus is None)


def _run_elastic(setup: Pretraining, pool: PoolHandles | None, coordinator: Any) -> tuple[str | None, Exception | None]:
    config, folder, most = setup.config, setup.folder, setup.config.train.num_workers
    saved, failures = latest_checkpoint(folder), 0
    while True:
        workers = count_workers(setup, lambda: bool(ray.get(coordinator.stop_requested.remote())))
        if workers == 0:  # the user stopped the run
            step = step_in_name(setup.checkpoint) if setup.checkpoint else 0
            ray.get(coordinator.finish.remote({"finished": False, "steps": step}))
            return latest_checkpoint(folder), None
        if workers < most:
            logger.warning("training with %d workers of %d: there is no room for more", workers, most)
        assignment = assign(setup, pool, coordinator, whole_cluster(config, list_nodes(), workers), workers)
        growth, before = Growth(setup, workers, coordinator), list_nodes()
        try:
            checkpoint, error = fit(config, folder, assignment, workers, replace_lost=False, look=growth.look)
        finally:
            growth.room.close()
        if not ray.get(coordinator.start_again.remote(error is not None)):
            finished = (ray.get(coordinator.account.remote())["outcome"] or {}).get("finished")
            return checkpoint, None if finished else error
        if error is not None:
            last, saved = saved, latest_checkpoint(folder)
            failures = failures + 1 if saved == last else 1
            if 0 <= config.train.max_failures < failures:
                return checkpoint, error
            wait_for_dead_nodes()
            alive = {node.id for node in list_nodes()}
            gone = [node.name for node in before if node.id not in alive]
            reason = f"it has lost node {', '.join(sorted(gone))}" if gone else last_line(error)
            logger.warning("the run goes on from its last checkpoint: %s", reason)
        delete_half_written(folder, setup.there_before)
        setup = replace(setup, checkpoint=_whole_checkpoint(setup))
        write_snapshot(folder, setup.checkpoint)


def _whole_checkpoint(setup: Pretraining) -> str | None:
    """The last whole checkpoint; None if workers were lost before the first was written."""
    if not list_checkpoints(setup.folder):
        return None
    return find_checkpoint(setup.folder, setup.config.train.checkpoint_every)


def wait_for_dead_nodes() -> None:
    """Wait until each node has answered or Ray knows that it is dead, which takes it up to a minute: its CPUs still count."""
    answer = ray.remote(num_cpus=0, max_retries=0)(lambda: None)
    on = lambda node: answer.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
    asked = [on(node).remote() for node in list_nodes()]
    ray.wait(asked, num_returns=len(asked), timeout=DEAD_S)


class Room:
    """Asks Ray for the resources of single workers and holds what it gets; an autoscaler adds machines for the rest."""

    def __init__(self, workers: int, setup: Pretraining) -> None:
        train = setup.config.train
        one = {name: amount for name, amount in bundles(1, train.cpus_per_worker, train.use_gpu)[0].items() if amount}
        self.groups: list[PlacementGroup] = [placement_group([one]) for _ in range(workers)]
        self.free = 0
        self._changed = time.monotonic()

    def look(self) -> int:
        """How many workers there is room for now."""
        free = sum(placement_group_table(group)["state"] == "CREATED" for group in self.groups)
        if free != self.free:
            self.free, self._changed = free, time.monotonic()
        return free

    @property
    def is_settled(self) -> bool:
        """Whether it has not changed for ``SETTLE_S``."""
        return time.monotonic() - self._changed >= SETTLE_S

    def close(self) -> None:
        """Give everything back."""
        for group in self.groups:
            remove_placement_group(group)
        self.groups = []


def has_data_cpu() -> bool:
    """Whether Ray gives one more CPU besides what is held: other jobs may have some of the cluster's. Data tasks of this run give
    one away for a moment."""
    group = placement_group([ONE_CPU])
    try:
        return bool(group.wait(DATA_CPU_S))
    finally:
        remove_placement_group(group)


class Growth:
    """Looks while ``workers`` run whether there is room for more, and asks them once to stop for it."""

    def __init__(self, setup: Pretraining, workers: int, coordinator: Any) -> None:
        self.setup, self.workers, self.coordinator = setup, workers, coordinator
        self.room = Room(0, setup)
        self._began, self._looked = time.time(), time.monotonic()
        self._started = self._asked = False

    def look(self) -> None:
        """Call it often: it looks every ``LOOK_S`` seconds."""
        if self._asked or time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        with contextlib.suppress(ray.exceptions.RayError):  # the coordinator is gone, which others will notice
            # not before: what is held here could be what the workers are waiting for
            self._started = self._started or ray.get(self.coordinator.reached.remote("training")) > self._began
            if self._started:
                self._look()

    def _look(self) -> None:
        wanted = self._possible() - self.workers
        if wanted != len(self.room.groups):
            self.room.close()
            self.room = Room(wanted, self.setup)
        more = most_allowed(self.setup, self.workers + self.room.look(), total_cpus())
        if not self.room.free or not self.room.is_settled:
            return
        grows = more > self.workers and has_data_cpu()  # while the room is held
        self.room.close()
        if grows:
            logger.warning("there is room for %d workers: the run saves a checkpoint and goes on with them", more)
            self._asked = True
            ray.get(self.coordinator.request_resize.remote())
        else:  # too little for another number of workers and for data, which can use it
            self._looked = time.monotonic() + PAUSE_S

    def _possible(self) -> int:
        """Workers to ask for: an autoscaler is asked for all; without one, what is held in vain would be missing for data."""
        most = self.setup.config.train.num_workers
        if can_scale_up(list_nodes()):
            return most
        return max(most_allowed(self.setup, most, total_cpus()), self.workers)


def count_workers(setup: Pretraining, stopped: Callable[[], bool]) -> int:
    """How many workers can start now, at least ``train.min_workers``; 0 if ``stopped`` says so before there is room for them.

    Raises:
        UserError: there is no room for ``train.min_workers``, and none has come for half an hour.
    """
    train, needed = setup.config.train, run_bundles(setup.config)
    room, began, told = Room(train.num_workers, setup), time.monotonic(), False
    try:
        while not stopped():
            held = room.look() * train.cpus_per_worker
            # another job may use some
            free = reserved_cpus(setup.config, 0) + ray.available_resources().get("CPU", 0.0) + held
            number = most_allowed(setup, room.free, min(free, total_cpus()))
            if number == train.num_workers or (number and room.is_settled):
                return number
            waited = time.monotonic() - began
            if waited > SETTLE_S and not told:
                told = True
                logger.warning("waiting for room for %s workers; `ray status` shows who uses it", train.least_workers)
            if waited > NODE_START_S:
                break
            time.sleep(LOOK_S)
        else:
            return 0
    finally:
        room.close()
    raise UserError(
        f"there is no room for train.min_workers {train.least_workers}: {describe_request(needed)}. "
        "`ray status` shows who uses it; lower train.min_workers, or add machines and resume the run"
    )


def most_allowed(setup: Pretraining, workers: int, cpus: float) -> int:
    """The largest number up to ``workers`` that the run may have and that leaves one of ``cpus`` for data; 0 for none."""
    config = setup.config
    numbers = (number for number in config.train.numbers_of_workers if number <= workers)
    return max((number for number in numbers if reserved_cpus(config, number) <= cpus - 1), default=0)


def total_cpus() -> float:
    """CPUs of the cluster."""
    return float(ray.cluster_resources().get("CPU", 0.0))
