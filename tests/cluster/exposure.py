"""What an AWS account exposes: rules for all addresses, policies for all actions or objects."""

import json
from typing import Any

import boto3

WORLD = ("0.0.0.0/0", "::/0")


def open_to_the_world(security_groups: list[str]) -> list[str]:
    """Each inbound rule of the groups that lets any address in, as ``GROUP PROTOCOL PORTS RANGE``."""
    groups = boto3.client("ec2").describe_security_groups(GroupIds=security_groups)["SecurityGroups"]
    return [
        f"{group['GroupId']} {rule['IpProtocol']} {rule.get('FromPort')}-{rule.get('ToPort')} {allowed}"
        for group in groups
        for rule in group["IpPermissions"]
        for allowed in ranges(rule)
        if allowed in WORLD
    ]


def ranges(rule: dict[str, Any]) -> list[str]:
    """All address ranges of a rule."""
    return [r["CidrIp"] for r in rule.get("IpRanges", [])] + [r["CidrIpv6"] for r in rule.get("Ipv6Ranges", [])]


def wide_policies(profile: str) -> list[str]:
    """Each policy of a profile's roles that is not ours, or that grants all actions or all objects."""
    iam = boto3.client("iam")
    found = []
    for role in iam.get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Roles"]:
        name = role["RoleName"]
        found += [p["PolicyName"] for p in iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]]
        for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]:
            document = iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"]
            found += [f"{policy}: {json.dumps(s)}" for s in document["Statement"] if is_wide(s)]
    return found


def is_wide(statement: dict[str, Any]) -> bool:
    """Whether a statement grants actions by a pattern, or more than read access to everything."""
    actions, resources = as_list(statement["Action"]), as_list(statement["Resource"])
    if "NotAction" in statement or "NotResource" in statement or any("*" in action for action in actions):
        return True
    looks = all(action.startswith("ec2:Describe") for action in actions)
    return any(resource == "*" or resource.endswith(":::*") for resource in resources) and not looks


def as_list(value: Any) -> list[Any]:
    """A list; IAM writes a list of one as a bare value."""
    return value if isinstance(value, list) else [value]
