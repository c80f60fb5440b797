"""A small but complete sweep: one trial fails, the sweep is killed and resumed on another cluster, all resources are free at the
end, and best.yaml reproduces its metric."""

from pathlib import Path

import pytest

from cmcgns.config import MEAN_RECALL, measure
from tests.jobs import Job, registered, result, rows
from tests.ray_head import RayHead
from tests.sweeping import SHORT, check_free, sweep, table, trials

pytestmark = pytest.mark.ray

GRID = "--sweep.space={objective.num_clusters: {choice: [16, 512, 12]}, objective.temperature: {choice: [0.1]}}"
OPTIONS = (*SHORT, GRID, "--sweep.search=grid", "--sweep.scheduler=none", "--sweep.repeats=0")


def test_a_killed_sweep_resumes_repeats_nothing_reports_failures_and_frees_everything(
    ray_head: RayHead, tmp_path: Path
) -> None:
    job, folder = sweep(tmp_path, *OPTIONS), tmp_path / "sweep"
    runs = folder / "trials"
    job.wait_for(lambda: len(rows(runs / "0002")) >= 2 and registered(runs / "0002"))
    job.kill()
    said_before = job.text()
    first = (runs / "0000" / "metrics.jsonl").stat()
    assert [trial["status"] for trial in trials(folder)] == ["finished", "failed", "running"]

    job = sweep(tmp_path, config=None, env=ray_head.environment)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert "Traceback" not in said
    found = table(folder)
    assert found["status"].tolist() == ["finished", "failed", "finished"]
    assert (runs / "0000" / "metrics.jsonl").stat().st_mtime == first.st_mtime
    assert [row["step"] for row in rows(runs / "0002")] == list(range(1, 9))
    failed = found.iloc[1]
    assert failed["objective.num_clusters"] == 512
    assert "needs at least 4 x 512 = 2048 training sentences" in failed["reason"]
    assert failed["reason"] in said_before
    check_free(ray_head)
    assert sweep(tmp_path, config=None).wait().startswith("error: sweep.resume sweep: the sweep has finished")

    again, best = Job(tmp_path, "--run.name=again", config=folder / "best.yaml"), found[MEAN_RECALL].idxmax()
    again.wait()
    found_again = measure(MEAN_RECALL, result(tmp_path / "again")["metrics"])
    assert found_again == pytest.approx(found[MEAN_RECALL].max(), abs=1e-5)
    losses = [[row["loss"] for row in rows(run)] for run in (tmp_path / "again", Path(found.loc[best, "run"]))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
