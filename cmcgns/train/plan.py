"""The plan of a run: what goes where, on how much, and whether the cluster can carry it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from cmcgns.config import Config
from cmcgns.data.dataset import most_ahead
from cmcgns.errors import UserError
from cmcgns.placement import DATA, ROLE, Machine, data_machines, describe_placement
from cmcgns.train.corpus import Corpus
from cmcgns.train.opened import Pretraining


def check_cpus(config: Config) -> None:
    """Refuse what would leave Ray Data without a CPU, with the numbers."""
    train, clustering, there = config.train, config.clustering, ray.cluster_resources()
    taken, cpus, gpus = taken_cpus(config), there.get("CPU", 0.0), there.get("GPU", 0.0)
    if taken > cpus - 1:
        raise UserError(
            f"{train.num_workers} workers of {train.cpus_per_worker} and {clustering.actors} clustering actors of "
            f"{clustering.cpus_per_actor} need {taken:g} CPUs; the cluster has {cpus:g} and one is kept for data. "
            "Lower train.cpus_per_worker or clustering.cpus_per_actor"
        )
    wanted = train.num_workers * train.use_gpu + clustering.actors * clustering.gpus_per_actor
    if wanted > gpus:
        raise UserError(f"workers and clustering need {wanted:g} GPUs; the cluster has {gpus:g}. See train.use_gpu")


def check_data_nodes(config: Config, nodes: Sequence[Machine]) -> None:
    """Refuse nodes labelled for data that the clustering pool fills: data tasks go nowhere else."""
    labelled = data_machines(nodes)
    if labelled and whole_cluster(config, nodes).data < 1:
        clustering = config.clustering
        raise UserError(
            f"the {len(labelled)} nodes labelled {ROLE}={DATA} have {sum(node.cpus for node in labelled):g} CPUs, and "
            f"{clustering.actors} clustering actors of {clustering.cpus_per_actor} leave less than one of them for data. Label "
            "more nodes, or lower clustering.cpus_per_actor"
        )


def taken_cpus(config: Config) -> float:
    """CPUs that workers and pool hold for the whole run."""
    train, clustering = config.train, config.clustering
    return train.num_workers * train.cpus_per_worker + clustering.actors * clustering.cpus_per_actor


@dataclass(frozen=True)
class Share:
    """CPUs of the nodes where data tasks may go, and those of them that a run's data tasks may count on."""

    all: float
    data: float
    beside_others: bool = False
    """Other runs share the cluster: what is not this run's is not left for its data, and after a loss it gives up all that it
    holds instead of waiting for more. Whoever runs it starts it again."""


def whole_cluster(config: Config, nodes: Sequence[Machine]) -> Share:
    """The share of a run that has a cluster of ``nodes`` to itself."""
    labelled = data_machines(nodes)
    cpus = sum(node.cpus for node in labelled or nodes)
    # an estimate: workers without GPUs may be packed onto nodes labelled for data
    taken = config.clustering.actors * config.clustering.cpus_per_actor if labelled else taken_cpus(config)
    return Share(cpus, cpus - taken)


def studies_ahead(config: Config, corpus: Corpus, data_cpus: float) -> int:
    """Decoded studies that may wait for training: ``data.studies_ahead``, or enough to keep both sides busy."""
    data = config.data
    if data.studies_ahead is not None:
        return data.studies_ahead
    decoders = max(int(data_cpus / data.cpus_per_task), 1)
    return most_ahead(corpus.source, data, len(corpus.train), config.train.global_batch_size, decoders)


def threads_per_worker(config: Config) -> int:
    """Torch threads of each worker."""
    if config.train.threads_per_worker is not None:
        return config.train.threads_per_worker
    on_one_machine = min(config.train.num_workers, max(os.cpu_count() or 1, 1))
    return max((os.cpu_count() or 1) // on_one_machine, 1)


def describe_plan(run: Pretraining, parameters: int, nodes: Sequence[Machine]) -> dict[str, str]:
    """What is about to happen, for the user to read before it does."""
    config, folder, corpus, schedule = run.config, run.folder, run.corpus, run.schedule
    train, clustering, filtered = config.train, config.clustering, corpus.index.filtered
    share = whole_cluster(config, nodes)
    ahead = studies_ahead(config, corpus, share.data)
    left_out = ", ".join(f"{count} {reason}" for reason, count in filtered.items()) or "none"
    return {
        "run": f"{folder.uri}{' (resumed)' if folder.resumed else ''}",
        "data": f"{corpus.source.uri} ({corpus.source.format}): {len(corpus.train)} training, {len(corpus.valid)} "
        f"validation studies, about {run.materials.sentences} training sentences; films left out: {left_out}; "
        f"unusable at first sight: {len(corpus.index.bad_rows)}; at most {ahead} studies are "
        "decoded ahead of training",
        "model": f"{config.model.image_encoder} + {config.model.text_encoder}, D {config.model.embed_dim}, "
        f"{parameters / 1e6:.1f} M parameters, {run.tokenizer.vocabulary_size} word pieces",
        "training": f"{train.num_workers} workers x {train.cpus_per_worker:g} CPU"
        f"{' + 1 GPU' if train.use_gpu else f', {threads_per_worker(config)} threads each'}, "
        f"{train.engine} ZeRO-{train.zero_stage}, {train.precision}, "
        f"{train.global_batch_size} studies a step = {train.num_workers} x {train.microbatch_size} x {train.accumulation}",
        "steps": f"{schedule.stage1} + {schedule.stage2}, warm-up {schedule.warmup} each",
        "clustering": f"{config.objective.num_clusters} centroids, {clustering.actors} actors x "
        f"{clustering.cpus_per_actor:g} CPU, bank of {clustering.bank_size}, every {clustering.refresh_every} steps",
        "cluster": f"{describe_placement(config, nodes)}; {share.data:g} CPUs left for data",
    }
