"""The doctor on a cluster of one node; `tests/acceptance/test_doctor.py` has a faulty one."""

from pathlib import Path

import pytest

from tests.doctor.visits import doctor
from tests.ray_head import RayHead

pytestmark = pytest.mark.ray


def test_a_healthy_node_passes(ray_head: RayHead, tmp_path: Path) -> None:
    visit = doctor(ray_head, tmp_path, "--doctor.nodes=1")
    assert visit.returncode == 0, visit.stdout
    for words in (
        "nodes           cluster: ",
        "equal on 1 nodes",
        "refuses requests without one",
        "MiB written at",
        "0 failed",
    ):
        assert words in visit.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_token_gives_one_message(ray_head: RayHead, tmp_path: Path) -> None:
    wrong = {"RAY_AUTH_TOKEN": "0" * 64, "RAY_NUM_REDIS_GET_RETRIES": "1"}
    visit = doctor(ray_head, tmp_path, **wrong)
    assert visit.returncode == 1
    assert visit.stdout.count("the cluster refuses this process's token") == 1
    assert visit.stderr == ""
