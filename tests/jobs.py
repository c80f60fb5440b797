"""Runs `jobs/pretrain.py`, or another job, as a user does, in a process of its own, and reads what it leaves behind."""

import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).parent.parent
TINY = REPOSITORY / "jobs" / "configs" / "phantom-tiny.yaml"
TIMEOUT_S = 900


class Running:
    """A command that runs; its output goes to a file in ``folder``."""

    def __init__(
        self, folder: Path, command: Sequence[str], env: dict[str, str] | None = None, cwd: Path = REPOSITORY
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | (env or {}),
            )  # fmt: skip

    def wait(self, timeout_s: float = TIMEOUT_S) -> str:
        """Wait for the job's end; its output."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the job did not end:\n{self.text()[-3000:]}") from None
        return self.text()

    def text(self) -> str:
        """What the job has printed so far."""
        return self.output.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds; fails when the job ends before."""
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self.process.poll() is None, f"the job ended early:\n{self.text()[-3000:]}"
            assert time.monotonic() < end, f"waited in vain:\n{self.text()[-3000:]}"
            time.sleep(0.05)

    def processes(self, title: str) -> list[psutil.Process]:
        """The job's processes whose title holds ``title``, such as the name of a Ray actor."""
        return [child for child in self._tree() if title in _title(child)]

    def interrupt(self) -> None:
        """Ctrl-C on the driver."""
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """kill -9 of the driver and of everything that it has started."""
        doomed = self._tree()
        self.process.kill()
        for child in doomed:
            if child.is_running():
                child.kill()
        self.process.wait()
        psutil.wait_procs(doomed, timeout=20)

    def _tree(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


class Job(Running):
    """One of our jobs; its output lies beside the runs."""

    def __init__(
        self,
        storage: Path,
        *arguments: str,
        config: Path | None = TINY,
        env: dict[str, str] | None = None,
        job: str = "jobs/pretrain.py",
        cwd: Path = REPOSITORY,
    ) -> None:
        settings = [] if config is None else ["--config", str(config)]
        command = [sys.executable, str(REPOSITORY / job), *settings, f"--run.storage={storage}", *arguments]
        super().__init__(storage, command, env, cwd)

    def workers(self) -> list[psutil.Process]:
        """The processes of the Ray Train workers."""
        return self.processes("RayTrainWorker")


def run_here(cwd: Path, job: str, *settings: str) -> "subprocess.CompletedProcess[str]":
    """``python jobs/JOB.py SETTINGS`` in this process, on the Ray that it is connected to: no import is done again."""
    out, err, before = io.StringIO(), io.StringIO(), dict(os.environ)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [job, *settings])
        try:
            runpy.run_path(str(REPOSITORY / "jobs" / f"{job}.py"), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os.environ.clear()
            os.environ.update(before)
    return subprocess.CompletedProcess([job, *settings], status, out.getvalue(), err.getvalue())


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def rows(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The rows of one split in a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in found if row["split"] == split]


def result(folder: Path) -> dict[str, Any]:
    """A run's result.json."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def checkpoints(folder: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("checkpoint_*/progress.json"))


def registered(folder: Path) -> bool:
    """True once Ray Train would go on from a checkpoint of the run."""
    snapshot = folder / "checkpoint_manager_snapshot.json"
    return snapshot.exists() and "checkpoint_0" in snapshot.read_text()


def check_failed(job: Job, folder: Path, *words: str) -> str:
    """The job ended with status 1 and says why once, as its result.json does."""
    said = job.wait()
    assert job.process.returncode == 1, said[-3000:]
    assert "Traceback" not in said
    failure = str(result(folder)["failure"])
    for word in words:
        assert word in failure, failure
        assert word in said
    assert result(folder)["status"] == "failed"
    return said


def check_learned(folder: Path, least: float) -> None:
    """What a default run must have reached: recall at least ``least`` times chance, centroid versions, features that have not
    collapsed."""
    outcome = result(folder)
    metrics = outcome["metrics"]
    times = {way: metrics[f"{way}_recall_at_1"] / metrics["chance_recall_at_1"] for way in ("i2t", "t2i")}
    spread = {name: metrics[name] for name in ("patches_std", "attended_std")}
    print(
        f"recall@1 {metrics['i2t_recall_at_1']:.3f} and {metrics['t2i_recall_at_1']:.3f} of {metrics['studies']} studies, "
        f"{times['i2t']:.0f} and {times['t2i']:.0f} times chance; {outcome['centroids_version']} centroid versions; {spread}"
    )
    assert metrics["studies"] == 256
    assert min(times.values()) >= least
    assert outcome["centroids_version"] >= 3
    assert min(spread.values()) >= 0.3
    assert {row["stage"] for row in rows(folder)} == {1, 2}
