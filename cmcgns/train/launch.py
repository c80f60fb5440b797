"""Driver code of a pretraining run that needs torch: count parameters, build the workers' assignment, run the workers.

Separate from ``run`` because torch takes seconds to load, and settings errors are reported before that. Transformers take as
long again, and the driver of a sweep's trial does without.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cmcgns import storage
from cmcgns.cluster.coordinator import LOST, WORKER_STARTED
from cmcgns.cluster.group_cleaner import in_own_cluster
from cmcgns.cluster.heartbeat import HangWatch
from cmcgns.clustering.bank import PoolHandles
from cmcgns.config import Config
from cmcgns.data.stream import Stream, stream_split
from cmcgns.data.studies import Studies
from cmcgns.data.tokenizer import ReportTokenizer
from cmcgns.run_folder import RunFolder
from cmcgns.train.run import CpuShare, DataCpus, studies_ahead, threads_per_worker
from cmcgns.train.schedule import Schedule
from cmcgns.train.setup import Pretraining

GROUP_TIMEOUT_S = 1800
"""How long ranks wait for each other at most, for example for rank 0's export or a slow bucket."""


@dataclass(frozen=True)
class Assignment:
    """What the driver sends to every worker: settings, handles and small tables, no torch objects."""

    config: Config
    folder: str
    """URI of the run folder."""
    schedule: Schedule
    train: Stream
    valid: Stream
    pool: PoolHandles | None
    """Clustering actors; None for a method without banks."""
    coordinator: Any
    threads: int
    verified: str | None
    """Name of the checkpoint from which the run resumes, which the driver has verified."""


def count_parameters(config: Config, tokenizer: ReportTokenizer) -> int:
    """Number of parameters of the model. Building it on the meta device also checks that the settings fit together."""
    from cmcgns.methods.base import load_method  # lazy: imports transformers

    with torch.device("meta"):
        model = load_method(config).build_model(tokenizer.vocabulary_size)
    return sum(parameter.numel() for parameter in model.parameters())


def assign(run: Pretraining, pool: PoolHandles | None, coordinator: Any, cpus: CpuShare, workers: int) -> Assignment:
    """The assignment that each of ``workers`` receives."""
    config, corpus = run.config, run.corpus

    def stream(studies: Studies) -> Stream:
        # on a shared cluster a fixed limit: total minus reserved CPUs can be negative after a node is lost
        cpu = {"most_cpus": cpus.data} if cpus.shared_cluster else {"taken_cpus": cpus.all - cpus.data}
        limits = cpu | {"studies_ahead": studies_ahead(config, corpus, cpus.data)}
        labels = config.objective.learned_labels()
        return stream_split(studies, run.tokenizer, config.data, coordinator, **limits, labels=labels)

    train, valid = stream(corpus.train), stream(corpus.valid)
    return Assignment(
        config,
        run.folder.uri,
        run.schedule,
        train,
        valid,
        pool,
        coordinator,
        threads_per_worker(config, workers),
        run.checkpoint,
    )


class Trainer(TorchTrainer):
    """A ``TorchTrainer`` whose lost controller leaves nothing behind."""

    def _create_default_callbacks(self) -> list[Any]:
        return in_own_cluster(super()._create_default_callbacks())


def fit(
    config: Config,
    folder: RunFolder,
    assignment: Assignment,
    workers: int,
    replace_lost: bool,
    look: Callable[[], None] = lambda: None,
) -> tuple[str | None, Exception | None]:
    """Run ``workers`` until they finish. Returns the URI of the last checkpoint, and the error if the run failed.

    ``replace_lost``: lost workers are replaced ``train.max_failures`` times. ``look`` is called twice a second.
    """
    failures = FailureConfig(max_failures=0, max_preemption_failures=0)
    if replace_lost:
        failures = FailureConfig(max_failures=config.train.max_failures)
    filesystem, path = storage.lasting_filesystem(folder.storage)

    # a closure, not train_loop_config: the controller unpickles that too, and would import all model code
    def loop() -> None:
        assignment.coordinator.mark.remote(WORKER_STARTED)
        from cmcgns.train.worker import work  # on the workers

        work(assignment)

    trainer = Trainer(
        loop,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=config.train.use_gpu,
            placement_strategy=config.train.placement.upper(),
            resources_per_worker={"CPU": config.train.cpus_per_worker} | ({"GPU": 1} if config.train.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=failures,
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
        ),
        torch_config=TorchConfig(backend="nccl" if config.train.use_gpu else "gloo", timeout_s=GROUP_TIMEOUT_S),
    )
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(trainer.fit())
        except Exception as error:
            outcome.append(error)

    # in a separate thread: in the main thread Ray Train aborts on Ctrl-C without a checkpoint
    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    watch = HangWatch(assignment.coordinator, workers, config.train.hang_timeout_s)
    cpus = DataCpus(config, workers)
    while thread.is_alive():
        thread.join(timeout=0.5)
        watch.look()
        cpus.look()
        look()
    result = outcome[0]
    if isinstance(result, ray.exceptions.RayActorError):  # lost workers are in the result
        return None, RuntimeError(LOST.format("controller (Ray Train's)"))
    if isinstance(result, Exception):
        return None, result
    return (result.checkpoint.path if result.checkpoint else None), result.error
