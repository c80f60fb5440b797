"""Every attack of ``tests/security`` in one command, and a run whose newest checkpoint, list and export are damaged."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import REPOSITORY, Job, check_failed, checkpoints, result, rows
from tests.survival import LENGTH, check_stopped, resume, start

pytestmark = pytest.mark.ray


def test_every_attack_is_refused_and_told() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/security", "-v", "--no-header", "-o", "addopts=--strict-markers", "-rs"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if "::" in line:
            print(line.replace("tests/security/test_", ""))
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_run_resumes_from_the_last_whole_checkpoint_and_its_damaged_export_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = start(tmp_path, steps=9)
    job.interrupt()
    check_stopped(job, folder)
    *_, older, newest = checkpoints(folder)
    weights = newest / "weights_0.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    (folder / "checkpoint_manager_snapshot.json").unlink()
    job = resume(tmp_path)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert f"{newest.name} is damaged: weights_0.safetensors is not what was written" in said
    assert f"resuming after step {int(older.name.split('_')[1])} of {LENGTH}" in said
    assert [row["step"] for row in rows(folder)] == list(range(1, LENGTH + 1))
    assert result(folder)["status"] == "finished"
    heads = folder / "export" / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-1] + b"\0")
    measured = Job(
        tmp_path, f"--evaluate.run={folder}", "--evaluate.tasks=[retrieval]", "--run.name=measured", config=None,
        job="jobs/evaluate.py",
    )  # fmt: skip
    said = measured.wait()
    assert measured.process.returncode == 2
    assert "heads.safetensors is not what was written" in said


def test_a_run_without_a_whole_checkpoint_does_not_begin_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = start(tmp_path, steps=9)
    job.kill()
    for checkpoint in checkpoints(folder):
        (checkpoint / "progress.json").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    job = resume(tmp_path)
    said = job.wait()
    assert job.process.returncode == 2, said[-3000:]
    assert "no whole checkpoint is left" in said
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_that_loses_its_coordinator_ends_with_one_message_that_names_memory(tmp_path: Path) -> None:
    job = start(tmp_path, steps=9)
    for process in job.processes("RunCoordinator"):
        process.kill()
    check_failed(job, tmp_path / "run", "killed", "memory")
    job = resume(tmp_path)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, LENGTH + 1))
