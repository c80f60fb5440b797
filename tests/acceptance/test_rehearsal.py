"""A cluster without a cloud: three machines brought up by `ray up`, jobs submitted to them from a fourth, a cable pulled in the
middle, and nothing left afterwards."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import TINY, Job, registered, result, rows
from tests.rehearsal.cluster import JOB_S, TINY_GRADIENTS, TOKEN, Cluster, running_cluster
from tests.rehearsal.hosts import left_overs, skip_unless_possible

pytestmark = [pytest.mark.cluster, pytest.mark.ray]

SETTINGS = (
    "--run.name=run", "--train.num_workers=3", "--train.placement=spread", "--train.microbatch_size=8",
    "--train.global_batch_size=24", "--train.zero_stage=2", "--train.precision=fp32", "--train.log_every=1",
    "--train.checkpoint_every=10",
)  # fmt: skip
FIRST_STEPS = ("--train.stage1_steps=20", "--train.stage2_steps=10")
CUT_AT, STEPS = 25, 90


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    skip_unless_possible(install=True)
    with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running
    assert left_overs(running.hosts.values()) == []


def pretrain(cluster: Cluster, storage: Path, *words: str) -> tuple[int, str]:
    """Status and output of `ray job submit -- python jobs/pretrain.py`."""
    done = cluster.submit("python", "jobs/pretrain.py", f"--config={TINY}", f"--run.storage={storage}", *words)
    return done.returncode, done.stdout


def test_the_doctor_finds_nothing_wrong_on_three_hosts(cluster: Cluster, tmp_path: Path) -> None:
    visit = cluster.submit("python", "-m", "cmcgns.doctor", "--doctor.nodes=3", f"--run.storage={tmp_path}")
    assert visit.returncode == 0, visit.stdout
    assert "0 warning, 0 failed" in visit.stdout
    assert "3 of 3 pairs by gloo" in visit.stdout


def test_three_hosts_with_zero_2_give_the_losses_of_one(cluster: Cluster, tmp_path: Path) -> None:
    alone = Job(tmp_path / "one", *SETTINGS, *FIRST_STEPS)
    said = alone.wait()
    assert alone.process.returncode == 0, said[-3000:]
    before = {name: cluster.hosts[name].bytes_sent() for name in ("h2", "h3")}
    status, said = pretrain(cluster, tmp_path / "three", *SETTINGS, *FIRST_STEPS)
    assert status == 0, said[-3000:]
    assert "succeeded" in said
    for name, bytes_before in before.items():  # a rank on each: gradients leave it at every step
        assert cluster.hosts[name].bytes_sent() - bytes_before > 30 * TINY_GRADIENTS
    found, expected = rows(tmp_path / "three" / "run"), rows(tmp_path / "one" / "run")
    assert [row["studies_digest"] for row in found] == [row["studies_digest"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4), row["step"]
    print(
        "largest relative difference", max(abs(r["loss"] / w["loss"] - 1) for r, w in zip(found, expected, strict=True))
    )


def test_a_job_that_is_stopped_by_its_id_goes_on_under_another(cluster: Cluster, tmp_path: Path) -> None:
    words = ["python", "jobs/pretrain.py", f"--run.storage={tmp_path}"]
    first = [f"--config={TINY}", *SETTINGS, "--train.stage1_steps=90", "--train.stage2_steps=0"]
    started = cluster.submit(*words, *first, options=["--submission-id=cxr-1", "--no-wait"])
    assert started.returncode == 0, started.stdout
    folder = tmp_path / "run"
    end = time.monotonic() + JOB_S
    while len(rows(folder)) < 5:
        assert time.monotonic() < end, cluster.ray("job", "logs", "cxr-1").stdout
        time.sleep(0.2)
    cluster.ray("job", "stop", "cxr-1")
    assert "stopping after this step" in cluster.ray("job", "logs", "cxr-1").stdout
    stopped = result(folder)
    assert stopped["status"] == "stopped"
    assert (Path(stopped["checkpoint"]) / "progress.json").exists()
    assert 5 <= int(stopped["steps"]) < 90
    again = cluster.submit(*words, "--run.resume=run", options=["--submission-id=cxr-1b"])
    assert again.returncode == 0, again.stdout[-3000:]
    assert [row["step"] for row in rows(folder)] == list(range(1, 91))


def test_a_run_whose_third_host_is_cut_off_ends_on_the_others(cluster: Cluster, tmp_path: Path) -> None:
    words = (*SETTINGS, f"--train.stage1_steps={STEPS - 10}", "--train.stage2_steps=10")
    job = cluster.start_job("python", "jobs/pretrain.py", f"--config={TINY}", f"--run.storage={tmp_path}", *words)
    folder = tmp_path / "run"
    job.wait_for(lambda: len(rows(folder)) >= CUT_AT and registered(folder))
    cut = time.monotonic()
    cluster.hosts["h3"].cut()
    before = len(rows(folder))
    job.wait_for(lambda: len(rows(folder)) > before + 5)
    print(f"steps again {time.monotonic() - cut:.0f} s after the cable was pulled")
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert "resuming after step" in said
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))
    assert result(folder)["status"] == "finished"
    assert cluster.nodes() == ["h1", "h2"]

    cluster.hosts["h3"].plug()
    cluster.wait_for_nodes(["h1", "h2", "h3"])  # the head starts Ray there again


def test_ray_down_ends_the_head_and_ray_stop_the_others(cluster: Cluster) -> None:
    cluster.ray("down", "--yes", str(cluster.file))
    for name in ("h2", "h3"):
        cluster.hosts[name].run("ray", "stop", environment=TOKEN)
    for name in ("h1", "h2", "h3"):
        left = cluster.hosts[name].run("pgrep", "-fa", "raylet|gcs_server|dashboard", check=False)
        assert left.returncode == 1, (name, left.stdout)
