"""Makes what cluster/gpu.yaml names on AWS and Ray would make too wide: two roles and a security group.

    python cluster/aws_access.py --bucket=s3://BUCKET/PREFIX --ssh-range=198.51.100.7/32 [--vpc=vpc-...] [--file=cluster/gpu.yaml]
    python cluster/aws_access.py --remove [--file=cluster/gpu.yaml]

The head may launch and end this cluster's machines, of the file's instance types; every machine may use one prefix of one
bucket. Run it again after changing any of these; a new bucket also needs --move-bucket. Whoever runs it needs the right to
make and tag roles and security groups.

Roles are named after the cluster and all that is made bears its tag. What has the name and not the tag, or is not as this
script makes it, is neither used nor removed.
"""

import argparse
import ipaddress
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import boto3
import yaml
from botocore.exceptions import ClientError

POLICIES = Path(__file__).parent / "iam"
WIDEST_SSH = {4: 16, 6: 48}
"""Bits that an SSH range must fix, by version of the protocol."""
OWNER_TAG = "cmcgns-cluster"
"""Tag of all that is made here; its value is REGION/CLUSTER, since roles belong to the account and not to a region."""


@dataclass(frozen=True)
class Cluster:
    """What a cluster file says, and the names that follow from its ``cluster_name``."""

    name: str
    region: str
    key_name: str
    instance_types: tuple[str, ...]

    @property
    def owner(self) -> str:
        """Value of the tag."""
        return f"{self.region}/{self.name}"

    @property
    def tags(self) -> list[dict[str, str]]:
        return [{"Key": OWNER_TAG, "Value": self.owner}]

    @property
    def policies(self) -> dict[str, tuple[str, ...]]:
        """Each role with its policies."""
        return {f"{self.name}-head": ("bucket", "launch"), f"{self.name}-worker": ("bucket",)}


def main(arguments: list[str] | None = None) -> None:
    """Make or remove everything, and say what to write into the cluster file."""
    options = parse(arguments)
    cluster = read_cluster(Path(options.file))
    session = boto3.Session(region_name=cluster.region)
    if options.remove:
        remove(session, cluster)
        return
    vpc = options.vpc or default_vpc(session)
    refuse_what_is_not_ours(session, cluster, vpc, options)
    try:
        group = make_security_group(session, cluster, vpc, options.ssh_range)
        make_roles(session, cluster, policy_names(session, cluster, group, options.bucket))
    except ClientError as problem:
        sys.exit(f"the set-up of {cluster.owner} is incomplete: {problem}; run this again, or with --remove")
    print(f"write into {options.file}: security_groups: &security_groups [{group}]")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked before anything is made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", type=bucket_prefix, help="s3://BUCKET/PREFIX, all that the machines may use")
    parser.add_argument("--move-bucket", action="store_true", help="the cluster exists, and changes to this --bucket")
    parser.add_argument("--ssh-range", type=ssh_range, help="addresses that may open SSH, as 198.51.100.7/32")
    parser.add_argument("--vpc", help="the network of the security group; without it the region's default one")
    parser.add_argument("--file", default="cluster/gpu.yaml")
    parser.add_argument("--remove", action="store_true", help="remove roles and security group")
    options = parser.parse_args(arguments)
    if not options.remove and not (options.bucket and options.ssh_range):
        parser.error("give --bucket and --ssh-range, or --remove")
    return options


def bucket_prefix(uri: str) -> tuple[str, str]:
    """Bucket and prefix; a bucket alone is refused."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    prefix = prefix.strip("/")
    if not uri.startswith("s3://") or not bucket or not prefix or set("*?$") & set(uri):
        raise argparse.ArgumentTypeError(
            f"{uri!r} is not s3://BUCKET/PREFIX; machines get one prefix, not a whole bucket"
        )
    return bucket, prefix


def ssh_range(text: str) -> str:
    """The range, unless it is half the world."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; give the first address and its bits, as 198.51.100.0/24") from None
    if network.prefixlen < WIDEST_SSH[network.version]:
        raise argparse.ArgumentTypeError(f"{text} is too wide; fix at least {WIDEST_SSH[network.version]} bits")
    return str(network)


