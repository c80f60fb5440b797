"""Attacks on what cluster/aws_access.py makes, each against an account of its own (moto's): the file as a user runs it."""

import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from cluster import aws_access
from tests.cluster.aws_account import ACCESS, IMAGE, SSH_RANGE, fresh_account, group_ids, role_names
from tests.cluster.files import load

EVERYONE = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": "*", "Action": "sts:AssumeRole"}]}
ROLES = {"cmcgns-head", "cmcgns-worker"}
TAGS = [{"Key": "cmcgns-cluster", "Value": "us-east-1/cmcgns"}]
"""The tag of the script, as anyone who may tag roles can write it."""
EVERYTHING = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with fresh_account(tmp_path_factory.mktemp("aws"), bare=True):
        yield


@pytest.fixture(autouse=True)
def account(server: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new account with cluster `cmcgns` in it."""
    request = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
    urllib.request.urlopen(request, timeout=60).close()
    make(cluster_file(tmp_path))
    capsys.readouterr()


def cluster_file(folder: Path, name: str = "cmcgns", roles: str | None = None, region: str = "us-east-1") -> str:
    """Option for a copy of gpu.yaml with another cluster name, roles that follow it or do not, and a region."""
    text = json.dumps(load("gpu") | {"cluster_name": name})
    text = text.replace('"cmcgns-head"', f'"{roles or name}-head"').replace(
        '"cmcgns-worker"', f'"{roles or name}-worker"'
    )
    file = folder / "copy.yaml"
    file.write_text(text.replace("us-east-1", region))
    return f"--file={file}"


def bucket_of(role: str) -> str:
    """What a role may read and write."""
    document = boto3.client("iam").get_role_policy(RoleName=role, PolicyName="bucket")["PolicyDocument"]
    return str(document["Statement"][1]["Resource"])


def make(*options: str) -> None:
    aws_access.main([*ACCESS, *options])


def remove(folder: Path) -> None:
    aws_access.main(["--remove", cluster_file(folder)])


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Message of a run that exits and is no usage error."""
    with pytest.raises(SystemExit) as ended:
        aws_access.main(list(options))
    assert isinstance(ended.value.code, str), capsys.readouterr().err
    return ended.value.code


def test_a_second_cluster_cannot_move_the_first_ones_rights_to_another_bucket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = cluster_file(tmp_path, name="second", roles="cmcgns")
    said = refused(capsys, "--bucket=s3://elsewhere/x", f"--ssh-range={SSH_RANGE}", copy)
    assert "IamInstanceProfile cmcgns-head; that of cluster second is second-head" in said
    assert {bucket_of(role) for role in ROLES} == {"arn:aws:s3:::films/cxr/*"}


def test_a_copy_of_the_file_with_the_same_name_cannot_move_the_bucket_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ("--bucket=s3://elsewhere/x", f"--ssh-range={SSH_RANGE}", cluster_file(tmp_path))
    said = refused(capsys, *other)
    assert "arn:aws:s3:::films/cxr/*" in said
    assert "not s3://elsewhere/x: add --move-bucket" in said
    assert {bucket_of(role) for role in ROLES} == {"arn:aws:s3:::films/cxr/*"}
    aws_access.main([*other, "--move-bucket"])
    assert {bucket_of(role) for role in ROLES} == {"arn:aws:s3:::elsewhere/x/*"}


def test_the_same_name_in_another_region_cannot_take_the_roles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = cluster_file(tmp_path, region="us-west-2")
    said = refused(capsys, *ACCESS, there)
    assert "role cmcgns-head belongs to cluster us-east-1/cmcgns: change cluster_name" in said
    assert "role cmcgns-head stays: it belongs to cluster us-east-1/cmcgns" in refused(capsys, "--remove", there)
    assert role_names() == ROLES


def test_removing_a_second_cluster_cannot_delete_the_first_ones_roles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        aws_access.main(["--remove", cluster_file(tmp_path, name="second", roles="cmcgns")])
    aws_access.main(["--remove", cluster_file(tmp_path, name="second")])
    assert "nothing of cluster us-east-1/second is left" in capsys.readouterr().out
    assert role_names() == ROLES


@pytest.mark.parametrize("tags", [[], TAGS], ids=["untagged", "tagged"])
def test_a_role_that_everyone_may_assume_is_not_adopted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tags: list[dict[str, str]]
) -> None:
    remove(tmp_path)
    boto3.client("iam").create_role(RoleName="cmcgns-head", AssumeRolePolicyDocument=json.dumps(EVERYONE), Tags=tags)
    before = group_ids()
    said = refused(capsys, *ACCESS, cluster_file(tmp_path))
    assert ("role cmcgns-head trusts ['*'], not EC2 alone" if tags else "role cmcgns-head has no tag") in said
    assert boto3.client("iam").list_role_policies(RoleName="cmcgns-head")["PolicyNames"] == []
    assert (role_names(), group_ids()) == ({"cmcgns-head"}, before)


def test_a_role_whose_trust_was_widened_is_not_used_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boto3.client("iam").update_assume_role_policy(RoleName="cmcgns-worker", PolicyDocument=json.dumps(EVERYONE))
    assert "role cmcgns-worker trusts ['*']" in refused(capsys, *ACCESS, cluster_file(tmp_path))
    remove(tmp_path)
    make(cluster_file(tmp_path))
    trust = boto3.client("iam").get_role(RoleName="cmcgns-worker")["Role"]["AssumeRolePolicyDocument"]
    assert trust["Statement"][0]["Principal"] == {"Service": "ec2.amazonaws.com"}


