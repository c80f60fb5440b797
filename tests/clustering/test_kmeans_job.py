"""`jobs/kmeans.py` as a user runs it: its files, resuming after a kill, and one message for invalid input."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from safetensors.numpy import load_file

from cmcgns.clustering.kmeans import kmeans, numpy_assign, parallel_seeds
from cmcgns.clustering.rows import RowArray
from tests.clustering.sets import heavy_tailed, write_parquet
from tests.jobs import REPOSITORY, run_here

ROWS, CLUSTERS = 20_000, 64


def command(*settings: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "jobs" / "kmeans.py"), *settings, "--clustering.cpus_per_actor=0.5"]


def run(cwd: Path, *settings: str) -> "subprocess.CompletedProcess[str]":
    return run_here(cwd, "kmeans", *settings, "--clustering.cpus_per_actor=0.5")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_stopped_and_resumed_fit_finds_the_centroids_of_one_array(tmp_path: Path) -> None:
    """Stopped by Ctrl-C, resumed on another number of actors: same files, statistics and centroids as undisturbed."""
    rows_ND = heavy_tailed(ROWS)
    write_parquet(tmp_path / "set", rows_ND, [0, 2500, ROWS])
    settings = [
        "--data.uri=set", "--data.text_column=text", f"--clustering.num_clusters={CLUSTERS}", "--run.name=fit",
        "--clustering.iterations=60", "--clustering.tolerance=0",
    ]  # fmt: skip
    folder = tmp_path / "runs" / "fit"
    process = subprocess.Popen(
        command(*settings), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "--run.resume=fit" in said
    assert metrics(folder)[-1]["iteration"] < 10, "stopped too late to have anything to go on with"
    resumed = run(tmp_path, "--run.resume=fit", "--clustering.actors=3")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr

    whole = RowArray(rows_ND, assign=numpy_assign)
    fit = kmeans(whole, parallel_seeds(whole, CLUSTERS, 0), 60, 0.0)
    assert np.array_equal(load_file(folder / "centroids.safetensors")["rows_KD"], fit.centroids_KD)
    assert [row["iteration"] for row in metrics(folder)] == list(range(1, fit.iteration + 1))
    found = parquet.read_table(folder / "assignments").to_pandas()
    assert found["id"].tolist() == [f"row-{i}" for i in range(ROWS)]
    assert found["centroid"].tolist() == numpy_assign(whole.rows_ND[:ROWS], fit.centroids_KD).nearest_N.tolist()
    statistics = json.loads((folder / "statistics.json").read_text())
    assert sum(cluster["size"] for cluster in statistics["clusters"]) == ROWS
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    assert "sentence " in resumed.stdout  # the largest clusters are shown with their nearest rows

    again = run(tmp_path, *settings)
    assert again.returncode == 2
    assert "run.name fit is taken" in again.stderr


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_given_centroids_are_kept_and_rows_assigned_to_them(tmp_path: Path) -> None:
    """A weighted fit, then its centroids over another set without an iteration."""
    weights_N = np.random.default_rng(0).uniform(0.5, 2.0, 3000)
    write_parquet(tmp_path / "set", heavy_tailed(3000), [0, 3000], weights_N=weights_N)
    write_parquet(tmp_path / "other", heavy_tailed(500, seed=1), [0, 500])
    few = [f"--clustering.num_clusters={CLUSTERS}", "--clustering.iterations=2"]
    first = run(tmp_path, "--data.uri=set", "--data.weight_column=weight", "--run.name=first", *few)
    assert first.returncode == 0, first.stdout + first.stderr
    given = tmp_path / "runs" / "first" / "centroids.safetensors"
    centroids_KD = load_file(given)["rows_KD"]
    whole = RowArray(heavy_tailed(3000), assign=numpy_assign, weights_N=weights_N)
    np.testing.assert_allclose(
        centroids_KD, kmeans(whole, parallel_seeds(whole, CLUSTERS, 0), 2, 1e-4).centroids_KD, atol=1e-6
    )
    second = run(
        tmp_path,
        "--data.uri=other",
        "--run.name=second",
        *few[:1],
        f"--clustering.start_from={given}",
        "--clustering.iterations=0",
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert np.array_equal(load_file(tmp_path / "runs" / "second" / "centroids.safetensors")["rows_KD"], centroids_KD)
    found = parquet.read_table(tmp_path / "runs" / "second" / "assignments").to_pandas()
    rows = RowArray(heavy_tailed(500, seed=1), assign=numpy_assign)
    assert found["centroid"].tolist() == numpy_assign(rows.rows_ND[:500], centroids_KD).nearest_N.tolist()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_rows_that_give_too_few_centroids_do_not_use_up_the_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set", np.tile(heavy_tailed(10), (10, 1)), [0, 100])
    done = run(tmp_path, "--data.uri=set", "--clustering.num_clusters=20", "--run.name=fit")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "20 clusters need 20 distinct rows; there are 10 among 100" in done.stderr
    assert not (tmp_path / "runs" / "fit" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "data.uri is missing"),
        (["--data.uri=nowhere"], "nowhere does not exist"),
        (["--data.uri=set", "--clustering.num_clusters=9000"], "clustering.num_clusters 9000 is more than the 50 rows"),
        (["--data.uri=set", "--clustering.num_cluster=9"], "did you mean clustering.num_clusters?"),
        (["--data.uri=set", "--data.vector_column=x", "--clustering.num_clusters=9"], "data.vector_column x: "),
        (["--data.uri=set", "--clustering.device=gpu"], "clustering.gpus_per_actor"),
        (["--data.uri=set", "--clustering.iterations=0"], "clustering.start_from"),
        (
            ["--data.uri=set", "--clustering.num_clusters=9", "--clustering.start_from=no.safetensors"],
            "start_from no.safet",
        ),
        (
            ["--data.uri=set", "--clustering.num_clusters=9", "--clustering.start_from=set/part-000.parquet"],
            "is not a safetensors",
        ),
        (["--data.uri=set", "--clustering.batch_rows=10"], "must be at least 4096"),
        (["--data.uri=set", "--clustering.num_clusters=9", "--run.resume=lost"], "there is no run of that name"),
    ],
)
def test_invalid_input_ends_with_status_2_and_one_message(tmp_path: Path, settings: list[str], message: str) -> None:
    write_parquet(tmp_path / "set", heavy_tailed(50), [0, 50])
    done = run(tmp_path, *settings)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
