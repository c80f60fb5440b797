"""`ray up cluster/gpu.yaml` against a mock AWS whose instances are pretend machines: a head alone, a job that brings the machine
it needs up from zero and no other, and nothing left after `ray down`."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.aws_account import Account, fresh_account
from tests.jobs import TINY, result
from tests.rehearsal.cluster import TOKEN, make_token
from tests.rehearsal.data_centre import GONE, RUNS, DataCentre, running_data_centre
from tests.rehearsal.hosts import Host, Switch, in_repository, left_overs, running_switch, skip_unless_possible

pytestmark = [pytest.mark.cluster, pytest.mark.ray]

GATEWAY, OPERATOR = "172.31.0.1/16", "172.31.0.2"
"""In the network of an account's default VPC, below the addresses that the mock gives to instances."""
SHORT = (
    "--data.phantom_studies=130", "--train.stage1_steps=3", "--train.stage2_steps=0", "--train.warmup_steps=1",
    "--run.name=run",
)  # fmt: skip


@dataclass(frozen=True)
class Cloud:
    """The operator's machine in the account's network, and the cluster file that lies on it."""

    operator: Host
    centre: DataCentre
    file: Path
    environment: dict[str, str]

    def ray(self, *words: str, timeout_s: float = 300) -> Any:
        line = in_repository("ray", *words)
        return self.operator.run(*line, check=False, timeout_s=timeout_s, environment=self.environment)

    def living(self) -> list[str]:
        """Node types of the instances that run."""
        return sorted(each.node_type for each in self.centre.instances() if each.state in RUNS)


def without_a_container(config: dict[str, Any]) -> dict[str, Any]:
    """The file for machines that have the environment themselves: no container engine is at hand, and root logs in."""
    del config["docker"]
    config["auth"]["ssh_user"] = "root"
    config["provider"]["use_internal_ips"] = True
    return config | {"setup_commands": []}


def local_addresses() -> list[str]:
    return [card.address for cards in psutil.net_if_addrs().values() for card in cards]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    skip_unless_possible(install=True)
    if any(name.startswith("172.31.") for name in local_addresses()):
        pytest.skip("this machine lies in the network of an AWS account itself")
    folder = tmp_path_factory.mktemp("cloud")
    with running_switch(folder, GATEWAY) as switch, fresh_account(folder, GATEWAY.partition("/")[0]) as account:
        operator = switch.add("op", OPERATOR, allowed="")
        operator.boot()
        yield from _brought_up(switch, operator, account, folder)
    assert left_overs(switch.hosts.values()) == []


def _brought_up(switch: Switch, operator: Host, account: Account, folder: Path) -> Iterator[Cloud]:
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    file = folder / "gpu.yaml"
    file.write_text(json.dumps(without_a_container(account.changed())))  # which YAML readers take too
    # what an instance has by its profile and its image: rights, and the environment first on the path
    exported = " ".join(f"{name}={value}" for name, value in aws.items())
    profile = f"export PATH={Path(sys.executable).parent}:$PATH {exported}\n"
    key = operator.folder / "home" / ".ssh" / "cmcgns.pem"
    with running_data_centre(switch, key, profile) as centre:
        cloud = Cloud(operator, centre, file, TOKEN | aws)
        make_token(operator)
        up = cloud.ray("up", "--yes", str(file))
        assert up.returncode == 0, (up.stdout[-4000:], centre.failure)
        yield cloud
        assert centre.failure is None


def test_ray_up_starts_a_head_and_nothing_else(cloud: Cloud) -> None:
    assert cloud.living() == ["head"]


def test_a_job_brings_up_the_machine_it_needs_and_no_gpu(cloud: Cloud, tmp_path: Path) -> None:
    head = next(each for each in cloud.centre.instances() if each.node_type == "head")
    words = ["python", "jobs/pretrain.py", f"--config={TINY}", f"--run.storage={tmp_path}", *SHORT]
    address = f"--address=http://{head.address}:8265"
    done = cloud.ray("job", "submit", address, "--", *words, timeout_s=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert (
        "waiting for its autoscaler: the job needs 1.7 CPUs; the cluster has 0 CPUs, of which 0 CPUs are free"
        in done.stdout
    )
    assert result(tmp_path / "run")["status"] == "finished"
    assert cloud.living() == ["cpu", "head"]


def test_ray_down_ends_every_instance(cloud: Cloud) -> None:
    down = cloud.ray("down", "--yes", str(cloud.file))
    assert down.returncode == 0, down.stdout[-3000:]
    assert {each.state for each in cloud.centre.instances()} <= set(GONE)
