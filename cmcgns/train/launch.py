"""What the driver of a pretraining run does with torch at hand: it counts the model, tells the workers, and runs them.

Apart from ``run``, since torch and transformers take seconds to load: what is wrong with the settings is told before.
"""

import threading
from typing import Any

import pyarrow as pa
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cmcgns import storage
from cmcgns.clustering.bank_pool import PoolHandles
from cmcgns.config import Config
from cmcgns.data.order import Arrangement
from cmcgns.data.stream import Stream, stream_split
from cmcgns.data.tokenizer import ReportTokenizer
from cmcgns.methods.base import load_method
from cmcgns.run_folder import RunFolder
from cmcgns.train.run import Share, studies_ahead, threads_per_worker
from cmcgns.train.setup import Pretraining
from cmcgns.train.worker import Assignment, work

GROUP_TIMEOUT_S = 1800
"""Longest time that ranks wait for one another: an export or a slow bucket on rank 0."""


def count_parameters(config: Config, tokenizer: ReportTokenizer) -> int:
    """Learnable numbers of the model; building it without memory also proves that the settings fit together."""
    with torch.device("meta"):
        model = load_method(config).build_model(tokenizer.vocabulary_size)
    return sum(parameter.numel() for parameter in model.parameters())


def assign(run: Pretraining, pools: dict[str, PoolHandles], coordinator: Any, cpus: Share) -> Assignment:
    """What every worker is told."""
    config, corpus = run.config, run.corpus

    def stream(studies: pa.Table, arrangement: Arrangement) -> Stream:
        # beside others a bound of its own, not what is left of all: that is less than nothing once a node is lost
        cpu = {"most_cpus": cpus.data} if cpus.beside_others else {"taken_cpus": cpus.all - cpus.data}
        limits = cpu | {"studies_ahead": studies_ahead(config, corpus, cpus.data)}
        return stream_split(corpus.source, studies, arrangement, run.tokenizer, config.data, coordinator, **limits)

    train = stream(corpus.train, corpus.train_arrangement)
    valid = stream(corpus.valid, corpus.valid_arrangement)
    return Assignment(
        config, run.folder.uri, run.schedule, train, valid, pools, coordinator, threads_per_worker(config)
    )


def fit(
    config: Config, folder: RunFolder, assignment: Assignment, beside_others: bool
) -> tuple[str | None, Exception | None]:
    """Run the workers to their end; URI of the last checkpoint, and the error of a failed run.

    A loss is mended ``train.max_failures`` times; ``beside_others`` never, see ``Share``.
    """
    failures = FailureConfig(max_failures=config.train.max_failures)
    if beside_others:
        failures = FailureConfig(max_failures=0, max_preemption_failures=0)
    filesystem, path = storage.filesystem(folder.storage)
    trainer = TorchTrainer(
        # by closure, not as train_loop_config: that is unpickled by the controller too, which would load all of the model's code
        lambda: work(assignment),
        scaling_config=ScalingConfig(
            num_workers=config.train.num_workers,
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

    # in a thread of its own: in the main one Ray Train would answer Ctrl-C by aborting, without a checkpoint
    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.5)
    found = outcome[0]
    if isinstance(found, Exception):
        return None, found
    return (found.checkpoint.path if found.checkpoint else None), found.error
