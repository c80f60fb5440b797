"""What goes on which nodes: workers packed, the clustering pool off GPU nodes first, data tasks on nodes labelled for them;
and what a cluster has to bring before a run can begin."""

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
"""Label of nodes that are there for data tasks and clustering: `ray start --labels cmcgns.io/role=data`."""
ON_PREM_GROUP = "local.cluster.node"
"""Node group of `ray up` with machines that are there already: it can bring no others."""
FREE_NOW_S = 3.0
"""Room that is there already is given within this; a longer wait is told."""
NODE_START_S = 1800.0
"""How long a machine may take: a spot request, its start, its image, what is installed on it."""


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

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
        """Whether something made it that may make more: `ray up` in a cloud, KubeRay."""
        return self.labels.get("ray.io/node-group", ON_PREM_GROUP) != ON_PREM_GROUP


def list_nodes() -> list[Node]:
    """The cluster's living nodes, ordered by name."""
    found = (_machine(node) for node in ray.nodes() if node["Alive"])
    return sorted(found, key=lambda machine: (machine.name, machine.id))


def _machine(node: dict[str, Any]) -> Node:
    cpus, gpus = (float(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
    return Node(node["NodeID"], node["NodeManagerHostname"], cpus, gpus, dict(node.get("Labels") or {}))


def can_scale_up(nodes: Sequence[Node]) -> bool:
    """Whether an autoscaler may bring more than ``nodes``; to what limit Ray says nowhere."""
    # a launcher's label alone does not say so: KubeRay puts it on clusters of a fixed size too
    return any(node.is_launched for node in nodes) and ray_private.has_autoscaler()


def this_node() -> dict[str, str]:
    """Label selector of the node that this process runs on."""
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def run_bundles(config: Config) -> list[dict[str, float]]:
    """What a run's workers and clustering actors hold, one by one."""
    train, pool = config.train, config.clustering
    workers = bundles(train.num_workers, train.cpus_per_worker, train.use_gpu)
    return [*workers, *bundles(pool.actors, pool.cpus_per_actor, pool.gpus_per_actor)]


def bundles(count: int, cpus: float, gpus: float) -> list[dict[str, float]]:
    """What ``count`` workers or actors of so much hold, one by one, by Ray's names."""
    return [{"CPU": cpus, "GPU": float(gpus)}] * count


def wait_for_resources(
    needed: Sequence[dict[str, float]], say: Callable[[str], None], patience_s: float = NODE_START_S
) -> None:
    """Return once ``needed`` bundles have room at the same time, on machines that an autoscaler brings where they are missing.

    On a cluster without an autoscaler, at once: whoever plans on it refuses what does not fit. ``say`` is told of a wait.

    Raises:
        UserError: the room did not come within ``patience_s``.
    """
    asked = [{name: amount for name, amount in bundle.items() if amount} for bundle in needed]
    asked = [bundle for bundle in asked if bundle]
    if not asked or not can_scale_up(list_nodes()):
        return
    # as a group that is given back when it stands: a demand for a number of machines would outlive this job
    group = placement_group(asked, strategy="PACK")
    try:
        if group.wait(FREE_NOW_S):
            return
        say(f"waiting for its autoscaler: {describe_request(asked)}")
        end = time.monotonic() + patience_s
        while not group.wait(1):  # in short waits: a longer one would keep Ctrl-C waiting
            if time.monotonic() > end:
                raise UserError(
                    f"no room came within {patience_s / 60:.2g} minutes: {describe_request(asked)}. `ray status` says who holds it and what "
                    "the autoscaler waits for; see the most machines that the cluster may have, and quotas"
                )
    finally:
        remove_placement_group(group)


def describe_request(needed: Sequence[dict[str, float]]) -> str:
    """What a job asks for, beside what the cluster has and what of it is free, in words."""
    there, free = ray.cluster_resources(), ray.available_resources()
    return f"the job describe_request {_amount(needed)}; the cluster has {_amount([there])}, of which {_amount([free])} are free"


def _amount(amounts: Sequence[dict[str, float]]) -> str:
    cpus, gpus = (sum(bundle.get(kind, 0.0) for bundle in amounts) for kind in ("CPU", "GPU"))
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


def data_nodes(nodes: Sequence[Node]) -> list[Node]:
    """Those labelled for data; none where data may go anywhere."""
    return [node for node in nodes if node.for_data]


def data_label(nodes: Sequence[Node]) -> dict[str, str] | None:
    """The label that data tasks ask for; None where no living node has it, and they may go anywhere."""
    return {ROLE: DATA} if data_nodes(nodes) else None


def data_resources() -> dict[str, float]:
    """Resources of all nodes where data tasks may go, by Ray's names."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    labelled = [node for node in alive if _machine(node).for_data]
    total: dict[str, float] = {}
    for node in labelled or alive:
        for name, amount in node["Resources"].items():
            total[name] = total.get(name, 0.0) + amount
    return total


def pool_nodes(nodes: Sequence[Node], cpus: float) -> list[Node]:
    """Where the pool's actors of ``cpus`` each go first: nodes labelled for data, else those without GPUs; none where all are
    alike."""
    fit = [node for node in nodes if node.cpus >= cpus and node.cpus > 0]
    labelled, plain = data_nodes(fit), [node for node in fit if not node.gpus]
    return labelled or (plain if len(plain) < len(fit) else [])


def pool_strategies(nodes: Sequence[Node], actors: int, cpus: float) -> list[Any]:
    """A scheduling strategy for each actor, in turn over the nodes where they go first; soft, so that they outlive their node."""
    first = pool_nodes(nodes, cpus)
    if not first:
        return ["DEFAULT"] * actors
    return [NodeAffinitySchedulingStrategy(first[i % len(first)].id, soft=True) for i in range(actors)]


def describe_placement(config: Config, nodes: Sequence[Node]) -> str:
    """Which nodes there are and what goes where, in words."""
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
        f"{there}; workers on as {'few' if config.train.placement == 'pack' else 'many'} nodes as have room, clustering "
        + (f"on {_names(pool)} first" if pool else "anywhere")
        + ", data tasks "
        + (f"on {_names(data)} alone" if data else "anywhere")
    )


def _names(nodes: Sequence[Node]) -> str:
    names = sorted({node.name for node in nodes})
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
