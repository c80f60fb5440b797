"""Situations of users, each by the command that they type; what needs no run of its own is imported from the suite."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import jobs
from tests.jobs import REPOSITORY, TINY, Running, checkpoints, result, rows
from tests.storage.test_access import *  # noqa: F403  a proxy, a role of a profile
from tests.test_job import *  # noqa: F403  paths, commands, names, schemes, endpoints, addresses, terminals, plot backends
from tests.test_lease import *  # noqa: F403  two at once
from tests.test_user_folders import *  # noqa: F403  locks, temporary folders
from tests.test_user_folders import OTHER_USER, READS_ALL, needs_another_user

pytestmark = pytest.mark.ray
SHORT = (
    "--run.name=run", "--train.stage1_steps=6", "--train.stage2_steps=2", "--train.warmup_steps=1",
    "--data.phantom_studies=220", "--data.validation_studies=16", "--train.log_every=1",
)  # fmt: skip


def check_finished(job: Running, folder: Path) -> str:
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert result(folder)["status"] == "finished"
    return said


def test_timeout_saves_the_run(tmp_path: Path) -> None:
    command = [
        "timeout", "60", sys.executable, "jobs/pretrain.py", "--config", str(TINY), f"--run.storage={tmp_path}", "--run.name=run",
        "--train.stage1_steps=5000", "--train.checkpoint_every=5000", "--train.log_every=1",
    ]  # fmt: skip
    job = Running(tmp_path, command)
    job.wait()
    assert job.process.returncode == 124, job.text()[-3000:]  # of timeout itself
    [checkpoint] = checkpoints(tmp_path / "run")
    assert result(tmp_path / "run")["steps"] == rows(tmp_path / "run")[-1]["step"]
    print(f"{checkpoint.name} after {result(tmp_path / 'run')['steps']} steps")


@needs_another_user
def test_another_user_without_an_entry_runs_in_an_environment_of_root_and_a_long_temporary_folder(
    tmp_path: Path,
) -> None:
    folder = tmp_path / ("x" * 70)
    for each in (tmp_path, folder):
        each.mkdir(exist_ok=True)
        each.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    job = [sys.executable, "jobs/pretrain.py", "--config", str(TINY), f"--run.storage={tmp_path}", *SHORT]
    variables = [
        f"PYTHONPATH={REPOSITORY}",
        f"PATH={os.environ['PATH']}",
        f"TMPDIR={folder}",
        "MPLBACKEND=module://not_installed.backend",
    ]
    run = Running(tmp_path / "output", [*OTHER_USER, *READS_ALL, "env", "-i", *variables, *job])
    said = check_finished(run, tmp_path / "run")
    assert "is too long for the paths of Ray's sockets: Ray keeps its files in /tmp" in said
    assert (tmp_path / "run" / "result.json").stat().st_uid == 12345


def test_uv_run_works(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "uv"], check=True)
    subprocess.run([tmp_path / "uv" / "bin" / "pip", "install", "--quiet", "uv"], check=True)
    command = [
        str(tmp_path / "uv" / "bin" / "uv"), "run", "--no-project", "--python", sys.executable, "python", "jobs/pretrain.py",
        "--config", str(TINY), f"--run.storage={tmp_path}", *SHORT,
    ]  # fmt: skip
    check_finished(Running(tmp_path, command, env={"PYTHONPATH": str(REPOSITORY)}), tmp_path / "run")


def test_memory_that_runs_out_is_named_with_what_to_lower_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    used = psutil.virtual_memory().percent / 100 + 0.04
    job = jobs.Job(tmp_path, *SHORT, "--train.max_failures=0", env={"RAY_memory_usage_threshold": f"{used:.3f}"})
    said = job.wait()
    assert job.process.returncode == 1, said[-3000:]
    assert "memory ran out on node" in said
    assert "Lower train.microbatch_size" in said
    assert "--run.resume=run" in said
    print(next(line for line in said.splitlines() if line.startswith("failed")))


def test_a_run_without_a_step_says_after_a_minute_what_it_waits_for(tmp_path: Path) -> None:
    job = jobs.Job(
        tmp_path,
        *SHORT,
        env={"TORCH_EXTENSIONS_DIR": str(tmp_path / "ops"), "CXX": slow_compiler(tmp_path)},
    )
    job.wait_for(lambda: "no step after" in job.text())
    assert "compile DeepSpeed's op" in job.text()
    job.kill()


def slow_compiler(folder: Path) -> str:
    """A compiler that takes its time."""
    path = folder / "slow-c++"
    path.write_text(f'#!/bin/sh\nsleep 90\nexec {shutil.which("c++")} "$@"\n')
    path.chmod(0o755)
    return str(path)
