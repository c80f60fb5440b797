"""kill -9 of a sweep's driver in the middle, then resumed: every trial once, and at most one checkpoint interval lost for each
interrupted one."""

import re
from pathlib import Path

import pytest

from tests.jobs import registered, rows
from tests.sweeping import sweep, table, trials

pytestmark = pytest.mark.ray

TRIALS, STEPS, INTERVAL = 3, 16, 4
LENGTH = (
    "--data.phantom_studies=130", "--train.stage1_steps=12", "--train.stage2_steps=4", "--train.warmup_steps=2",
    "--train.log_every=1", f"--train.checkpoint_every={INTERVAL}",
)  # fmt: skip


def test_a_killed_sweep_runs_every_trial_once_and_repeats_at_most_a_checkpoint_interval(
    tmp_path: Path,
) -> None:
    runs = tmp_path / "sweep" / "trials"
    options = (
        *LENGTH,
        "--sweep.scheduler=none",
        f"--sweep.trials={TRIALS}",
        "--sweep.repeats=0",
        "--sweep.search=random",
    )
    job = sweep(tmp_path, *options)
    job.wait_for(lambda: len(rows(runs / "0001")) >= 2 * INTERVAL and registered(runs / "0001"))
    job.kill()
    before = trials(tmp_path / "sweep")
    assert [trial["status"] for trial in before] == ["finished", "running", "waiting"]
    done = len(rows(runs / "0001"))  # in a local folder each step's row is written at once

    job = sweep(tmp_path, config=None)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    found = table(tmp_path / "sweep")
    assert found["status"].tolist() == ["finished"] * TRIALS
    after = trials(tmp_path / "sweep")
    assert [trial["drawn"] for trial in after] == [trial["drawn"] for trial in before]
    assert after[0] == before[0]
    (resumed_at,) = re.findall(r"trial 1: resuming after step (\d+) of", said)
    for number in range(TRIALS):
        assert [row["step"] for row in rows(runs / f"{number:04d}")] == list(range(1, STEPS + 1))
    print(f"\ntrial 1 was killed after step {done} and went on after step {resumed_at}")
    assert 0 <= done - int(resumed_at) <= INTERVAL
