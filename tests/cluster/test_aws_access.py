"""What cluster/iam/ allows nodes: one prefix of one bucket, and for the head the nodes of its cluster."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import aws_access
from tests.cluster.exposure import is_wide
from tests.cluster.files import CLUSTER, load
from tests.cluster.iam import allows

ACCOUNT = "123456789012"
NAMES = {
    "partition": "aws",
    "region": "us-east-1",
    "account": ACCOUNT,
    "cluster": "cmcgns",
    "key_name": "cmcgns",
    "instance_types": ["g6.12xlarge", "m7i.4xlarge"],
    "security_group": "sg-1",
    "bucket": "films",
    "prefix": "cxr",
}
BUCKET, LAUNCH = aws_access.policy("bucket", NAMES), aws_access.policy("launch", NAMES)
EC2 = f"arn:aws:ec2:us-east-1:{ACCOUNT}"
MACHINE = {
    "aws:RequestTag/ray-cluster-name": "cmcgns",
    "ec2:InstanceType": "g6.12xlarge",
    "ec2:MetadataHttpTokens": "required",
}
"""Condition keys of a launch request by cluster/gpu.yaml."""
EC2_ITSELF = {"iam:PassedToService": "ec2.amazonaws.com"}


@pytest.mark.parametrize("document", [BUCKET, LAUNCH])
def test_no_statement_is_wide_or_left_unfilled(document: dict[str, Any]) -> None:
    assert not [statement for statement in document["Statement"] if is_wide(statement)]
    assert "$" not in json.dumps(document)


@pytest.mark.parametrize("action", ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"])
def test_objects_are_granted_under_the_prefix_only(action: str) -> None:
    assert allows(BUCKET, action, "arn:aws:s3:::films/cxr/runs/1/config.yaml")
    for elsewhere in ("films/cxr-raw/1.dcm", "films/other/1.dcm", "films/cxr", "films2/cxr/1.dcm", "other/cxr/1.dcm"):
        assert not allows(BUCKET, action, f"arn:aws:s3:::{elsewhere}")


def test_names_are_listed_under_the_prefix_only() -> None:
    assert allows(BUCKET, "s3:ListBucket", "arn:aws:s3:::films", {"s3:prefix": "cxr/runs/"})
    assert not allows(BUCKET, "s3:ListBucket", "arn:aws:s3:::films", {"s3:prefix": "cxr-raw/"})
    assert not allows(BUCKET, "s3:ListBucket", "arn:aws:s3:::films", {"s3:prefix": ""})
    assert not allows(BUCKET, "s3:ListBucket", "arn:aws:s3:::films")
    assert not allows(BUCKET, "s3:ListBucket", "arn:aws:s3:::other", {"s3:prefix": "cxr/"})


@pytest.mark.parametrize("action", ["s3:PutBucketPolicy", "s3:PutObjectAcl", "s3:DeleteBucket", "s3:ListAllMyBuckets"])
def test_the_bucket_itself_cannot_be_changed(action: str) -> None:
    assert not allows(BUCKET, action, "arn:aws:s3:::films", {"s3:prefix": "cxr/"})
    assert not allows(BUCKET, action, "arn:aws:s3:::films/cxr/1", {"s3:prefix": "cxr/"})


def test_the_head_launches_machines_of_its_cluster_as_the_file_has_them() -> None:
    assert allows(LAUNCH, "ec2:RunInstances", f"{EC2}:instance/*", MACHINE)
    assert allows(LAUNCH, "ec2:RunInstances", f"{EC2}:volume/*", {"ec2:Encrypted": "true"})
    parts = (
        "security-group/sg-1",
        "key-pair/cmcgns",
        "network-interface/*",
        "subnet/subnet-1",
        "spot-instances-request/*",
    )
    assert all(allows(LAUNCH, "ec2:RunInstances", f"{EC2}:{part}") for part in parts)
    assert allows(LAUNCH, "ec2:RunInstances", "arn:aws:ec2:us-east-1::image/ami-1")
    assert allows(LAUNCH, "iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/cmcgns-worker", EC2_ITSELF)


@pytest.mark.parametrize(
    "changed",
    [
        {"aws:RequestTag/ray-cluster-name": "another"},
        {"ec2:InstanceType": "p5.48xlarge"},
        {"ec2:MetadataHttpTokens": "optional"},
    ],
)
def test_the_head_launches_no_other_machines(changed: dict[str, str]) -> None:
    assert not allows(LAUNCH, "ec2:RunInstances", f"{EC2}:instance/*", MACHINE | changed)


def test_the_head_cannot_open_what_it_launches_or_give_it_more_rights() -> None:
    assert not allows(LAUNCH, "ec2:RunInstances", f"{EC2}:security-group/sg-2")
    assert not allows(LAUNCH, "ec2:RunInstances", f"{EC2}:volume/*", {"ec2:Encrypted": "false"})
    assert not allows(LAUNCH, "ec2:AuthorizeSecurityGroupIngress", f"{EC2}:security-group/sg-1")
    for role in ("cmcgns-head", "admin"):
        arn = f"arn:aws:iam::{ACCOUNT}:role/{role}"
        assert not allows(LAUNCH, "iam:PassRole", arn, EC2_ITSELF)
    assert not [s for s in LAUNCH["Statement"] if "iam:" in str(s["Action"]) and s["Action"] != "iam:PassRole"]


@pytest.mark.parametrize("action", ["ec2:TerminateInstances", "ec2:CreateTags"])
def test_the_head_changes_only_machines_of_its_cluster(action: str) -> None:
    machine = f"{EC2}:instance/i-1"
    assert allows(LAUNCH, action, machine, {"aws:ResourceTag/ray-cluster-name": "cmcgns"})
    assert not allows(LAUNCH, action, machine, {"aws:ResourceTag/ray-cluster-name": "another"})
    assert not allows(LAUNCH, action, machine)


def test_roles_and_instance_types_are_those_of_the_file(tmp_path: Path) -> None:
    cluster = aws_access.read_cluster(CLUSTER / "gpu.yaml")
    assert set(cluster.policies) == {"cmcgns-head", "cmcgns-worker"}
    assert cluster.instance_types == ("g6.12xlarge", "m7i.4xlarge")
    config = load("gpu")
    config["available_node_types"]["cpu"]["node_config"]["IamInstanceProfile"] = {"Name": "another"}
    (changed := tmp_path / "gpu.yaml").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="cpu has IamInstanceProfile another; that of cluster cmcgns is cmcgns-worker"):
        aws_access.read_cluster(changed)


@pytest.mark.parametrize(
    ("written", "same"),
    [
        ({"Action": "sts:AssumeRole", "Resource": ["b", "a"]}, True),
        ({"Action": "sts:*", "Resource": ["a", "b"]}, False),
        ({"Action": ["sts:AssumeRole"], "Resource": ["a"]}, False),
        ({"Action": ["sts:AssumeRole"], "Resource": ["a", "b"], "Condition": {}}, False),
    ],
)
def test_policies_are_compared_by_what_they_say(written: dict[str, Any], same: bool) -> None:
    ours = {"Action": ["sts:AssumeRole"], "Resource": ["a", "b"]}
    assert (aws_access.normal(written) == aws_access.normal(ours)) == same


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bucket=s3://films", "--ssh-range=198.51.100.7/32"], "'s3://films' is not s3://BUCKET/PREFIX"),
        (["--bucket=s3://films/*", "--ssh-range=198.51.100.7/32"], "'s3://films/*' is not s3://BUCKET/PREFIX"),
        (["--bucket=films/cxr", "--ssh-range=198.51.100.7/32"], "'films/cxr' is not s3://BUCKET/PREFIX"),
        (["--bucket=s3://films/cxr", "--ssh-range=0.0.0.0/0"], "0.0.0.0/0 is too wide; fix at least 16 bits"),
        (["--bucket=s3://films/cxr", "--ssh-range=::/0"], "::/0 is too wide; fix at least 48 bits"),
        (["--bucket=s3://films/cxr", "--ssh-range=198.51.100.7/24"], "198.51.100.7/24 has host bits set"),
        (["--bucket=s3://films/cxr"], "give --bucket and --ssh-range, or --remove"),
    ],
)
def test_wide_ranges_and_whole_buckets_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        aws_access.main([*arguments, f"--file={CLUSTER / 'gpu.yaml'}"])
    assert refused.value.code == 2
    assert said in capsys.readouterr().err
