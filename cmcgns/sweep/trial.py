"""One trial of a sweep: a whole pretraining run that tells Tune of each validation, and may be ended at any of them."""

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from cmcgns import storage
from cmcgns.cli import resolve
from cmcgns.config import Config, measure
from cmcgns.errors import UserError, last_line
from cmcgns.sweep.admission import RECHECK_S
from cmcgns.sweep.search import LOST_TOO_OFTEN, apply_drawn
from cmcgns.train.run import Share
from cmcgns.train.setup import PreparedCorpus, Pretraining, setup_pretraining

POLL_S = 0.2
STOP_S = 60.0
"""Longest wait for a trial to end after its current step; then it is killed. For the last one of a sweep Tune waits 10 s."""
MAX_LOSSES = 3
"""Times in a row that a trial whose processes are lost before its next validation goes on from its last checkpoint."""


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a sweep share."""

    base: Config
    runs: str
    """URI of the folder that their run folders go to."""
    metric: str
    materials: Any
    """Object reference of their ``PreparedCorpus``."""
    watch: Any
    """The actor with the admission, from which the driver's table is read too."""


def trial_config(task: TrialTask, spec: dict[str, Any]) -> Config:
    """The settings of a trial; that of a run folder that is there already resumes it."""
    drawn = apply_drawn(task.base, spec["drawn"])
    there = storage.exists(storage.join(task.runs, f"{spec['folder']}/config.yaml"))
    own = {"train.seed": spec["seed"], "run.storage": task.runs, f"run.{'resume' if there else 'name'}": spec["folder"]}
    return resolve(drawn.model_dump(mode="json"), own, Config)


def finished_result(runs: str, folder: str, metric: str) -> dict[str, Any] | None:
    """Step and metric of a trial whose run has finished already; None where it has not."""
    uri = storage.join(runs, f"{folder}/result.json")
    result = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else {}
    if result.get("status") != "finished":
        return None
    return {"step": result["steps"], metric: measure(metric, result["metrics"])}


