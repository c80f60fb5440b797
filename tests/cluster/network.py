"""Kubernetes' decision on a connection, for the parts of a NetworkPolicy that ours use; all policies of a file are in force.

As https://kubernetes.io/docs/concepts/services-networking/network-policies/ has it.
"""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Policy = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod by its labels, or something outside the cluster by its address."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = "films"
    address: str = ""


def connects(policies: list[Policy], source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
    """Whether source may open the port of target, with the policies in namespace ``films``."""
    return _passes(policies, "Egress", source, target, port, protocol) and _passes(
        policies, "Ingress", target, source, port, protocol
    )


def _passes(policies: list[Policy], way: str, own: Pod, other: Pod, port: int, protocol: str) -> bool:
    selecting = [
        policy["spec"] for policy in policies if way in _ways(policy["spec"]) and _selects(policy["spec"], own)
    ]
    rules = [rule for spec in selecting for rule in spec.get(way.lower(), [])]
    return not selecting or any(_admits(rule, way, other, port, protocol) for rule in rules)


def _ways(spec: Policy) -> list[str]:
    return spec.get("policyTypes") or ["Ingress"]


def _selects(spec: Policy, pod: Pod) -> bool:
    return not pod.address and pod.namespace == "films" and _has(pod.labels, spec["podSelector"])


def _admits(rule: dict[str, Any], way: str, other: Pod, port: int, protocol: str) -> bool:
    peers = rule.get("from" if way == "Ingress" else "to")
    ports = rule.get("ports")
    open_port = ports is None or any((p.get("protocol", "TCP"), p["port"]) == (protocol, port) for p in ports)
    return open_port and (not peers or any(_is_peer(peer, other) for peer in peers))


def _is_peer(peer: dict[str, Any], other: Pod) -> bool:
    if "ipBlock" in peer:
        return bool(other.address) and _within(peer["ipBlock"], other.address)
    if other.address:
        return False
    if "namespaceSelector" not in peer:
        in_namespace = other.namespace == "films"
    else:
        in_namespace = _has({"kubernetes.io/metadata.name": other.namespace}, peer["namespaceSelector"])
    return in_namespace and _has(other.labels, peer.get("podSelector", {}))


def _within(block: dict[str, Any], address: str) -> bool:
    def covered(ranges: list[str]) -> bool:
        return any(ipaddress.ip_address(address) in ipaddress.ip_network(text) for text in ranges)

    return covered([block["cidr"]]) and not covered(block.get("except", []))


def _has(labels: dict[str, str], selector: dict[str, Any]) -> bool:
    assert selector.keys() <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def peers(policies: list[Policy]) -> Iterator[dict[str, Any]]:
    """Every peer that the policies name, in and out."""
    for policy in policies:
        for rule in [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]:
            yield from rule.get("from", []) + rule.get("to", [])
