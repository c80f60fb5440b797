"""Whole sweeps, small: a trial that fails beside others that do not, everything free at the end, a best.yaml that gives the
same number again; and one that is killed and goes on."""

from pathlib import Path

import pytest

from cmcgns.evaluate.measures import MEAN_RECALL, measure
from tests.jobs import Job, registered, result, rows
from tests.ray_head import RayHead
from tests.sweeping import SHORT, check_free, sweep, table, trials

pytestmark = pytest.mark.ray

GRID = "--sweep.space={objective.num_clusters: {choice: [16, 512]}, objective.temperature: {choice: [0.1]}}"


def test_a_failing_trial_is_told_the_rest_goes_on_and_everything_is_free_at_the_end(
    ray_head: RayHead, tmp_path: Path
) -> None:
    job = sweep(tmp_path, *SHORT, GRID, "--sweep.search=grid", "--sweep.repeats=0", env=ray_head.environment)
    said, folder = job.wait(), tmp_path / "sweep"
    assert job.process.returncode == 0, said[-3000:]
    assert "Traceback" not in said
    found = table(folder)
    assert sorted(found["status"]) == ["failed", "finished"]
    failed, finished = found[found["status"] == "failed"].iloc[0], found[found["status"] == "finished"].iloc[0]
    assert failed["objective.num_clusters"] == 512
    assert "needs at least 4 x 512 = 2048 training sentences" in failed["reason"]
    assert failed["reason"] in said
    assert found[f"{MEAN_RECALL}@2"].notna().sum() == 1  # the first rung
    check_free(ray_head)

    again = Job(tmp_path, "--run.name=again", config=folder / "best.yaml")
    again.wait()
    assert measure(MEAN_RECALL, result(tmp_path / "again")["metrics"]) == pytest.approx(finished[MEAN_RECALL], abs=1e-5)
    losses = [[row["loss"] for row in rows(run)] for run in (tmp_path / "again", Path(finished["run"]))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_killed_sweep_goes_on_and_runs_nothing_twice(tmp_path: Path) -> None:
    options = (*SHORT, "--sweep.scheduler=none", "--sweep.search=random", "--sweep.trials=2", "--sweep.repeats=0")
    job, runs = sweep(tmp_path, *options), tmp_path / "sweep" / "trials"
    job.wait_for(lambda: len(rows(runs / "0001")) >= 2 and registered(runs / "0001"))
    job.kill()
    first = (runs / "0000" / "metrics.jsonl").stat()
    assert [trial["status"] for trial in trials(tmp_path / "sweep")] == ["finished", "running"]

    job = sweep(tmp_path, config=None)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert table(tmp_path / "sweep")["status"].tolist() == ["finished", "finished"]
    assert (runs / "0000" / "metrics.jsonl").stat().st_mtime == first.st_mtime
    assert [row["step"] for row in rows(runs / "0001")] == list(range(1, 9))
    assert sweep(tmp_path, config=None).wait().startswith("error: sweep.resume sweep: that sweep has finished")
