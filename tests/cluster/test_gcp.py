"""cluster/gcp.yaml compared with the fields in Google's description of the Compute API."""

import json
from functools import cache
from importlib.resources import files
from itertools import chain
from typing import Any

import pytest
import yaml

from tests.cluster.files import CLUSTER, load


@cache
def compute_types() -> dict[str, Any]:
    """All types of the Compute API with their fields, from Google's client."""
    document = files("googleapiclient") / "discovery_cache" / "documents" / "compute.v1.json"
    return json.loads(document.read_text())["schemas"]


def problems(value: Any, schema: dict[str, Any], path: str) -> list[str]:
    """Paths at which a value has fields that its type lacks, or the wrong type."""
    schema = compute_types()[schema["$ref"]] if "$ref" in schema else schema
    if "properties" in schema:
        if not isinstance(value, dict):
            return [f"{path}: not an object"]
        known = schema["properties"]
        unknown = [f"{path}.{name}: unknown" for name in value.keys() - known.keys()]
        within = (problems(value[name], known[name], f"{path}.{name}") for name in value.keys() & known.keys())
        return [*unknown, *chain(*within)]
    if schema.get("type") == "array":
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        return [*chain(*(problems(part, schema["items"], f"{path}[{i}]") for i, part in enumerate(value)))]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{path}: {value!r} is none of {', '.join(schema['enum'])}"]
    wanted = {"string": str, "boolean": bool, "integer": int}.get(schema.get("type", ""))
    if schema.get("format") == "int64":
        wanted = int  # a string in JSON; the API takes numbers too
    return [] if wanted is None or isinstance(value, wanted) else [f"{path}: not {schema['type']}"]


def machines() -> dict[str, dict[str, Any]]:
    """Request of each node type to the Compute API."""
    return {name: kind["node_config"] for name, kind in load("gcp")["available_node_types"].items()}


@pytest.mark.parametrize("name", ["head", "gpu-spot", "gpu-on-demand", "cpu"])
def test_google_knows_every_field_of_a_machine(name: str) -> None:
    assert problems(machines()[name], {"$ref": "Instance"}, name) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("diskz", []), ("scheduling", [{"preemptible": True}]), ("scheduling", {"provisioningModel": "CHEAP"})],
)
def test_a_wrong_field_is_found(field: str, value: Any) -> None:
    assert problems(machines()["cpu"] | {field: value}, {"$ref": "Instance"}, "cpu") != []


def test_no_machine_uses_an_account_or_a_key_created_by_ray() -> None:
    for name, machine in machines().items():
        (account,) = machine["serviceAccounts"]
        role = "head" if name == "head" else "worker"
        assert account["email"] == f"cmcgns-{role}@CHANGE.iam.gserviceaccount.com"
        metadata = {item["key"]: item["value"] for item in machine["metadata"]["items"]}
        assert metadata["block-project-ssh-keys"] == "true"
        assert machine["tags"]["items"] == ["cmcgns"]
        assert "networks/default" not in str(machine["networkInterfaces"])
    assert load("gcp")["auth"]["ssh_private_key"]  # without it Ray adds a key to every machine of the project


def test_gpu_machines_do_not_move_and_spot_ones_are_spot() -> None:
    for name, machine in machines().items():
        scheduling = machine.get("scheduling", {})
        assert (scheduling.get("provisioningModel") == "SPOT") == (name == "gpu-spot")
        if name.startswith("gpu"):
            assert scheduling["onHostMaintenance"] == "TERMINATE"


def test_the_heads_role_covers_machines_only() -> None:
    role = yaml.safe_load((CLUSTER / "iam" / "gcp_head.yaml").read_text())
    services, kinds, verbs = zip(*(permission.split(".") for permission in role["includedPermissions"]), strict=True)
    assert set(services) == {"compute"}
    assert set(kinds) == {"disks", "images", "instances", "subnetworks", "zoneOperations"}
    assert not {verb for verb in verbs if "IamPolicy" in verb or "*" in verb}


def test_firewall_rules_name_where_they_let_in_from() -> None:
    text = (CLUSTER / "gcp.yaml").read_text()
    rules = [line for line in text.replace("\\\n#", "").splitlines() if "firewall-rules create" in line]
    assert len(rules) == 2
    assert all("--source-tags=cmcgns" in rule or "--source-ranges=A" in rule for rule in rules)
    assert "0.0.0.0" not in text.replace("--dashboard-host=0.0.0.0", "")
