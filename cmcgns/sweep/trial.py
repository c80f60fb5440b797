"""One trial of a sweep: a pretraining run that reports each validation to Tune and can be stopped after any of them."""

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
from cmcgns.config import Config
from cmcgns.errors import UserError, last_line
from cmcgns.measures import measure
from cmcgns.sweep.admission import RECHECK_S
from cmcgns.sweep.search import LOST_TOO_OFTEN, apply_drawn
from cmcgns.train.run import CpuShare
from cmcgns.train.setup import PreparedCorpus, Pretraining, setup_pretraining

POLL_S = 0.2
STOP_S = 60.0
"""Longest wait for a trial to stop after its current step before it is killed. Tune waits 10 s for the last one of a sweep."""
MAX_LOSSES = 3
"""How often in a row a trial whose processes are lost before its next validation resumes from its last checkpoint."""


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a sweep share."""

    base: Config
    runs: str
    """URI of the folder with their run folders."""
    metric: str
    prepared: Any
    """Object reference of their ``PreparedCorpus``."""
    monitor: Any
    """The ``SweepMonitor``."""


def trial_config(task: TrialTask, spec: dict[str, Any]) -> Config:
    """Settings of a trial. It resumes if its run folder already exists."""
    drawn = apply_drawn(task.base, spec["drawn"])
    exists = storage.exists(storage.join(task.runs, f"{spec['folder']}/config.yaml"))
    own = {
        "train.seed": spec["seed"],
        "run.storage": task.runs,
        f"run.{'resume' if exists else 'name'}": spec["folder"],
    }
    return resolve(drawn.model_dump(mode="json"), own, Config)


def finished_result(runs: str, folder: str, metric: str) -> dict[str, Any] | None:
    """Step and metric of a trial whose run has finished; None otherwise."""
    uri = storage.join(runs, f"{folder}/result.json")
    result = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else {}
    if result.get("status") != "finished":
        return None
    return {"step": result["steps"], metric: measure(metric, result["metrics"])}


class TrialRunner:
    """Driver of one trial's run. The run frees its resources when it ends, is stopped or is evicted.

    It also frees them after a loss and waits for admission again: trials that kept their pools while they wait for workers
    could deadlock.
    """

    def __init__(self, task: TrialTask, spec: dict[str, Any], requested_at: float) -> None:
        self.task, self.spec = task, spec
        self.costs = {"process": time.time() - requested_at}
        self.coordinator: Any = None
        self._rows: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stopped, self._evicted = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
        self._thread.start()

    def next(self) -> dict[str, Any]:
        """Wait for the next validation, except the last one, or for the end."""
        return self._rows.get()

    def stop(self) -> None:
        """Stop the run after its current step, as Ctrl-C does. Killing it would leave Ray Train's placement group cleaner."""
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
                os._exit(1)  # its node was lost while the run started: SweepTrial restarts it
            ended = {"failure": last_line(error)}  # the actor cannot be created; a retry would not help
        except Exception as error:  # the sweep continues
            ended = {"failure": last_line(error)}
        self._rows.put(ended | {"ended": True, "costs": self.costs})

    def _train(self) -> dict[str, Any]:
        result = finished_result(self.task.runs, self.spec["folder"], self.task.metric)
        if result is not None:  # the run finished, but its driver or Tune's process was lost before it was recorded
            return result
        losses = 0
        while not self._stopped.is_set():
            began, run = time.time(), self._setup_run()
            from cmcgns.train.run import train

            self.costs["opening"] = time.time() - began
            result = self._attempt(run, train)
            if result["status"] == "finished":
                return {"step": result["steps"], self.task.metric: measure(self.task.metric, result["metrics"])}
            if not self._evicted.is_set() and result["status"] == "failed":
                losses += 1
                if result["permanent_failure"] or 0 <= run.config.train.max_failures < losses:
                    return {"failure": result["failure"] or "failed", "step": result["steps"] or 0}
                self._warn(f"resumes from its last checkpoint once there is capacity, after: {result['failure']}")
        return {"failure": "stopped"}

    def _setup_run(self) -> Pretraining:
        own = any(key.startswith(("data.", "model.")) for key in self.spec["drawn"])
        prepared: PreparedCorpus | None = None if own else ray.get(self.task.prepared)
        run = setup_pretraining(trial_config(self.task, self.spec), prepared)
        self.total = run.schedule.total
        return run

    def _attempt(self, run: Pretraining, train: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        share = self._wait_for_admission()
        if share is None:
            return {"status": "stopped"}
        self.reported_group = False
        self.entered_at, over = time.time(), threading.Event()
        guard = threading.Thread(target=self._watch_capacity, args=(over,), name="trial-guard", daemon=True)
        guard.start()
        try:
            result = train(run, share, self._follow)
        finally:
            over.set()
            guard.join()
            self.coordinator = None
            self.task.monitor.leave.remote(self.spec["number"])
        if "trained" in result["marks"]:
            self.costs["training"] = result["marks"]["trained"] - result["marks"]["training"]
            self.costs["ending"] = time.time() - result["marks"]["trained"]
        return result

    def _wait_for_admission(self) -> CpuShare | None:
        """CPUs of this trial, once it is admitted; None if it is stopped before."""
        self._evicted.clear()
        while True:
            share: CpuShare | None = ray.get(self.task.monitor.enter.remote(self.spec["number"]))
            if share is not None or self._stopped.wait(RECHECK_S):
                return share

    def _watch_capacity(self, over: threading.Event) -> None:
        """Stop the attempt if the cluster becomes too small for it, with a checkpoint if that is still possible."""
        evicted_at: float | None = None
        while not over.wait(RECHECK_S):
            if evicted_at is None:
                if not ray.get(self.task.monitor.must_leave.remote(self.spec["number"])):
                    continue
                evicted_at = time.monotonic()
                self._evicted.set()
                self._warn("stops because nodes were lost; resumes from its checkpoint once there is capacity")
            self._end_attempt()
            if time.monotonic() - evicted_at > STOP_S:
                ray.get(self.task.monitor.excuse.remote(self.spec["number"]))
                os._exit(1)  # it waits for resources of other trials: SweepTrial restarts it

    def _warn(self, line: str) -> None:
        self.task.monitor.log.remote(self.spec["number"], logging.WARNING, line)

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
        if news["group"] is not None and not self.reported_group:
            self.reported_group = True
            self.task.monitor.add_group.remote(self.spec["number"], news["group"])
        self.task.monitor.report_step.remote(self.spec["number"], step, self.total, news["lines"])
        if "training" in news["marks"]:
            self.costs["workers"] = news["marks"]["training"] - began
        for row in news["validations"]:
            if (
                row["step"] < self.total
            ):  # the last one is reported with the end: after it Tune might stop the run early
                value = measure(self.task.metric, row)
                self._rows.put({"step": row["step"], self.task.metric: value, "costs": dict(self.costs)})


class SweepTrial(tune.Trainable):
    """A trial as Tune sees it; each of its steps is one validation."""

    def setup(self, config: dict[str, Any], task: TrialTask) -> None:
        self.task, self.spec, self.losses = task, config, 0
        self.began = time.time()
        self._start()

    def _start(self) -> None:
        # spread, to leave Tune's placement group: it would have to include everything that the run starts
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
                self.losses += not ray.get(self.task.monitor.is_excused.remote(self.spec["number"]))
                ray.kill(self.runner)  # it may only be unreachable, and two drivers must not write to one run folder
                if self.losses > MAX_LOSSES:
                    return {"ended": True, "failure": LOST_TOO_OFTEN}
                self._start()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Not needed: a trial resumes from the run's own checkpoints."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Not needed, see ``save_checkpoint``."""

    def cleanup(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # lost, or it did not stop in time
            ray.get(self.runner.stop.remote(), timeout=STOP_S)
        ray.kill(self.runner)
        self.task.monitor.leave.remote(self.spec["number"])
