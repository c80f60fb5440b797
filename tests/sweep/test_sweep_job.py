"""A small but complete sweep: one trial fails, the sweep is killed and resumed on another cluster, all resources are free at the
end, and best.yaml has the settings of its trial."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cmcgns.cli import validate
from cmcgns.config import Config
from cmcgns.measures import MEAN_RECALL, measure
from tests.jobs import registered, result, rows, run_here
from tests.ray_head import RayHead
from tests.sweeping import SHORT, check_free, sweep, table, trials

pytestmark = pytest.mark.ray

GRID = "--sweep.space={objective.num_clusters: {choice: [16, 512]}, objective.temperature: {choice: [0.1]}}"
SMALL = (
    "--train.num_workers=1", "--train.threads_per_worker=1", "--train.engine=torch", "--train.zero_stage=0",
    "--train.cpus_per_worker=0.5", "--clustering.actors=1",
)  # fmt: skip
OPTIONS = (*SHORT, *SMALL, GRID, "--sweep.search=grid", "--sweep.scheduler=none", "--sweep.repeats=0")


def test_a_killed_sweep_resumes_repeats_nothing_reports_failures_and_frees_everything(
    ray_head: RayHead, tmp_path: Path
) -> None:
    job, folder = sweep(tmp_path, *OPTIONS), tmp_path / "sweep"
    runs = folder / "trials"
    job.wait_for(lambda: len(rows(runs / "0001")) >= 2 and registered(runs / "0001"))
    job.kill()
    said_before = job.text()
    first, second = trials(folder)
    assert (first["status"], second["status"]) == ("failed", "running")

    job = sweep(tmp_path, config=None, env=ray_head.environment)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert "Traceback" not in said
    found = table(folder)
    assert found["status"].tolist() == ["failed", "finished"]
    assert trials(folder)[0] == first
    assert [row["step"] for row in rows(runs / "0001")] == list(range(1, 9))
    failed = found.iloc[0]
    assert failed["objective.num_clusters"] == 512
    assert "needs at least 4 x 512 = 2048 training sentences" in failed["reason"]
    assert failed["reason"] in said_before
    check_free(ray_head)
    refused = run_here(tmp_path, "sweep", f"--run.storage={tmp_path}", "--sweep.resume=sweep")
    assert refused.stderr.startswith("error: sweep.resume sweep: the sweep has finished")

    winner = Path(found.loc[found[MEAN_RECALL].idxmax(), "run"])
    assert measure(MEAN_RECALL, result(winner)["metrics"]) == pytest.approx(found[MEAN_RECALL].max(), abs=1e-9)
    assert trained_on(folder / "best.yaml") == trained_on(winner / "config.yaml")


def trained_on(config: Path) -> dict[str, Any]:
    """The settings that decide a run's numbers: equal ones give equal losses (``acceptance/test_sweep.py`` runs best.yaml)."""
    found = validate(yaml.safe_load(config.read_text()), Config).model_dump(exclude={"run"})
    return {key: value for key, value in found.items() if key != "sweep"}
