"""Two jobs in one folder: one goes on, the other is told who holds it, and the lease of a dead one ends by itself."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cmcgns import lease
from cmcgns.errors import UserError
from cmcgns.lease import Holder, hold
from tests.s3 import S3Server

HOLD = """
import sys, time
from cmcgns import lease
from cmcgns.errors import UserError
lease.RENEW_S = 0.2
print("ready", flush=True)
sys.stdin.readline()
try:
    with lease.hold(sys.argv[1], "run x"):
        print("holds", flush=True)
        time.sleep(float(sys.argv[2]))
except UserError as error:
    print(error, flush=True)
"""


def start(uri: str, seconds: float) -> "subprocess.Popen[str]":
    """A process that holds the folder for some seconds once it gets a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, uri, str(seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def held(uri: str, seconds: float = 60.0) -> "subprocess.Popen[str]":
    """A process that holds the folder now."""
    process = start(uri, seconds)
    go(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def one_of(uri: str, count: int) -> None:
    """Of ``count`` processes that start at once, one holds the folder and the others name it."""
    processes = [start(uri, 1.5) for _ in range(count)]
    for process in processes:
        go(process)
    said = [process.communicate()[0] for process in processes]
    assert sum("holds" in each for each in said) == 1, said
    winner = processes[next(number for number, each in enumerate(said) if "holds" in each)].pid
    for each in said:
        assert "holds" in each or f"run x is in use by another job: process {winner} on " in each


def test_of_many_that_start_at_once_one_holds_a_folder(tmp_path: Path) -> None:
    one_of(str(tmp_path / "run"), 6)
    assert not (tmp_path / "run").exists(), "nothing is left of a lease"


@pytest.mark.s3
def test_of_many_that_start_at_once_one_holds_a_folder_in_a_bucket(s3_server: S3Server) -> None:
    uri = f"{s3_server.make_bucket('lease')}/run"
    one_of(uri, 4)
    assert not s3_server.client().list_objects_v2(Bucket="lease").get("KeyCount")


def test_the_lease_of_a_process_that_was_killed_here_is_free_at_once(tmp_path: Path) -> None:
    process = held(str(tmp_path))
    with (
        pytest.raises(UserError, match=rf"in use by another job: process {process.pid} on .*, since 20"),
        hold(str(tmp_path), "run x"),
    ):
        pass
    process.kill()
    process.wait()
    began = time.monotonic()
    with hold(str(tmp_path), "run x"):
        assert time.monotonic() - began < lease.POLL_S
        assert [path.name for path in tmp_path.iterdir()] == ["lease-2.json"]
    assert not tmp_path.exists()


def elsewhere(folder: Path, renewals: int = 0) -> None:
    """A lease of a process on another machine."""
    other = Holder("other-host", "other machine", 1, 0.0, "2026-01-01 00:00:00 UTC", "token", renewals)
    (folder / "lease-7.json").write_bytes(other.to_json(renewals))


def test_a_holder_on_another_machine_is_dead_once_it_no_longer_renews_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "DEAD_S", 1.0)
    monkeypatch.setattr(lease, "POLL_S", 0.1)
    elsewhere(tmp_path)
    began = time.monotonic()
    with hold(str(tmp_path), "run x"):
        assert time.monotonic() - began >= 1.0
        assert [path.name for path in tmp_path.iterdir()] == ["lease-8.json"]


def test_a_holder_on_another_machine_that_renews_its_lease_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "POLL_S", 0.1)
    elsewhere(tmp_path)
    threading.Timer(0.5, elsewhere, (tmp_path, 1)).start()
    with pytest.raises(UserError, match="process 1 on other-host"), hold(str(tmp_path), "run x"):
        pass


def test_a_holder_whose_folder_was_taken_over_ends_at_once(tmp_path: Path) -> None:
    process = held(str(tmp_path))
    (tmp_path / "lease-2.json").write_text("{}")
    assert process.wait(timeout=20) == 1


def test_a_holder_that_was_stopped_for_a_while_still_holds_its_folder_here(tmp_path: Path) -> None:
    process = held(str(tmp_path))
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match=f"process {process.pid}"), hold(str(tmp_path), "run x"):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_job_inside_another_one_shares_its_lease(tmp_path: Path) -> None:
    with hold(str(tmp_path / "set"), "the set"), hold(str(tmp_path / "set"), "the set"):
        assert len(list((tmp_path / "set").iterdir())) == 1
        renewals = json.loads((tmp_path / "set" / "lease-1.json").read_text())["renewals"]
        assert renewals == 0
    assert not (tmp_path / "set").exists()