def read_cluster(file: Path) -> Cluster:
    """The cluster of a file, whose node types must name the roles that are made for it."""
    config = yaml.safe_load(file.read_text())
    name, head, types = config["cluster_name"], config["head_node_type"], config["available_node_types"]
    # the name becomes part of policies, where * would stand for every role and every key
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,49}", name):
        sys.exit(f"{file}: cluster_name {name!r} names roles: use letters, digits and -, 50 at most")
    for node_type, kind in types.items():
        found = kind["node_config"]["IamInstanceProfile"]["Name"]
        wanted = f"{name}-head" if node_type == head else f"{name}-worker"
        if found != wanted:
            sys.exit(
                f"{file}: node type {node_type} has IamInstanceProfile {found}; that of cluster {name} is {wanted}"
            )
    launched = {kind["node_config"]["InstanceType"] for node_type, kind in types.items() if node_type != head}
    provider = config["provider"]
    return Cluster(name, provider["region"], provider["key_pair"]["key_name"], tuple(sorted(launched)))


def default_vpc(session: boto3.Session) -> str:
    """The region's default network, which is where Ray launches machines when no subnet is named."""
    found = session.client("ec2").describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not found:
        sys.exit(f"{session.region_name} has no default network; name one with --vpc")
    return str(found[0]["VpcId"])


def refuse_what_is_not_ours(session: boto3.Session, cluster: Cluster, vpc: str, options: argparse.Namespace) -> None:
    """Exit, before anything is changed, if something there is not as this script makes it; all problems at once."""
    iam = session.client("iam")
    names = policy_names(session, cluster, "sg-", options.bucket)  # the group is not part of what is compared
    problems = group_problems(session, cluster, vpc)
    for role in cluster.policies:
        problems += role_problems(iam, cluster, role, names, options.move_bucket)
        problems += profile_problems(iam, cluster, role)
    if problems:
        sys.exit("\n".join([f"nothing was changed for cluster {cluster.owner}:", *problems]))


def group_problems(session: boto3.Session, cluster: Cluster, vpc: str) -> list[str]:
    """A group of this name without the tag, or the cluster's group in another network."""
    return [
        f"security group {group['GroupId']} {stranger(group, cluster)}"
        if stranger(group, cluster)
        else f"security group {group['GroupId']} of this cluster is in {group['VpcId']}, not in {vpc}: --remove it first"
        for group in security_groups(session, cluster)
        if group["VpcId"] != vpc or stranger(group, cluster)
    ]


def role_problems(iam: Any, cluster: Cluster, role: str, names: dict[str, Any], move_bucket: bool) -> list[str]:
    """How a role that exists differs from what is made here: its owner, trust, policies and bucket."""
    found = get_or_none(iam.get_role, RoleName=role)
    if not found:
        return []
    if said := stranger(found["Role"], cluster):
        return [f"role {role} {said}"]
    problems = []
    trust = found["Role"]["AssumeRolePolicyDocument"]
    if normal(trust) != normal(policy("trust", names)):
        trusted = [statement.get("Principal") for statement in as_list(trust.get("Statement", []))]
        problems.append(f"role {role} trusts {trusted}, not EC2 alone: --remove it first")
    inline = iam.list_role_policies(RoleName=role)["PolicyNames"]
    attached = [p["PolicyArn"] for p in iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]]
    if extra := sorted(set(inline) - set(cluster.policies[role])) + attached:
        problems.append(f"role {role} has policies that are not made here ({', '.join(extra)}): --remove it first")
    if "bucket" in inline and not move_bucket:
        granted = iam.get_role_policy(RoleName=role, PolicyName="bucket")["PolicyDocument"]
        if normal(granted) != normal(policy("bucket", names)):
            problems.append(
                f"role {role} may use {', '.join(objects_of(granted))}, not s3://{names['bucket']}/{names['prefix']}: "
                "add --move-bucket if this cluster moves; a second cluster needs its own cluster_name"
            )
    return problems


def profile_problems(iam: Any, cluster: Cluster, role: str) -> list[str]:
    """How an instance profile that exists differs: its owner, or the role that it gives to machines."""
    found = get_or_none(iam.get_instance_profile, InstanceProfileName=role)
    if not found:
        return []
    if said := stranger(found["InstanceProfile"], cluster):
        return [f"instance profile {role} {said}"]
    others = [held["RoleName"] for held in found["InstanceProfile"]["Roles"] if held["RoleName"] != role]
    return [f"instance profile {role} gives role {other} to machines: --remove it first" for other in others]


