"""Kills processes of a run (kill -9) at chosen moments, and resumes it where it ends with them."""

import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.jobs import TINY, Job, check_failed, registered, result, rows
from tests.ray_head import RayHead

REPLACED = ("RayTrainWorker", "SplitCoordinator")
"""Processes without which the run goes on by itself, to the same losses."""
CLUSTERING = ("BankActor", "BankCoordinator")
"""Processes without which the run goes on, with other centroids: the rows of a lost actor are gone."""
ENDED = {"TrainController": "the controller", "RunCoordinator": "the coordinator", "driver": "the driver"}
"""Processes with which the run ends, and who is named; it is resumed."""
HEAD = {"gcs_server": "Ray's head"}
"""Ray's own process with which the run ends; it is resumed too."""
MOMENT_S = 300


class DisturbedRun:
    """The run ``run`` in ``storage``, on a Ray of its own or on ``head``."""

    def __init__(self, storage: Path, *settings: str, head: RayHead | None = None, config: Path = TINY) -> None:
        self.storage, self.folder, self.head = storage, storage / "run", head
        self.coordinator: psutil.Process | None = None
        """Of the clustering pool."""
        self.seen = 0
        """So many bytes of the job's output were there at the last fault."""
        self._start("--run.name=run", *settings, config=config)
        self.job.wait_for(lambda: registered(self.folder))  # there is a checkpoint to go on from

    def _start(self, *settings: str, config: Path | None = None) -> None:
        environment = self.head.environment if self.head else None
        self.job, self.seen = Job(self.storage, *settings, config=config, env=environment), 0

    def said(self) -> str:
        """What the job has printed since the last fault."""
        with self.job.output.open("rb") as file:
            file.seek(self.seen)
            return file.read().decode(errors="replace")

    def mark(self) -> None:
        """A fault comes now: what the job has printed so far is not looked at again."""
        self.seen = self.job.output.stat().st_size

    def step(self) -> int:
        """The last step that was printed since the last fault; 0 before the first."""
        found = re.findall(r"^step (\d+)/\d+ stage \d: loss", self.said(), re.MULTILINE)
        return int(found[-1]) if found else 0

    def processes(self, kind: str) -> list[psutil.Process]:
        """The run's processes of ``kind``, a Ray actor's name."""
        if self.head is None:
            return self.job.processes(kind)
        found = []
        for process in self.head.processes():
            with suppress(psutil.Error):
                if kind in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def is_clustering(self) -> bool:
        """Whether a re-clustering runs; it may take 0.1 s, as long as a look at all processes."""
        if self.coordinator is None:
            self.coordinator = next(iter(self.processes("BankCoordinator")), None)
        title: list[str] = []
        with suppress(psutil.Error):
            title = self.coordinator.cmdline() if self.coordinator else []
        if not title:  # it was replaced, or is not there yet
            self.coordinator = None
        return "BankCoordinator.refit" in " ".join(title)

    def wait_for(self, moment: str, come: Callable[[], bool]) -> None:
        """Wait until ``come`` holds; fails with ``moment`` if the run ends before. It looks 200 times a second."""
        end = time.monotonic() + MOMENT_S
        while not come():
            assert self.job.process.poll() is None, f"{moment} has not come:\n{self.job.text()[-2000:]}"
            assert time.monotonic() < end, f"{moment} has not come:\n{self.job.text()[-2000:]}"
            time.sleep(0.005)

    def kill(self, kind: str, draw: random.Random) -> None:
        """Kill one process of ``kind``; where the run ends with it, check what is said and resume."""
        self.mark()
        if kind == "driver":
            self._kill_driver()
        else:
            self.wait_for(kind, lambda: bool(self.processes(kind)))
            draw.choice(self.processes(kind)).kill()
        if named := (ENDED | HEAD).get(kind):
            if kind != "driver":
                said = check_failed(self.job, self.folder, named, "was killed")
                assert said.count(str(result(self.folder)["failure"])) == 1
                assert "--run.resume=run" in said
            self._start("--run.resume=run")

    def _kill_driver(self) -> None:
        if self.head is None:
            self.job.kill()
        else:  # what it had started in the cluster is the cluster's to end
            self.job.process.kill()
            self.job.process.wait()

    def finish(self, length: int) -> None:
        """Wait for the end: every step once, and one result."""
        said = self.job.wait()
        assert self.job.process.returncode == 0, said[-3000:]
        assert "Traceback" not in said
        assert [row["step"] for row in rows(self.folder)] == list(range(1, length + 1))
        assert result(self.folder)["status"] == "finished"
