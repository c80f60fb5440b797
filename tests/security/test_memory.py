"""Out of memory: what the kernel kills first, and what a run says that has lost its coordinator to it."""

import os
import signal
from pathlib import Path

import pytest
import ray

from cmcgns.cluster.coordinator import LOST, RunCoordinator, has_failed, read_account, start_coordinator

pytestmark = pytest.mark.ray


class Ordinary:
    """Any other actor."""

    def pid(self) -> int:
        return os.getpid()


def oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def test_the_coordinator_is_the_last_to_be_killed_and_its_loss_is_told(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunCoordinator, "pid", lambda self: os.getpid(), raising=False)
    coordinator, other = start_coordinator(10, 0.5, {}), ray.remote(Ordinary).options(num_cpus=0).remote()
    pid, beside = ray.get([coordinator.pid.remote(), other.pid.remote()])
    assert oom_score(pid) == 0 < oom_score(beside)
    assert read_account(coordinator, {})["failure"] is None
    assert not has_failed(coordinator)
    os.kill(pid, signal.SIGKILL)
    account = read_account(coordinator, {"film 3": "is empty"})
    assert (account["failure"], account["bad_rows"]) == (LOST.format("coordinator"), {"film 3": "is empty"})
    assert "memory" in LOST
    assert has_failed(coordinator)  # otherwise Ray Train would start the workers again and again
