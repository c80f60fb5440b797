"""The doctor and a job on a cluster of two nodes: what is wrong with one of them is said in one message."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmcgns.cluster.placement import DATA, ROLE
from tests.doctor.visits import doctor, pretrain, run
from tests.jobs import REPOSITORY
from tests.ray_head import RayHead, joined_node

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def odd_node(ray_head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A node beside the head that claims another version of a package, and is labelled for data."""
    packages = tmp_path_factory.mktemp("packages")
    (packages / "transformers-9.9.dist-info").mkdir()
    (packages / "transformers-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformers\nVersion: 9.9\n"
    )
    environment = {"PYTHONPATH": f"{packages}{os.pathsep}{REPOSITORY}"}
    with joined_node(ray_head, labels=f"{ROLE}={DATA}", environment=environment):
        yield


def test_an_address_where_nothing_listens_is_said_by_doctor_and_job(ray_head: RayHead, tmp_path: Path) -> None:
    nowhere = {"RAY_ADDRESS": "127.0.0.1:9"}
    visit, job = doctor(ray_head, tmp_path, **nowhere), pretrain(ray_head, tmp_path, **nowhere)
    assert (visit.returncode, job.returncode) == (1, 2)
    for said in (visit.stdout, job.stderr):
        assert "RAY_ADDRESS 127.0.0.1:9: no Ray cluster answers at this address" in said


def test_a_dry_run_prints_the_plan_and_what_is_missing_and_writes_nothing(ray_head: RayHead, tmp_path: Path) -> None:
    planned = pretrain(ray_head, tmp_path, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    for words in ("workers x", "centroids", "1 x 2 CPUs"):
        assert words in planned.stdout
    large = pretrain(ray_head, tmp_path, "--dry-run", "--train.cpus_per_worker=8")
    assert large.returncode == 2
    assert "need 16" in large.stderr
    assert "workers x 8 CPU" in large.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_node_with_another_version_is_named_by_doctor_and_job(
    ray_head: RayHead, odd_node: None, tmp_path: Path
) -> None:
    visit = doctor(ray_head, tmp_path, "--doctor.nodes=3")
    assert visit.returncode == 1
    failed = [line for line in visit.stdout.splitlines() if line.startswith("failed")]
    assert any("2 of 3" in line for line in failed)
    assert any("transformers 9.9 (driver " in line for line in failed)
    assert len(failed) == 2, visit.stdout
    assert "1 of 1 pairs by gloo" in visit.stdout
    job = pretrain(ray_head, tmp_path)
    assert job.returncode == 2
    assert job.stderr.startswith("error: node ")
    assert "transformers 9.9 (driver " in job.stderr
    assert list(tmp_path.iterdir()) == []


WHERE = """
import ray
from cmcgns.data.stream import ordered_context
ray.init(log_to_driver=False, logging_level="ERROR")
with ordered_context(0.0, 2**20, None):
    tasks = ray.data.range(8, override_num_blocks=8).map_batches(
        lambda batch: {"node": [ray.get_runtime_context().get_node_id()] * len(batch["id"])})
    found = {row["node"] for row in tasks.take_all()}
labelled = {node["NodeID"] for node in ray.nodes() if node["Labels"].get("cmcgns.io/role") == "data" and node["Alive"]}
print(found == labelled, len(labelled))
"""


def test_data_tasks_go_to_the_nodes_labelled_for_them(ray_head: RayHead, odd_node: None) -> None:
    done = run(ray_head, "-c", WHERE)
    assert done.stdout.splitlines()[-1:] == ["True 1"], done.stderr[-2000:]
