"""In the default run ranks wait for the pool under 1 % of the time, and the same seed gives the same losses twice."""

from pathlib import Path

import pytest

from tests.jobs import Job, rows

MOST = 0.01


def default_run(storage: Path) -> Path:
    job = Job(storage, "--run.name=run", config=None)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    print(said[-1500:])
    return storage / "run"


@pytest.mark.ray
def test_waiting_for_the_pool_and_the_same_losses_twice(tmp_path: Path) -> None:
    first, second = (rows(default_run(tmp_path / name)) for name in ("first", "second"))
    for run in (first, second):
        waited, trained = (sum(row[name] for row in run) for name in ("pool_wait_s", "step_s"))
        print(f"waited {waited:.3f} s for the pool in {trained:.0f} s of {len(run)} steps: {waited / trained:.4%}")
        assert waited < MOST * trained
    assert len({row["centroids_version"] for row in first}) > 5
    for name in ("loss", "loss_local_report", "centroids_version", "studies_digest"):
        assert [row[name] for row in first] == [row[name] for row in second], name
