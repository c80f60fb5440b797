"""Makes what cluster/gpu.yaml names on AWS and Ray would make too wide: two roles and a security group.

    python cluster/aws_access.py --bucket=s3://BUCKET/PREFIX --ssh-range=198.51.100.7/32 [--vpc=vpc-...] [--file=cluster/gpu.yaml]
    python cluster/aws_access.py --remove [--vpc=vpc-...] [--file=cluster/gpu.yaml]

The head may launch and end this cluster's machines, of the file's instance types; every machine may use one prefix of one
bucket. Run it again after changing any of these. Whoever runs it needs the right to make roles and security groups.
"""

import argparse
import ipaddress
import json
import sys
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any

import boto3
import yaml
from botocore.exceptions import ClientError

POLICIES = Path(__file__).parent / "iam"
WIDEST_SSH = {4: 16, 6: 48}
"""Bits that an SSH range must fix, by version of the protocol."""


def main(arguments: list[str] | None = None) -> None:
    """Make or remove everything, and say what to write into the cluster file."""
    options = parse(arguments)
    config = yaml.safe_load(Path(options.file).read_text())
    session = boto3.Session(region_name=config["provider"]["region"])
    vpc = options.vpc or default_vpc(session)
    if options.remove:
        remove(session, config, vpc)
        return
    group = make_security_group(session, config["cluster_name"], vpc, options.ssh_range)
    make_roles(session, policy_names(session, config, group, options.bucket))
    print(f"write into {options.file}: security_groups: &security_groups [{group}]")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked before anything is made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", type=bucket_prefix, help="s3://BUCKET/PREFIX, all that the machines may use")
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


def default_vpc(session: boto3.Session) -> str:
    """The region's default network, which is where Ray launches machines when no subnet is named."""
    found = session.client("ec2").describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not found:
        sys.exit(f"{session.region_name} has no default network; name one with --vpc")
    return str(found[0]["VpcId"])


def make_security_group(session: boto3.Session, name: str, vpc: str, allowed: str) -> str:
    """Id of the group: anything among its machines, SSH from ``allowed``, nothing else from outside."""
    ec2 = session.client("ec2")
    found = find_security_group(session, name, vpc)
    group = found or ec2.create_security_group(GroupName=name, Description=f"Ray cluster {name}", VpcId=vpc)
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


def find_security_group(session: boto3.Session, name: str, vpc: str) -> dict[str, Any] | None:
    """The group as AWS describes it, if there is one."""
    filters = [{"Name": "group-name", "Values": [name]}, {"Name": "vpc-id", "Values": [vpc]}]
    found: list[dict[str, Any]] = session.client("ec2").describe_security_groups(Filters=filters)["SecurityGroups"]
    return found[0] if found else None


def role_names(config: dict[str, Any]) -> tuple[str, str]:
    """Roles of head and workers: those that the file's node types name."""
    types, head = config["available_node_types"], config["head_node_type"]
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in types.items()}
    workers = {profile for name, profile in profiles.items() if name != head}
    if len(workers) != 1:
        sys.exit(f"worker types name different profiles: {', '.join(sorted(workers))}; name one for all")
    return profiles[head], workers.pop()


def policy_names(session: boto3.Session, config: dict[str, Any], group: str, bucket: tuple[str, str]) -> dict[str, Any]:
    """What stands for each ``$name`` of the policies."""
    head, workers = role_names(config)
    types = config["available_node_types"]
    launched = {kind["node_config"]["InstanceType"] for name, kind in types.items() if name != config["head_node_type"]}
    return {
        "partition": session.get_partition_for_region(session.region_name),
        "region": session.region_name,
        "account": session.client("sts").get_caller_identity()["Account"],
        "cluster": config["cluster_name"],
        "key_name": config["provider"]["key_pair"]["key_name"],
        "instance_types": sorted(launched),
        "security_group": group,
        "head_role": head,
        "worker_role": workers,
        "bucket": bucket[0],
        "prefix": bucket[1],
    }


def make_roles(session: boto3.Session, names: dict[str, Any]) -> None:
    """Both roles with their instance profiles; policies that a role already has under these names are replaced."""
    iam = session.client("iam")
    for role, policies in ((names["head_role"], ("bucket", "launch")), (names["worker_role"], ("bucket",))):
        with suppress(iam.exceptions.EntityAlreadyExistsException):
            iam.create_role(RoleName=role, AssumeRolePolicyDocument=json.dumps(policy("trust", names)))
        for name in policies:
            iam.put_role_policy(RoleName=role, PolicyName=name, PolicyDocument=json.dumps(policy(name, names)))
        with suppress(iam.exceptions.EntityAlreadyExistsException):
            iam.create_instance_profile(InstanceProfileName=role)
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


def remove(session: boto3.Session, config: dict[str, Any], vpc: str) -> None:
    """Remove roles, profiles and security group; AWS refuses while machines use the group."""
    group = find_security_group(session, config["cluster_name"], vpc)
    if group:
        session.client("ec2").delete_security_group(GroupId=group["GroupId"])
    iam = session.client("iam")
    for role in role_names(config):
        with suppress(iam.exceptions.NoSuchEntityException):
            for name in iam.list_role_policies(RoleName=role)["PolicyNames"]:
                iam.delete_role_policy(RoleName=role, PolicyName=name)
            iam.remove_role_from_instance_profile(InstanceProfileName=role, RoleName=role)
            iam.delete_instance_profile(InstanceProfileName=role)
            iam.delete_role(RoleName=role)


if __name__ == "__main__":
    try:
        main()
    except ClientError as problem:
        sys.exit(str(problem))
