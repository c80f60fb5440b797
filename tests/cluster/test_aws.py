"""cluster/gpu.yaml in an AWS account (moto's), by the access script, Ray's bootstrap and Ray's node provider."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest

from cluster import aws_access
from tests.cluster.aws_account import (
    ACCESS,
    IMAGE,
    SSH_RANGE,
    Account,
    bootstrapped,
    filled,
    fresh_account,
    group_ids,
    launched,
    role_names,
    with_detected_resources,
)
from tests.cluster.exposure import open_to_the_world, ranges, wide_policies
from tests.cluster.files import CLUSTER

FILE = f"--file={CLUSTER / 'gpu.yaml'}"
NODE_TYPES = ("head", "gpu-spot", "gpu-on-demand", "cpu")


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    with fresh_account(tmp_path_factory.mktemp("aws")) as account:
        yield account


@pytest.fixture(scope="module")
def config(account: Account) -> dict[str, Any]:
    """The file as ``ray up`` launches it."""
    return bootstrapped(account.config)


def rules(group: str) -> list[dict[str, Any]]:
    """Inbound rules of a group, the one for all protocols first."""
    found = boto3.client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"][0]
    return sorted(found["IpPermissions"], key=lambda rule: rule["IpProtocol"])


def test_the_security_group_opens_ssh_to_one_range_and_nothing_to_the_world(account: Account) -> None:
    among, ssh = rules(account.group)
    assert (among["IpProtocol"], ranges(among)) == ("-1", [])
    assert [pair["GroupId"] for pair in among["UserIdGroupPairs"]] == [account.group]
    assert (ssh["IpProtocol"], ssh["FromPort"], ssh["ToPort"]) == ("tcp", 22, 22)
    assert (ranges(ssh), ssh["UserIdGroupPairs"]) == ([SSH_RANGE], [])
    assert open_to_the_world([account.group]) == []


def test_the_access_script_run_again_changes_the_range_and_creates_nothing_twice(account: Account) -> None:
    before = role_names(), group_ids()
    aws_access.main([ACCESS[0], "--ssh-range=203.0.113.9/32", FILE])
    assert [ranges(rule) for rule in rules(account.group)] == [[], ["203.0.113.9/32"]]
    aws_access.main([*ACCESS, FILE])
    assert [ranges(rule) for rule in rules(account.group)] == [[], [SSH_RANGE]]
    assert (role_names(), group_ids()) == before


def test_bootstrap_makes_a_key_pair_and_nothing_else(account: Account) -> None:
    before = role_names(), group_ids()
    config = bootstrapped(account.config)
    assert (role_names(), group_ids()) == before
    assert [pair["KeyName"] for pair in boto3.client("ec2").describe_key_pairs()["KeyPairs"]] == ["cmcgns"]
    assert Path(config["auth"]["ssh_private_key"]).stat().st_mode & 0o777 == 0o600
    assert config["head_node"] == {}  # Ray would put its own role here


def test_the_head_has_no_cpu_for_tasks_and_workers_have_what_their_machines_have(account: Account) -> None:
    types = with_detected_resources(account.config)["available_node_types"]
    assert {(kind["resources"]["CPU"], kind["resources"].get("GPU", 0)) for kind in types.values()} >= {(0, 0), (48, 4)}
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert types["gpu-spot"]["resources"] == types["gpu-on-demand"]["resources"]
    assert types["cpu"]["resources"]["CPU"] == 16
    assert "GPU" not in types["cpu"]["resources"]


@pytest.mark.parametrize("node_type", NODE_TYPES)
def test_each_machine_is_launched_with_what_the_file_says(
    account: Account, config: dict[str, Any], node_type: str
) -> None:
    machine = launched(config, node_type)
    asked = account.config["available_node_types"][node_type]["node_config"]
    tags = {tag["Key"]: tag["Value"] for tag in machine["Tags"]}
    assert (tags["ray-cluster-name"], tags["ray-user-node-type"], tags["project"]) == ("cmcgns", node_type, "cmcgns")
    assert (machine["InstanceType"], machine["ImageId"]) == (asked["InstanceType"], IMAGE)
    assert (machine.get("InstanceLifecycle") == "spot") == (node_type == "gpu-spot")
    assert machine["MetadataOptions"]["HttpTokens"] == "required"
    (disk,) = machine["Volumes"]
    assert (disk["VolumeType"], disk["Encrypted"], disk["Size"]) == ("gp3", True, 200)
    assert machine["BlockDeviceMappings"][0]["Ebs"]["DeleteOnTermination"]


@pytest.mark.parametrize("node_type", NODE_TYPES)
def test_no_machine_is_open_to_the_world_or_may_do_everything(config: dict[str, Any], node_type: str) -> None:
    machine = launched(config, node_type)
    assert open_to_the_world([group["GroupId"] for group in machine["SecurityGroups"]]) == []
    profile = machine["IamInstanceProfile"]["Arn"].rpartition("/")[2]
    assert profile == ("cmcgns-head" if node_type == "head" else "cmcgns-worker")
    assert wide_policies(profile) == []


def test_machines_can_have_private_addresses_only(account: Account, config: dict[str, Any]) -> None:
    assert launched(config, "head")["PublicIpAddress"]
    ec2 = boto3.client("ec2")
    vpc = ec2.describe_security_groups(GroupIds=[account.group])["SecurityGroups"][0]["VpcId"]
    zone = account.config["provider"]["availability_zone"].partition(",")[0]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="172.31.128.0/20", AvailabilityZone=zone)["Subnet"]["SubnetId"]
    private = account.changed()
    private["provider"]["use_internal_ips"] = True
    for kind in private["available_node_types"].values():
        kind["node_config"]["SubnetIds"] = [subnet]
    machine = launched(bootstrapped(private), "head")
    assert (machine["SubnetId"], machine.get("PublicIpAddress")) == (subnet, None)


def test_without_the_group_of_the_file_ray_would_open_ssh_to_the_world(account: Account) -> None:
    config = account.changed() | {"cluster_name": "unnamed-group"}
    for kind in config["available_node_types"].values():
        del kind["node_config"]["SecurityGroupIds"]
    made = launched(bootstrapped(config), "head")["SecurityGroups"][0]["GroupId"]
    assert open_to_the_world([made]) == [f"{made} tcp 22-22 0.0.0.0/0"]


def test_without_the_profile_of_the_file_ray_would_take_full_access(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler._private.aws import config as ray_aws

    config = account.changed()
    del config["available_node_types"]["head"]["node_config"]["IamInstanceProfile"]
    # Ray waits half a minute for new roles to propagate
    monkeypatch.setattr(ray_aws, "time", SimpleNamespace(sleep=lambda seconds: None))
    made = bootstrapped(config)["head_node"]["IamInstanceProfile"]["Arn"].rpartition("/")[2]
    assert sorted(wide_policies(made)) == ["AmazonEC2FullAccess", "AmazonS3FullAccess"]


def test_a_missing_group_is_refused_and_none_is_created(account: Account, capsys: pytest.CaptureFixture[str]) -> None:
    before = group_ids()
    with pytest.raises(AssertionError):
        bootstrapped(filled("sg-0123456789abcdef0"))
    assert "Failed to detect a security group" in "".join(capsys.readouterr())
    assert group_ids() == before


def test_the_access_script_removes_what_it_created_and_only_that(account: Account, tmp_path: Path) -> None:
    ec2 = boto3.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    other = tmp_path / "other.yaml"
    other.write_text((CLUSTER / "gpu.yaml").read_text().replace("cluster_name: cmcgns", "cluster_name: other")
                     .replace("{Name: cmcgns-", "{Name: other-"))  # fmt: skip
    before = role_names(), group_ids()
    aws_access.main([*ACCESS, f"--vpc={vpc}", f"--file={other}"])
    assert role_names() - before[0] == {"other-head", "other-worker"}
    (made,) = group_ids() - before[1]
    assert ec2.describe_security_groups(GroupIds=[made])["SecurityGroups"][0]["VpcId"] == vpc
    aws_access.main(["--remove", f"--file={other}"])
    assert (role_names(), group_ids()) == before