def stranger(found: dict[str, Any], cluster: Cluster) -> str:
    """What to say of something that does not bear the cluster's tag; empty if it does."""
    owner = {tag["Key"]: tag["Value"] for tag in found.get("Tags", [])}.get(OWNER_TAG)
    if owner == cluster.owner:
        return ""
    if owner:
        return f"belongs to cluster {owner}: change cluster_name, and the IamInstanceProfile names with it"
    return f"has no tag {OWNER_TAG}: delete it, or if it is this cluster's, tag it {OWNER_TAG}={cluster.owner}"


def objects_of(document: dict[str, Any]) -> list[str]:
    """What a bucket policy grants, as it names it."""
    return sorted({r for s in as_list(document["Statement"]) for r in as_list(s.get("Resource", "other resources"))})


def normal(part: Any) -> Any:
    """A policy without IAM's freedoms: a list of one is its value, and the order of a list says nothing."""
    if isinstance(part, dict):
        return {key: normal(value) for key, value in part.items()}
    if isinstance(part, list):
        members = sorted((normal(member) for member in part), key=lambda member: json.dumps(member, sort_keys=True))
        return members[0] if len(members) == 1 else members
    return part


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def get_or_none(get: Callable[..., dict[str, Any]], **name: str) -> dict[str, Any] | None:
    """IAM's answer, or None if there is nothing of this name."""
    try:
        return get(**name)
    except ClientError as problem:
        if problem.response["Error"]["Code"] == "NoSuchEntity":
            return None
        raise


def security_groups(session: boto3.Session, cluster: Cluster) -> list[dict[str, Any]]:
    """All groups of the region that have the cluster's tag or its name."""
    ec2 = session.client("ec2")
    filters = (
        {"Name": f"tag:{OWNER_TAG}", "Values": [cluster.owner]},
        {"Name": "group-name", "Values": [cluster.name]},
    )
    found = [group for f in filters for group in ec2.describe_security_groups(Filters=[f])["SecurityGroups"]]
    return list({group["GroupId"]: group for group in found}.values())


def make_security_group(session: boto3.Session, cluster: Cluster, vpc: str, allowed: str) -> str:
    """Id of the group: anything among its machines, SSH from ``allowed``, nothing else from outside."""
    ec2 = session.client("ec2")
    group = next(iter(security_groups(session, cluster)), None) or ec2.create_security_group(
        GroupName=cluster.name,
        Description=f"Ray cluster {cluster.name}",
        VpcId=vpc,
        TagSpecifications=[{"ResourceType": "security-group", "Tags": cluster.tags}],
    )
    own = group["GroupId"]
    # what machines say to each other goes on while the rest changes
    among = [rule for rule in group.get("IpPermissions", []) if is_among(rule, own)]
    others = [rule for rule in group.get("IpPermissions", []) if rule not in among]
    if others:
        ec2.revoke_security_group_ingress(GroupId=own, IpPermissions=others)
    ranges = {"Ipv6Ranges": [{"CidrIpv6": allowed}]} if ":" in allowed else {"IpRanges": [{"CidrIp": allowed}]}
    wanted = [{"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, **ranges}]
    if not among:
        wanted.append({"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": own}]})
    ec2.authorize_security_group_ingress(GroupId=own, IpPermissions=wanted)
    return str(own)


def is_among(rule: dict[str, Any], group: str) -> bool:
    """True for the rule that lets a group's machines talk to each other, and nobody else."""
    partners = [pair["GroupId"] for pair in rule.get("UserIdGroupPairs", [])]
    others = any(rule.get(kind) for kind in ("IpRanges", "Ipv6Ranges", "PrefixListIds"))
    return rule["IpProtocol"] == "-1" and partners == [group] and not others


def policy_names(session: boto3.Session, cluster: Cluster, group: str, bucket: tuple[str, str]) -> dict[str, Any]:
    """What stands for each ``$name`` of the policies."""
    return {
        "partition": session.get_partition_for_region(cluster.region),
        "region": cluster.region,
        "account": session.client("sts").get_caller_identity()["Account"],
        "cluster": cluster.name,
        "key_name": cluster.key_name,
        "instance_types": list(cluster.instance_types),
        "security_group": group,
        "bucket": bucket[0],
        "prefix": bucket[1],
    }


