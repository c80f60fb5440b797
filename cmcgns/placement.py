"""What goes on which nodes: workers packed, the clustering pool off GPU nodes first, data tasks on nodes labelled for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import state  # as Ray Train asks it; there is no public way
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cmcgns.config import Config

ROLE, DATA = "cmcgns.io/role", "data"
"""Label of nodes that are there for data tasks and clustering: `ray start --labels cmcgns.io/role=data`."""


@dataclass(frozen=True)
class Machine:
    """A living node of the cluster."""

    id: str
    name: str
    cpus: float
    gpus: float
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def for_data(self) -> bool:
        return self.labels.get(ROLE) == DATA and self.cpus > 0


def machines() -> list[Machine]:
    """The cluster's living nodes, ordered by name."""
    found = (_machine(node) for node in ray.nodes() if node["Alive"])
    return sorted(found, key=lambda machine: (machine.name, machine.id))


def _machine(node: dict[str, Any]) -> Machine:
    cpus, gpus = (float(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
    return Machine(node["NodeID"], node["NodeManagerHostname"], cpus, gpus, dict(node.get("Labels") or {}))


def most_resources() -> dict[str, float]:
    """What the cluster has, by Ray's names, or may grow to by its autoscaler, where that says so."""
    here = {name: float(amount) for name, amount in ray.cluster_resources().items()}
    grown = state.get_max_resources_from_cluster_config() or {}
    return here | {name: max(float(amount), here.get(name, 0.0)) for name, amount in grown.items()}


def data_machines(nodes: Sequence[Machine]) -> list[Machine]:
    """Those labelled for data; none where data may go anywhere."""
    return [node for node in nodes if node.for_data]


def data_label(nodes: Sequence[Machine]) -> dict[str, str] | None:
    """The label that data tasks ask for; None where no living node has it, and they may go anywhere."""
    return {ROLE: DATA} if data_machines(nodes) else None


def data_resources() -> dict[str, float]:
    """Resources of all nodes where data tasks may go, by Ray's names."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    labelled = [node for node in alive if _machine(node).for_data]
    total: dict[str, float] = {}
    for node in labelled or alive:
        for name, amount in node["Resources"].items():
            total[name] = total.get(name, 0.0) + amount
    return total


def pool_machines(nodes: Sequence[Machine], cpus: float) -> list[Machine]:
    """Where the pool's actors of ``cpus`` each go first: nodes labelled for data, else those without GPUs; none where all are
    alike."""
    fit = [node for node in nodes if node.cpus >= cpus and node.cpus > 0]
    labelled, plain = data_machines(fit), [node for node in fit if not node.gpus]
    return labelled or (plain if len(plain) < len(fit) else [])


def pool_strategies(nodes: Sequence[Machine], actors: int, cpus: float) -> list[Any]:
    """A scheduling strategy for each actor, in turn over the nodes where they go first; soft, so that they outlive their node."""
    first = pool_machines(nodes, cpus)
    if not first:
        return ["DEFAULT"] * actors
    return [NodeAffinitySchedulingStrategy(first[i % len(first)].id, soft=True) for i in range(actors)]


def describe_placement(config: Config, nodes: Sequence[Machine]) -> str:
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
    pool = pool_machines(nodes, config.clustering.cpus_per_actor)
    data = data_machines(nodes)
    return (
        f"{there}; workers on as {'few' if config.train.placement == 'pack' else 'many'} nodes as have room, clustering "
        + (f"on {_names(pool)} first" if pool else "anywhere")
        + ", data tasks "
        + (f"on {_names(data)} alone" if data else "anywhere")
    )


def _names(nodes: Sequence[Machine]) -> str:
    names = sorted({node.name for node in nodes})
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
