"""How many trials a cluster has room for at the same time, each with its workers, its pool, and CPUs for its data."""

from dataclasses import dataclass

from cmcgns.config import Config
from cmcgns.data.dataset import DEALING_CPUS
from cmcgns.errors import UserError
from cmcgns.placement import held_bundles, machines
from cmcgns.train.plan import Share, taken_cpus

TRIAL_CPUS = 0.01
"""CPUs of the process by which Tune holds a trial: it waits."""


@dataclass(frozen=True)
class Room:
    """Trials that fit beside each other, and what each one may count on."""

    trials: int
    share: Share


def nodes_of_cluster() -> list[dict[str, float]]:
    """CPUs and GPUs of each living node."""
    return [{"CPU": node.cpus, "GPU": node.gpus} for node in machines()]


def trial_bundles(config: Config) -> list[dict[str, float]]:
    """What one trial holds, piece by piece: each piece has to fit on one node."""
    reading = {"CPU": config.data.cpus_per_task, "GPU": 0.0}
    rest = {"CPU": TRIAL_CPUS + DEALING_CPUS * (config.train.num_workers > 1), "GPU": 0.0}
    return [*held_bundles(config), reading, rest]


def room_for(config: Config, nodes: list[dict[str, float]], most: int) -> Room:
    """How many of at most ``most`` trials fit on ``nodes`` as a whole: so that, while the nodes stay, none waits for another.

    Raises:
        UserError: not even one fits.
    """
    bundles = sorted(trial_bundles(config), key=lambda bundle: (-bundle["GPU"], -bundle["CPU"]))
    free, trials = [dict(node) for node in nodes], 0
    while trials < most and _place(bundles, free):
        trials += 1
    cpus = sum(node["CPU"] for node in nodes)
    if not trials:
        needed = {name: sum(bundle[name] for bundle in bundles) for name in ("CPU", "GPU")}
        machines = ", ".join(f"{node['CPU']:g} CPUs and {node['GPU']:g} GPUs" for node in nodes)
        raise UserError(
            f"not one trial fits: its {config.train.num_workers} workers, {config.clustering.actors} clustering actors and "
            f"data tasks need {needed['CPU']:g} CPUs and {needed['GPU']:g} GPUs; the cluster has {machines}. Lower "
            "train.num_workers, train.cpus_per_worker, clustering.cpus_per_actor or data.cpus_per_task"
        )
    return Room(trials, Share(cpus, cpus / trials - taken_cpus(config) - TRIAL_CPUS, beside_others=True))


def _place(bundles: list[dict[str, float]], free: list[dict[str, float]]) -> bool:
    """Take all of ``bundles`` out of what is ``free``, each from the first node that has it."""
    for bundle in bundles:
        node = next((node for node in free if all(node[k] + 1e-9 >= bundle[k] for k in bundle)), None)
        if node is None:
            return False
        for name, amount in bundle.items():
            node[name] -= amount
    return True