def make_roles(session: boto3.Session, cluster: Cluster, names: dict[str, Any]) -> None:
    """Both roles with their instance profiles; policies that a role already has under these names are replaced."""
    iam = session.client("iam")
    for role, policies in cluster.policies.items():
        if not get_or_none(iam.get_role, RoleName=role):
            trust = json.dumps(policy("trust", names))
            iam.create_role(RoleName=role, AssumeRolePolicyDocument=trust, Tags=cluster.tags)
        for name in policies:
            iam.put_role_policy(RoleName=role, PolicyName=name, PolicyDocument=json.dumps(policy(name, names)))
        if not get_or_none(iam.get_instance_profile, InstanceProfileName=role):
            iam.create_instance_profile(InstanceProfileName=role, Tags=cluster.tags)
        if not iam.get_instance_profile(InstanceProfileName=role)["InstanceProfile"]["Roles"]:
            iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)


def policy(name: str, names: dict[str, Any]) -> dict[str, Any]:
    """``iam/NAME.json`` with every ``$name`` filled in."""

    def filled(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: filled(value) for key, value in part.items()}
        if isinstance(part, list):
            return [filled(value) for value in part]
        return names["instance_types"] if part == "$instance_types" else Template(part).substitute(names)

    return filled(json.loads((POLICIES / f"{name}.json").read_text()))


def remove(session: boto3.Session, cluster: Cluster) -> None:
    """Remove all that bears the cluster's tag, part by part; print each, and exit with what stays."""
    if machines := running_machines(session, cluster):
        sys.exit(f"machines of cluster {cluster.owner} still run ({', '.join(machines)}): `ray down` first")
    stays = []
    for part, found, take_away in parts(session, cluster):
        try:
            if said := stranger(found, cluster):
                stays.append(f"{part} stays: it {said}")
                continue
            take_away()
            print(f"removed {part}")
        except ClientError as problem:
            stays.append(f"{part} stays: {problem}")
    by_name = [{"Name": "key-name", "Values": [cluster.key_name]}]
    if session.client("ec2").describe_key_pairs(Filters=by_name)["KeyPairs"]:
        print(f"the key pair stays: aws ec2 delete-key-pair --region={cluster.region} --key-name={cluster.key_name}")
    if stays:
        sys.exit("\n".join(stays))
    print(f"nothing of cluster {cluster.owner} is left")


def running_machines(session: boto3.Session, cluster: Cluster) -> list[str]:
    """Ids of the cluster's machines that have not ended."""
    filters = [
        {"Name": "tag:ray-cluster-name", "Values": [cluster.name]},
        {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped"]},
    ]
    pages = session.client("ec2").get_paginator("describe_instances").paginate(Filters=filters)
    return [i["InstanceId"] for page in pages for r in page["Reservations"] for i in r["Instances"]]


def parts(session: boto3.Session, cluster: Cluster) -> Iterator[tuple[str, dict[str, Any], Callable[[], None]]]:
    """Each part that is there, in the order in which AWS lets them go: name, description with tags, what removes it."""
    ec2, iam = session.client("ec2"), session.client("iam")
    for group in security_groups(session, cluster):
        own = group["GroupId"]
        yield f"security group {own}", group, partial(ec2.delete_security_group, GroupId=own)
    for role in cluster.policies:
        if found := get_or_none(iam.get_instance_profile, InstanceProfileName=role):
            yield f"instance profile {role}", found["InstanceProfile"], partial(remove_profile, iam, role)
        if found := get_or_none(iam.get_role, RoleName=role):
            yield f"role {role}", found["Role"], partial(remove_role, iam, role)


def remove_profile(iam: Any, name: str) -> None:
    for held in iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
        iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=held["RoleName"])
    iam.delete_instance_profile(InstanceProfileName=name)


def remove_role(iam: Any, name: str) -> None:
    for attached in iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]:
        iam.detach_role_policy(RoleName=name, PolicyArn=attached["PolicyArn"])
    for policy_name in iam.list_role_policies(RoleName=name)["PolicyNames"]:
        iam.delete_role_policy(RoleName=name, PolicyName=policy_name)
    iam.delete_role(RoleName=name)


if __name__ == "__main__":
    try:
        main()
    except ClientError as problem:
        sys.exit(str(problem))
