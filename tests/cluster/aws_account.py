"""A new AWS account (moto's) after cluster/aws_access.py, and Ray's steps of launching nodes in it."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.cluster.files import CLUSTER, load
from tests.cluster.moto_server import running_moto
from tests.jobs import REPOSITORY

IMAGE = "ami-0123456789abcdef0"
SSH_RANGE = "198.51.100.0/28"
ACCESS = ("--bucket=s3://films/cxr", f"--ssh-range={SSH_RANGE}")


@dataclass(frozen=True)
class Account:
    """What the access script created, and the cluster file with its values."""

    group: str
    config: dict[str, Any]

    def changed(self) -> dict[str, Any]:
        """A copy of the file's content that a test may change."""
        return copy.deepcopy(self.config)


@contextmanager
def fresh_account(folder: Path, host: str = "127.0.0.1", bare: bool = False) -> Iterator[Account]:
    """A new account for boto3 and Ray in this process and its children."""
    from ray.autoscaler._private.aws.utils import client_cache, resource_cache

    with running_moto(folder, host, bare) as environment, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in (environment | {"HOME": str(folder)}).items():  # Ray writes a key pair into ~/.ssh
            patch.setenv(name, value)
        # boto3 caches a session with its first credentials, and Ray caches clients
        patch.setattr(boto3, "DEFAULT_SESSION", None)
        try:
            yield give_access()
        finally:
            client_cache.cache_clear()
            resource_cache.cache_clear()


def give_access() -> Account:
    """Run the access script as a user does, and put the values that it prints into the file."""
    script = [sys.executable, "cluster/aws_access.py", *ACCESS]
    done = subprocess.run(script, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, check=True)
    group = done.stdout.strip().rpartition("[")[2].rstrip("]")
    assert done.stdout.strip() == f"write into cluster/gpu.yaml: security_groups: &security_groups [{group}]"
    return Account(group, filled(group))


def filled(group: str) -> dict[str, Any]:
    """cluster/gpu.yaml with images and a group instead of CHANGE."""
    text = json.dumps(load("gpu")).replace("ami-CHANGE", IMAGE).replace("sg-CHANGE", group)
    text = text.replace("sha256:CHANGE", "sha256:" + 64 * "0")
    assert "CHANGE" not in text, CLUSTER
    return json.loads(text)


def bootstrapped(config: dict[str, Any]) -> dict[str, Any]:
    """The file as ``ray up`` completes it before it launches anything."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    return AWSNodeProvider.bootstrap_config(prepare_config(config))


def with_detected_resources(config: dict[str, Any]) -> dict[str, Any]:
    """The file, schema checked, with CPUs, GPUs and memory of its instance types from EC2, as ``ray up`` adds them."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(config))
    validate_config(config)
    return config


def launched(config: dict[str, Any], node_type: str) -> dict[str, Any]:
    """EC2's description of one node of a type, with its disks, launched by Ray's node provider; then terminated."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE

    kind = "head" if node_type == config["head_node_type"] else "worker"
    tags = {TAG_RAY_NODE_KIND: kind, TAG_RAY_NODE_NAME: f"ray-cmcgns-{kind}", TAG_RAY_USER_NODE_TYPE: node_type}
    provider, ec2 = AWSNodeProvider(config["provider"], config["cluster_name"]), boto3.client("ec2")
    (instance,) = provider.create_node(config["available_node_types"][node_type]["node_config"], tags, 1)
    found = ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]
    disks = [mapping["Ebs"]["VolumeId"] for mapping in found["BlockDeviceMappings"]]
    found["Volumes"] = ec2.describe_volumes(VolumeIds=disks)["Volumes"]
    provider.terminate_nodes([instance])
    ended = ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]
    assert ended["State"]["Name"] in ("shutting-down", "terminated")
    return found


def role_names() -> set[str]:
    """Roles of the account, without those that every account has."""
    return {role["RoleName"] for role in boto3.client("iam").list_roles()["Roles"]}


def group_ids() -> set[str]:
    """Security groups of the account."""
    return {group["GroupId"] for group in boto3.client("ec2").describe_security_groups()["SecurityGroups"]}
