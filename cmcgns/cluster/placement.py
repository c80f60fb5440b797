"""Placement on the nodes of a cluster: workers packed, the clustering pool on CPU nodes first, data tasks on labelled nodes; and
waiting for an autoscaler to add nodes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cmcgns.cluster import ray_private
from cmcgns.config import Config
from cmcgns.errors import UserError

ROLE, DATA = "cmcgns.io/role", "data"
"""Label of nodes for data tasks and clustering only: `ray start --labels cmcgns.io/role=data`."""
ON_PREM_GROUP = "local.cluster.node"
"""Node group that `ray up` gives to existing machines, of which it cannot start more."""
FREE_NOW_S = 3.0
"""Free resources are reserved within this time; a longer wait is logged."""
NODE_START_S = 1800.0
"""Longest time for an autoscaler to add a node: spot request, boot, image, installation."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster that is alive."""

    id: str
    name: str
    cpus: float
    gpus: float
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def for_data(self) -> bool:
        return self.labels.get(ROLE) == DATA and self.cpus > 0

    @property
    def is_launched(self) -> bool:
        """Whether a launcher that can add nodes started it: `ray up` in a cloud, KubeRay."""
        return self.labels.get("ray.io/node-group", ON_PREM_GROUP) != ON_PREM_GROUP


def list_nodes() -> list[Node]:
    """The cluster's nodes that are alive, ordered by name."""
    return sorted((_node(node) for node in ray.nodes() if node["Alive"]), key=lambda node: (node.name, node.id))


def _node(node: dict[str, Any]) -> Node:
    cpus, gpus = (float(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
    return Node(node["NodeID"], node["NodeManagerHostname"], cpus, gpus, dict(node.get("Labels") or {}))


def can_scale_up(nodes: Sequence[Node]) -> bool:
    """Whether an autoscaler may add nodes; Ray does not report its limit."""
    # the label is not enough: KubeRay also sets it on clusters of a fixed size
    return any(node.is_launched for node in nodes) and ray_private.has_autoscaler()


def this_node() -> dict[str, str]:
    """Label selector of the node that this process runs on."""
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def run_bundles(config: Config) -> list[dict[str, float]]:
    """Resources of each of the workers and clustering actors that a run needs at least."""
    train, pool = config.train, config.clustering
    workers = bundles(train.least_workers, train.cpus_per_worker, train.use_gpu)
    return [*workers, *bundles(config.pool_actors, pool.cpus_per_actor, pool.gpus_per_actor)]


def bundles(count: int, cpus: float, gpus: float) -> list[dict[str, float]]:
    """Resources of each of ``count`` equal workers or actors, by Ray's names."""
    return [{"CPU": cpus, "GPU": float(gpus)}] * count


def wait_for_resources(
    needed: Sequence[dict[str, float]], log: Callable[[str], None], timeout_s: float = NODE_START_S
) -> None:
    """Wait until all ``needed`` bundles fit at the same time; an autoscaler adds the nodes. ``log`` gets a line if it takes long.

    Without an autoscaler this returns at once: the caller refuses what does not fit.

    Raises:
        UserError: they do not fit within ``timeout_s``.
    """
    request = [{name: amount for name, amount in bundle.items() if amount} for bundle in needed]
    request = [bundle for bundle in request if bundle]
    if not request or not can_scale_up(list_nodes()):
        return
    # a placement group, removed when it is ready: the SDK's request_resources would outlive this job
    group = placement_group(request, strategy="PACK")
    try:
        if group.wait(FREE_NOW_S):
            return
        log(f"waiting for its autoscaler: {describe_request(request)}")
        end = time.monotonic() + timeout_s
        while not group.wait(1):  # short waits: Ctrl-C has to wait for a longer one
            if time.monotonic() > end:
                raise UserError(
                    f"not enough resources within {timeout_s / 60:.2g} minutes: {describe_request(request)}. `ray status` shows "
                    "who uses them and what the autoscaler waits for; check the cluster's largest size and your quotas"
                )
    finally:
        remove_placement_group(group)


def describe_request(needed: Sequence[dict[str, float]]) -> str:
    """What a job needs, what the cluster has and how much of it is free, as text."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return f"the job needs {_amount(needed)}; the cluster has {_amount([total])}, of which {_amount([free])} are free"


def _amount(amounts: Sequence[dict[str, float]]) -> str:
    cpus, gpus = (sum(bundle.get(kind, 0.0) for bundle in amounts) for kind in ("CPU", "GPU"))
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


def data_nodes(nodes: Sequence[Node]) -> list[Node]:
    """Nodes labelled for data; if there are none, data tasks run anywhere."""
    return [node for node in nodes if node.for_data]


def data_label(nodes: Sequence[Node]) -> dict[str, str] | None:
    """Label selector of data tasks; None if no node has the label."""
    return {ROLE: DATA} if data_nodes(nodes) else None


def data_resources() -> dict[str, float]:
    """Total resources of the nodes that data tasks may use, by Ray's names."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    labelled = [node for node in alive if _node(node).for_data]
    total: dict[str, float] = {}
    for node in labelled or alive:
        for name, amount in node["Resources"].items():
            total[name] = total.get(name, 0.0) + amount
    return total


def pool_nodes(nodes: Sequence[Node], cpus: float) -> list[Node]:
    """Preferred nodes of clustering actors of ``cpus`` each: those labelled for data, else those without GPUs. Empty if all
    nodes are alike."""
    fit = [node for node in nodes if node.cpus >= cpus and node.cpus > 0]
    labelled, plain = data_nodes(fit), [node for node in fit if not node.gpus]
    return labelled or (plain if len(plain) < len(fit) else [])


def pool_strategies(nodes: Sequence[Node], actors: int, cpus: float) -> list[Any]:
    """Scheduling strategy of each actor, round robin over the preferred nodes; soft, so that it survives the loss of a node."""
    first = pool_nodes(nodes, cpus)
    if not first:
        return ["DEFAULT"] * actors
    return [NodeAffinitySchedulingStrategy(first[i % len(first)].id, soft=True) for i in range(actors)]


def describe_placement(config: Config, nodes: Sequence[Node]) -> str:
    """The nodes and what runs on them, as text."""
    kinds: dict[tuple[float, float, bool], int] = {}
    for node in nodes:
        kind = (node.cpus, node.gpus, node.for_data)
        kinds[kind] = kinds.get(kind, 0) + 1
    there = ", ".join(
        f"{count} x {cpus:g} CPUs" + (f" + {gpus:g} GPUs" if gpus else "") + (" for data" if data else "")
        for (cpus, gpus, data), count in kinds.items()
    )
    if len(nodes) < 2:
        return there
    pool = pool_nodes(nodes, config.clustering.cpus_per_actor)
    data = data_nodes(nodes)
    return (
        f"{there}; workers on as {'few' if config.train.placement == 'pack' else 'many'} nodes as possible, clustering "
        + (f"on {_names(pool)} first" if pool else "anywhere")
        + ", data tasks "
        + (f"on {_names(data)} only" if data else "anywhere")
    )


def _names(nodes: Sequence[Node]) -> str:
    names = sorted({node.name for node in nodes})
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
