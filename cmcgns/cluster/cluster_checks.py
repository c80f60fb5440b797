"""Checks of a running cluster: one actor on each node, and comparisons of their answers.

N nodes.
"""

import logging
import socket
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cmcgns.cluster import machine_checks
from cmcgns.cluster.check_results import CheckResult, Level, Requirements
from cmcgns.cluster.gpu_checks import all_reduce_seconds
from cmcgns.cluster.machine_checks import StorageAccess
from cmcgns.errors import cause

GOOD_SKEW_S, MAX_SKEW_S = 1.0, 300.0
"""S3 refuses signatures that are 15 minutes off; a much smaller skew already mixes up the order of log lines."""
SLOW_PAIR = 4.0
"""Warn about a pair that is this many times slower than the median pair."""


class Inspector:
    """Actor that checks its node."""

    def clock(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def versions(self) -> dict[str, str]:
        return machine_checks.versions()

    def check_machine(self, name: str, required: Requirements, gpus: int) -> list[CheckResult]:
        return machine_checks.check_machine(name, required, gpus)

    def data(self, uri: str) -> StorageAccess:
        return machine_checks.check_data(uri)

    def reach(self, uri: str) -> StorageAccess:
        return machine_checks.check_reach(uri)

    def storage(self, uri: str, mark: str, mebibytes: int) -> StorageAccess:
        return machine_checks.check_storage(uri, mark, mebibytes)

    def free_address(self) -> str:
        """Address of this node, as other nodes reach it, with a free port."""
        with closing(socket.socket()) as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def reduce(self, backend: str, address: str, rank: int, mebibytes: int, timeout_s: float) -> float:
        return mebibytes / all_reduce_seconds(backend, f"tcp://{address}", rank, 2, mebibytes, timeout_s)


@dataclass(frozen=True)
class InspectedNode:
    """A node of the cluster and its inspector."""

    name: str
    resources: dict[str, float]
    inspector: Any

    @property
    def gpus(self) -> int:
        return int(self.resources.get("GPU", 0))


def start_inspectors() -> list[InspectedNode]:
    """Start an inspector, which reserves no resources, on each of the cluster's nodes."""
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    names = [node["NodeManagerHostname"] for node in alive]
    # so that it sees all GPUs of the node, not only those that Ray assigns
    variables = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    actor = ray.remote(num_cpus=0, runtime_env={"env_vars": variables})(Inspector)
    return [
        InspectedNode(
            name if names.count(name) == 1 else f"{name}/{node['NodeID'][:6]}",
            node["Resources"],
            actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(),
        )
        for name, node in zip(names, alive, strict=True)
    ]


def collect_answers(requests: Sequence[Any], timeout_s: float) -> list[Any]:
    """Answer of each request, or a ``NoAnswer``."""
    end, found = time.monotonic() + timeout_s, []
    for request in requests:
        try:
            found.append(ray.get(request, timeout=max(end - time.monotonic(), 0.01)))
        except GetTimeoutError:
            found.append(NoAnswer(f"no answer within {timeout_s:g} s"))
        except Exception as error:
            found.append(NoAnswer(cause(error)))
    return found


class NoAnswer(str):
    """Why a node did not answer, as text."""


def node_checks(nodes: Sequence[InspectedNode], expected: int | None) -> Iterator[CheckResult]:
    """Number of nodes and their resources."""
    resources = "; ".join(
        f"{node.name} {node.resources.get('CPU', 0):g} CPU" + (f" {node.gpus} GPU" if node.gpus else "")
        for node in nodes
    )
    if expected is not None and len(nodes) < expected:
        yield CheckResult(
            "failed", "nodes", "cluster", f"{len(nodes)} of {expected}: {resources}",
            "On the missing nodes `ray start` reports why they cannot join (token, version, address, firewall)",
        )  # fmt: skip
    else:
        yield CheckResult("ok", "nodes", "cluster", resources)


def version_checks(nodes: Sequence[InspectedNode], timeout_s: float) -> Iterator[CheckResult]:
    """Versions that differ from the driver's, by node."""
    ours, equal = machine_checks.versions(), 0
    for node, theirs in zip(
        nodes, collect_answers([node.inspector.versions.remote() for node in nodes], timeout_s), strict=True
    ):
        if isinstance(theirs, NoAnswer):
            yield CheckResult(
                "failed", "versions", node.name, f"its processes do not start: {theirs}",
                "Install cmcgns there, or submit with `ray job submit --working-dir .`",
            )  # fmt: skip
            continue
        differ = [
            f"{name} {theirs.get(name, 'missing')} (driver {ours.get(name, 'none')})"
            for name in sorted({*ours, *theirs})
            if ours.get(name) != theirs.get(name)
        ]
        equal += not differ
        if differ:
            yield CheckResult(
                "failed", "versions", node.name, ", ".join(differ), "Use the same image or environment on all nodes"
            )
    if equal == len(nodes):
        shown = ", ".join(f"{name} {ours[name]}" for name in ("python", "ray", "torch", "deepspeed", "cmcgns"))
        yield CheckResult("ok", "versions", "cluster", f"{len(ours)} are equal on {len(nodes)} nodes: {shown}")


def clock_checks(nodes: Sequence[InspectedNode], timeout_s: float) -> Iterator[CheckResult]:
    """Offset of each node's clock from the driver's, to within half the round trip."""
    for node in nodes:
        began = time.time()
        (theirs,) = collect_answers([node.inspector.clock.remote()], timeout_s)
        ended = time.time()
        if isinstance(theirs, NoAnswer):
            yield CheckResult("failed", "clock", node.name, theirs)
            continue
        skew = theirs - (began + ended) / 2
        found = f"{skew:+.3f} s from the driver's, within {(ended - began) / 2:.3f}"
        level: Level = "ok" if abs(skew) <= GOOD_SKEW_S else "warning" if abs(skew) <= MAX_SKEW_S else "failed"
        yield CheckResult(
            level, "clock", node.name, found, "" if level == "ok" else "Run chrony or systemd-timesyncd on it"
        )


def local_checks(nodes: Sequence[InspectedNode], required: Requirements, timeout_s: float) -> Iterator[CheckResult]:
    """Results of ``check_machine`` on each node."""
    requests = [node.inspector.check_machine.remote(node.name, required, node.gpus) for node in nodes]
    for node, lines in zip(nodes, collect_answers(requests, timeout_s), strict=True):
        yield from [CheckResult("failed", "machine", node.name, lines)] if isinstance(lines, NoAnswer) else lines


def token_check(dashboard_url: str) -> CheckResult:
    """Whether the dashboard, which accepts jobs, refuses requests without a token."""
    url = f"http://{dashboard_url}/api/jobs/"
    fix = "Set RAY_AUTH_MODE=token before `ray start` on every node"
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return CheckResult("ok", "token", "cluster", f"{dashboard_url} refuses requests without one")
        return CheckResult("warning", "token", "cluster", f"{dashboard_url} answers {error.code}")
    except OSError as error:
        return CheckResult(
            "warning", "token", "cluster", f"{dashboard_url} does not answer: {error}", "Keep the dashboard on"
        )
    return CheckResult("failed", "token", "cluster", f"anyone who reaches {dashboard_url} can run code here", fix)


def data_checks(nodes: Sequence[InspectedNode], uri: str, timeout_s: float) -> Iterator[CheckResult]:
    """Whether each node finds something at ``uri``."""
    return _uri_checks(nodes, "data.uri", uri, [node.inspector.data.remote(uri) for node in nodes], timeout_s)


def reach_checks(nodes: Sequence[InspectedNode], uri: str, timeout_s: float) -> Iterator[CheckResult]:
    """Whether ``uri`` answers each node, with or without a file there."""
    return _uri_checks(nodes, "storage", uri, [node.inspector.reach.remote(uri) for node in nodes], timeout_s)


def _uri_checks(
    nodes: Sequence[InspectedNode], subject: str, uri: str, requests: Sequence[Any], timeout_s: float
) -> Iterator[CheckResult]:
    reasons = [_failure_reason(access, uri) for access in collect_answers(requests, timeout_s)]
    for node, reason in zip(nodes, reasons, strict=True):
        if reason:
            yield CheckResult("failed", subject, node.name, f"{uri}: {reason}", REACH)
    if not any(reasons):
        yield CheckResult("ok", subject, "cluster", f"{len(nodes)} nodes reach {uri}")


REACH = "Every node must reach it: a shared folder, or s3:// with credentials and a route on each node"


def storage_checks(
    nodes: Sequence[InspectedNode], uri: str, mark: str, mebibytes: int, timeout_s: float
) -> Iterator[CheckResult]:
    """Whether each node reaches the folder of the run folders and sees the driver's file in it, and how fast."""
    requests = [node.inspector.storage.remote(uri, mark, mebibytes) for node in nodes]
    for node, access in zip(nodes, collect_answers(requests, timeout_s), strict=True):
        reason = _failure_reason(access, uri)
        if not reason and not access.sees_driver:
            reason = "the driver's file is not visible there: the folder is not shared"
        if reason:
            yield CheckResult("failed", "run.storage", node.name, f"{uri}: {reason}", REACH)
        else:
            yield CheckResult(
                "ok", "run.storage", node.name,
                f"{uri}: {mebibytes} MiB written at {access.write_mib_s:.0f}, read at {access.read_mib_s:.0f} MiB/s",
            )  # fmt: skip


def _failure_reason(access: Any, uri: str) -> str:
    reason: str = str(access) if isinstance(access, NoAnswer) else access.error
    return reason.removeprefix(f"{uri}: ")  # most reasons start with it


def pair_checks(
    nodes: Sequence[InspectedNode], use_gpu: bool, mebibytes: int, most: int, timeout_s: float
) -> Iterator[CheckResult]:
    """All-reduce speed between two nodes at a time, of all pairs or of the first ``most``."""
    able = [node for node in nodes if node.gpus] if use_gpu else list(nodes)
    backend = "nccl" if use_gpu else "gloo"
    if len(able) < 2:
        return
    speeds: dict[str, float] = {}
    measured = 0
    for pairs in pair_rounds(len(able)):
        if measured >= most:
            break
        measured += len(pairs)
        for (first, second), found in zip(
            pairs, _reduce_pairs(able, pairs, backend, mebibytes, timeout_s), strict=True
        ):
            names = f"{able[first].name} - {able[second].name}"
            if isinstance(found, NoAnswer):
                yield CheckResult(
                    "failed", "all-reduce", names, f"{backend}: {found}",
                    "Open all ports between the nodes; name the network card in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME",
                )  # fmt: skip
            else:
                speeds[names] = found
    if not speeds:
        return
    median = statistics.median(speeds.values())
    for names, speed in speeds.items():
        if speed * SLOW_PAIR < median:
            yield CheckResult("warning", "all-reduce", names, f"{speed:.0f} MiB/s; the median pair has {median:.0f}")
    slowest = min(speeds, key=lambda names: speeds[names])
    yield CheckResult(
        "ok", "all-reduce", "cluster",
        f"{len(speeds)} of {len(able) * (len(able) - 1) // 2} pairs by {backend}, {mebibytes} MiB: median {median:.0f} MiB/s, "
        f"slowest {speeds[slowest]:.0f} ({slowest})",
    )  # fmt: skip


def _reduce_pairs(
    nodes: Sequence[InspectedNode], pairs: Sequence[tuple[int, int]], backend: str, mebibytes: int, timeout_s: float
) -> list[Any]:
    """MiB/s of each pair of a round, measured at the same time, or a ``NoAnswer``."""
    addresses = collect_answers([nodes[first].inspector.free_address.remote() for first, _ in pairs], timeout_s)
    requests, starts = list[Any](), list[int]()
    for (first, second), address in zip(pairs, addresses, strict=True):
        starts.append(len(requests))
        if not isinstance(address, NoAnswer):
            for rank, node in enumerate((first, second)):
                requests.append(nodes[node].inspector.reduce.remote(backend, address, rank, mebibytes, timeout_s))
    # torch times out after timeout_s itself; a node is silent only after that
    found = collect_answers(requests, 2 * timeout_s + 10)
    speeds = []
    for address, start in zip(addresses, starts, strict=True):
        both = [address] if isinstance(address, NoAnswer) else found[start : start + 2]
        failed = next((each for each in both if isinstance(each, NoAnswer)), None)
        speeds.append(failed if failed is not None else min(both))
    return speeds


def dashboard_url() -> str:
    """Host and port of the dashboard of the connected cluster."""
    connection = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)  # already initialised: only returns it
    return str(connection.address_info["webui_url"]).removeprefix("http://")


def pair_rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """All pairs of N nodes, in rounds in which each node has at most one partner (the circle method)."""
    seats = [*range(nodes), *([-1] if nodes % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found
