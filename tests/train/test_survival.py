"""A run that loses a worker and is stopped goes on where it was; the acceptance test compares each case with a whole run."""

import re
from pathlib import Path

import pytest

from tests.jobs import checkpoints, result, rows
from tests.survival import check_stopped, resume, same_steps, start

pytestmark = pytest.mark.ray
SHORT = ("--train.stage1_steps=8", "--train.stage2_steps=4", "--train.checkpoint_every=3", "--clustering.actors=1")
LENGTH = 12


def test_a_run_survives_a_killed_worker_ctrl_c_and_another_number_of_workers(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = start(tmp_path, 4, *SHORT)
    before = rows(folder)
    job.workers()[0].kill()
    job.wait_for(lambda: "resuming after step" in job.text() and len(rows(folder)) >= 7)
    [step] = re.findall(r"resuming after step (\d+)", job.text())
    again = rows(folder)[int(step) : len(before)]
    assert again, f"killed after step {len(before)}, no step was repeated"
    same_steps(again, before[int(step) :])
    job.interrupt()
    steps = check_stopped(job, folder)
    assert checkpoints(folder)[-1].name.startswith(f"checkpoint_{steps:08d}_")
    job = resume(tmp_path, "--train.num_workers=1", "--train.threads_per_worker=1", "--train.zero_stage=3")
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert [row["step"] for row in rows(folder)] == list(range(1, LENGTH + 1))
    assert result(folder)["status"] == "finished"