class TrialRunner:
    """The driver of one trial's run. What the run holds of the cluster is freed when it ends, is stopped or gives way.

    After a loss the run frees all of it too, and comes to the admission again: trials that kept their pools while they wait for
    workers could wait for one another without end.
    """

    def __init__(self, task: TrialTask, spec: dict[str, Any], asked_at: float) -> None:
        self.task, self.spec = task, spec
        self.costs = {"process": time.time() - asked_at}
        self.coordinator: Any = None
        self._rows: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stopped, self._evicted = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
        self._thread.start()

    def next(self) -> dict[str, Any]:
        """The next validation before the last one, or the end, once it is there."""
        return self._rows.get()

    def stop(self) -> None:
        """End the run after its current step, as Ctrl-C does. Of a killed one Ray Train's cleaner of placement groups stays."""
        self._stopped.set()
        while self._thread.is_alive():
            self._end_attempt()
            self._thread.join(timeout=1.0)

    def _end_attempt(self) -> None:
        if self.coordinator is not None:
            self.coordinator.request_stop.remote()

    def _run(self) -> None:
        try:
            ended = self._train()
        except UserError as error:
            ended = {"failure": str(error)}
        except ray.exceptions.RayActorError as error:
            if "creation task" not in str(error):
                os._exit(1)  # lost with its node while the run began: whoever holds the trial starts it again
            ended = {"failure": last_line(error)}  # an actor that cannot be made: no other attempt would mend it
        except Exception as error:  # the sweep goes on
            ended = {"failure": last_line(error)}
        self._rows.put(ended | {"ended": True, "costs": self.costs})

    def _train(self) -> dict[str, Any]:
        before = finished_result(self.task.runs, self.spec["folder"], self.task.metric)
        if before is not None:  # its driver, or Tune's process of it, was lost at the very end
            return before
        losses = 0
        while not self._stopped.is_set():
            began, run = time.time(), self._open()
            from cmcgns.train.run import train

            self.costs["opening"] = time.time() - began
            result = self._attempt(run, train)
            if result["status"] == "finished":
                return {"step": result["steps"], self.task.metric: measure(self.task.metric, result["metrics"])}
            if not self._evicted.is_set() and result["status"] == "failed":
                losses += 1
                if result["hopeless"] or 0 <= run.config.train.max_failures < losses:
                    return {"failure": result["failure"] or "failed", "step": result["steps"] or 0}
                self._say(f"goes on from its last checkpoint once there is capacity, after: {result['failure']}")
        return {"failure": "stopped"}

    def _open(self) -> Pretraining:
        own = any(key.startswith(("data.", "model.")) for key in self.spec["drawn"])
        materials: PreparedCorpus | None = None if own else ray.get(self.task.materials)
        run = setup_pretraining(trial_config(self.task, self.spec), materials)
        self.total = run.schedule.total
        return run

    def _attempt(self, run: Pretraining, train: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        share = self._wait_for_admission()
        if share is None:
            return {"status": "stopped"}
        self.held = False
        self.entered_at, over = time.time(), threading.Event()
        guard = threading.Thread(target=self._watch_capacity, args=(over,), name="trial-guard", daemon=True)
        guard.start()
        try:
            result = train(run, share, self._follow)
        finally:
            over.set()
            guard.join()
            self.coordinator = None
            self.task.watch.leave.remote(self.spec["number"])
        if "trained" in result["marks"]:
            self.costs["training"] = result["marks"]["trained"] - result["marks"]["training"]
            self.costs["ending"] = time.time() - result["marks"]["trained"]
        return result

    def _wait_for_admission(self) -> Share | None:
        """What this trial may count on, once there is capacity; None where it is stopped before."""
        self._evicted.clear()
        while True:
            share: Share | None = ray.get(self.task.watch.enter.remote(self.spec["number"]))
            if share is not None or self._stopped.wait(RECHECK_S):
                return share

    def _watch_capacity(self, over: threading.Event) -> None:
        """End the attempt, with a checkpoint if it can still make one, where the cluster has become too small for it."""
        sent_at: float | None = None
        while not over.wait(RECHECK_S):
            if sent_at is None:
                if not ray.get(self.task.watch.must_leave.remote(self.spec["number"])):
                    continue
                sent_at = time.monotonic()
                self._evicted.set()
                self._say("gives way, since nodes were lost; goes on from its checkpoint once there is capacity")
            self._end_attempt()
            if time.monotonic() - sent_at > STOP_S:
                ray.get(self.task.watch.excuse.remote(self.spec["number"]))
                os._exit(1)  # it waits for what others hold: whoever holds the trial starts it again

    def _say(self, line: str) -> None:
        self.task.watch.say.remote(self.spec["number"], logging.WARNING, line)

    @contextmanager
    def _follow(self, coordinator: Any) -> Iterator[None]:
        self.coordinator, done, began = coordinator, threading.Event(), time.time()
        self.costs["pool"] = began - self.entered_at

        def poll() -> None:
            over = False
            while not over:
                over = done.wait(POLL_S)
                self._forward(ray.get(coordinator.news.remote()), began)

        thread = threading.Thread(target=poll, name="trial-follow", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _forward(self, news: dict[str, Any], began: float) -> None:
        step = news["row"].get("step", 0)
        if news["group"] is not None and not self.held:
            self.held = True
            self.task.watch.hold.remote(self.spec["number"], news["group"])
        self.task.watch.tell.remote(self.spec["number"], step, self.total, news["lines"])
        if "training" in news["marks"]:
            self.costs["workers"] = news["marks"]["training"] - began
        for row in news["validations"]:
            if row["step"] < self.total:  # the last one comes with the end: Tune might stop the run before it
                value = measure(self.task.metric, row)
                self._rows.put({"step": row["step"], self.task.metric: value, "costs": dict(self.costs)})


class SweepTrial(tune.Trainable):
    """Tune's handle of a trial; each step of it is one validation."""

    def setup(self, config: dict[str, Any], task: TrialTask) -> None:
        self.task, self.spec, self.losses = task, config, 0
        self.began = time.time()
        self._start()

    def _start(self) -> None:
        # spread, and so outside of Tune's placement group: all that the run starts would have to fit into it
        make = ray.remote(TrialRunner).options(num_cpus=0, scheduling_strategy="SPREAD", max_concurrency=2)
        self.runner = make.remote(self.task, self.spec, time.time())

    def step(self) -> dict[str, Any]:
        row = self._next()
        seconds = self.spec["seconds"] + time.time() - self.began
        return row | {"seconds": seconds, "done": row.get("ended", False)}

    def _next(self) -> dict[str, Any]:
        while True:
            try:
                row: dict[str, Any] = ray.get(self.runner.next.remote())
                self.losses = 0
                return row
            except ray.exceptions.RayActorError:
                self.losses += not ray.get(self.task.watch.is_excused.remote(self.spec["number"]))
                ray.kill(self.runner)  # it may be out of reach alone, and two would write into one run folder
                if self.losses > MAX_LOSSES:
                    return {"ended": True, "failure": LOST_TOO_OFTEN}
                self._start()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run's own checkpoints are what a trial goes on from."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, see ``save_checkpoint``."""

    def cleanup(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # lost, or not to be stopped
            ray.get(self.runner.stop.remote(), timeout=STOP_S)
        ray.kill(self.runner)
        self.task.watch.leave.remote(self.spec["number"])
