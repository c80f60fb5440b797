"""A run that loses workers and is stopped ends like an undisturbed one; the acceptance test checks each case separately."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.jobs import checkpoints, rows
from tests.survival import check_stopped, compare, resume, run_undisturbed, start

pytestmark = pytest.mark.ray


def test_a_run_survives_a_killed_worker_ctrl_c_and_another_number_of_workers(tmp_path: Path) -> None:
    folder, beside = tmp_path / "run", ThreadPoolExecutor(1)
    undisturbed = beside.submit(run_undisturbed, tmp_path / "undisturbed")
    job = start(tmp_path, steps=4)
    job.workers()[0].kill()
    job.wait_for(lambda: "resuming after step" in job.text() and len(rows(folder)) >= 11)
    job.interrupt()
    steps = check_stopped(job, folder)
    assert checkpoints(folder)[-1].name.startswith(f"checkpoint_{steps:08d}_")
    job = resume(tmp_path, "--train.num_workers=1", "--train.zero_stage=3")
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    compare(folder, undisturbed.result(), same_ranks_until=steps)