def test_a_role_that_was_given_more_rights_is_not_used_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iam = boto3.client("iam")
    made = iam.create_policy(PolicyName="administrator", PolicyDocument=json.dumps(EVERYTHING))
    wide = made["Policy"]["Arn"]
    iam.attach_role_policy(RoleName="cmcgns-worker", PolicyArn=wide)
    iam.put_role_policy(RoleName="cmcgns-head", PolicyName="extra", PolicyDocument=json.dumps(EVERYTHING))
    said = refused(capsys, *ACCESS, cluster_file(tmp_path))
    assert "role cmcgns-head has policies that are not made here (extra)" in said
    assert f"role cmcgns-worker has policies that are not made here ({wide})" in said


def test_an_instance_profile_that_holds_an_administrators_role_is_not_adopted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    iam = boto3.client("iam")
    iam.create_role(RoleName="administrator", AssumeRolePolicyDocument=json.dumps(aws_access.policy("trust", {})))
    iam.remove_role_from_instance_profile(InstanceProfileName="cmcgns-worker", RoleName="cmcgns-worker")
    iam.add_role_to_instance_profile(InstanceProfileName="cmcgns-worker", RoleName="administrator")
    said = refused(capsys, *ACCESS, cluster_file(tmp_path))
    assert "instance profile cmcgns-worker gives role administrator to machines" in said
    remove(tmp_path)
    assert role_names() == {"administrator"}


def test_a_security_group_left_waiting_under_the_clusters_name_is_not_adopted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remove(tmp_path)
    ec2 = boto3.client("ec2")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(GroupName="cmcgns", Description="waits", VpcId=vpc)["GroupId"]
    assert f"security group {group} has no tag" in refused(capsys, *ACCESS, cluster_file(tmp_path))
    assert f"security group {group} stays: it has no tag" in refused(capsys, "--remove", cluster_file(tmp_path))
    assert group in group_ids()


def test_a_cluster_name_that_is_a_pattern_cannot_widen_the_policies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *ACCESS, cluster_file(tmp_path, name="*"))
    assert "cluster_name '*' names roles" in said


@pytest.mark.parametrize("missing", ["profile", "membership", "role", "policy"])
def test_a_half_made_set_up_leaves_nothing_behind_after_remove(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    tear(missing)
    remove(tmp_path)
    assert role_names() == set()
    assert boto3.client("iam").list_instance_profiles()["InstanceProfiles"] == []
    assert "removed role cmcgns-worker" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["profile", "membership", "policy"])
def test_a_half_made_set_up_is_completed_by_the_same_command(tmp_path: Path, missing: str) -> None:
    tear(missing)
    make(cluster_file(tmp_path))
    profile = boto3.client("iam").get_instance_profile(InstanceProfileName="cmcgns-head")["InstanceProfile"]
    assert [role["RoleName"] for role in profile["Roles"]] == ["cmcgns-head"]
    assert sorted(boto3.client("iam").list_role_policies(RoleName="cmcgns-head")["PolicyNames"]) == ["bucket", "launch"]


def tear(missing: str) -> None:
    """Take a part of the head's set-up away, as if the script had been stopped before it."""
    iam, name = boto3.client("iam"), "cmcgns-head"
    if missing == "policy":
        iam.delete_role_policy(RoleName=name, PolicyName="launch")
        return
    iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=name)
    if missing in ("profile", "role"):
        iam.delete_instance_profile(InstanceProfileName=name)
    if missing == "role":
        for policy in ("bucket", "launch"):
            iam.delete_role_policy(RoleName=name, PolicyName=policy)
        iam.delete_role(RoleName=name)


def test_remove_names_what_stays_and_takes_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iam = boto3.client("iam")
    iam.create_instance_profile(InstanceProfileName="somebodys")
    iam.add_role_to_instance_profile(InstanceProfileName="somebodys", RoleName="cmcgns-head")
    assert "role cmcgns-head stays: " in refused(capsys, "--remove", cluster_file(tmp_path))
    assert role_names() == {"cmcgns-head"}
    assert [p["InstanceProfileName"] for p in iam.list_instance_profiles()["InstanceProfiles"]] == ["somebodys"]


def test_remove_under_running_machines_is_refused_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ec2, before = boto3.client("ec2"), group_ids()
    tags = [{"ResourceType": "instance", "Tags": [{"Key": "ray-cluster-name", "Value": "cmcgns"}]}]
    made = ec2.run_instances(ImageId=IMAGE, MinCount=1, MaxCount=1, TagSpecifications=tags)
    machine = made["Instances"][0]["InstanceId"]
    assert f"still run ({machine}): `ray down` first" in refused(capsys, "--remove", cluster_file(tmp_path))
    assert (role_names(), group_ids()) == (ROLES, before)


def test_another_network_cannot_leave_the_first_networks_group_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vpc, before = boto3.client("ec2").create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"], group_ids()
    assert f", not in {vpc}: --remove it first" in refused(capsys, *ACCESS, f"--vpc={vpc}", cluster_file(tmp_path))
    assert group_ids() == before
    remove(tmp_path)
    assert len(before - group_ids()) == 1
