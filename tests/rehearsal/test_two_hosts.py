"""A cluster brought up by `ray up cluster/on_prem.yaml` takes a job; three hosts, the doctor and a pulled cable are shown by the
acceptance test `rehearsal`."""

from pathlib import Path

import pytest

from tests.jobs import TINY, result, rows
from tests.rehearsal.cluster import TINY_GRADIENTS, running_cluster
from tests.rehearsal.hosts import left_overs, skip_unless_possible

pytestmark = [pytest.mark.cluster, pytest.mark.ray]

SHORT = (
    "--data.phantom_studies=130", "--train.placement=spread", "--train.stage1_steps=3", "--train.stage2_steps=0",
    "--train.warmup_steps=1", "--train.log_every=1", "--run.name=run",
)  # fmt: skip


def test_ray_up_a_submitted_job_on_both_hosts_and_nothing_left(tmp_path: Path) -> None:
    skip_unless_possible()
    with running_cluster(tmp_path, count=2) as cluster:
        before = cluster.hosts["h2"].bytes_sent()
        storage = tmp_path / "runs"
        done = cluster.submit("python", "jobs/pretrain.py", f"--config={TINY}", f"--run.storage={storage}", *SHORT)
        assert done.returncode == 0, done.stdout[-3000:]
        assert "succeeded" in done.stdout
        assert cluster.hosts["h2"].bytes_sent() - before > 3 * TINY_GRADIENTS / 2  # two ranks, one on each host
    assert [row["step"] for row in rows(storage / "run")] == [1, 2, 3]
    assert result(storage / "run")["status"] == "finished"
    assert left_overs(cluster.hosts.values()) == []
