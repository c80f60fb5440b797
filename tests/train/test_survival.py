"""A run that loses a worker, is stopped, renamed and resumed on more workers; the acceptance tests compare each case with a whole
run, and freeze a worker.

The same run is checked for what other users of the machine can do to it (``tests.attacks``): another run would take a minute.
"""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.attacks import check_ports, mode, plant_modules
from tests.jobs import Job, checkpoints, result, rows
from tests.survival import check_stopped, same_steps, start

pytestmark = pytest.mark.ray
SHORT = (
    "--train.stage1_steps=8", "--train.stage2_steps=4", "--train.checkpoint_every=3", "--clustering.actors=1",
    "--train.num_workers=1", "--train.threads_per_worker=1", "--data.phantom_studies=220", "--data.validation_studies=16",
)  # fmt: skip
LENGTH = 12


def test_a_run_survives_a_killed_worker_sigterm_and_a_new_name_and_is_closed_to_others(home: Path) -> None:
    folder, marks = home / "run", home / "marks"
    plant_modules(home / "corpus", marks)
    job = start(home, 4, *SHORT, cwd=home / "corpus")
    check_ports(job)
    before = rows(folder)
    job.workers()[0].kill()
    job.wait_for(lambda: "resuming after step" in job.text() and len(rows(folder)) >= 7)
    [step] = re.findall(r"resuming after step (\d+)", job.text())
    again = rows(folder)[int(step) : len(before)]
    assert again, f"killed after step {len(before)}, no step was repeated"
    same_steps(again, before[int(step) :])
    job.process.terminate()
    os.killpg(job.process.pid, signal.SIGTERM)  # as `timeout` does: to the job, and to all of its group
    steps = check_stopped(job, folder, status=143)
    assert not list(marks.iterdir()), "a module beside the data was executed"
    assert mode(home / ".ray" / "auth_token") == 0o600
    assert checkpoints(folder)[-1].name.startswith(f"checkpoint_{steps:08d}_")
    renamed = folder.rename(home / "renamed")
    job = Job(home, "--run.resume=renamed", "--train.num_workers=2", "--train.zero_stage=3", config=None)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert [row["step"] for row in rows(renamed)] == list(range(1, LENGTH + 1))
    assert result(renamed)["status"] == "finished"
