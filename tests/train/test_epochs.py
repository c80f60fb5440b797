"""A run of many short epochs: each leaves nothing behind."""

from pathlib import Path

import pytest

from tests.jobs import Job, rows

pytestmark = pytest.mark.ray

STEPS, EPOCHS = 30, 8
"""About 100 training studies in global batches of 32: three or four steps an epoch."""


def test_the_process_that_reads_an_epoch_ends_with_it(tmp_path: Path) -> None:
    job = Job(
        tmp_path, "--run.name=run", "--data.phantom_studies=130", f"--train.stage1_steps={STEPS}", "--train.stage2_steps=0",
        "--train.log_every=1", "--train.checkpoint_every=1000",
    )  # fmt: skip
    folder = tmp_path / "run"
    job.wait_for(lambda: any(row["epoch"] >= EPOCHS for row in rows(folder)))
    readers = job.processes("SplitCoordinator")
    job.wait()
    assert job.process.returncode == 0, job.text()[-3000:]
    # the epoch that is read, those begun ahead of it, and one that is just ending
    assert 1 <= len(readers) <= 4
    print(f"\n{len(readers)} readers in epoch {EPOCHS}")
