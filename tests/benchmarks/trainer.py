"""What the trainer costs over a bare DeepSpeed loop of the same model, ZeRO stage and batches: stage 2, one worker.

Both live in one Ray Train worker and take their steps in turn. The trainer has everything that a run has: blocks from
the host, crops, live clustering through a real pool, finite checks, metrics, TensorBoard; only the films lie ready.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.clustering.bank import start_pool
from cmcgns.clustering.bank_pool import RayPool
from cmcgns.config import Config
from cmcgns.data.batch import Batcher
from cmcgns.data.record import Block
from cmcgns.methods.base import load_method
from cmcgns.methods.cm_cgns.model import CmCgnsModel
from cmcgns.train.engine import deepspeed_settings, import_deepspeed
from cmcgns.train.metrics import RunLog
from cmcgns.train.optimizer import build_optimizer
from cmcgns.train.schedule import Schedule
from cmcgns.train.steps import Stretch
from cmcgns.train.trainer import Parts, Trainer
from tests.benchmarks.measure import Line, interleaved, ratio_of_medians, where
from tests.small import banks_of, losses_of
from tests.train.memory import MemoryBlocks, Quiet

MICROBATCH, EVERY, ROUNDS, CACHED = 16, 5, 5, 4
"""Studies of a batch; steps of a round, which holds one logging and one re-clustering; rounds; distinct batches."""
VOCABULARY, THREADS = 8192, 2
MOST_RATIO = 1.10


def settings(zero_stage: int, encoder: str = "vit-small", image_size: int = 224) -> Config:
    """By default ViT-S/16 at 224 with a small BERT, microbatch 16, one worker, accumulation 1."""
    return Config.model_validate(
        {
            "data": {"image_size": image_size, "resize": image_size + 32},
            "model": {"image_encoder": encoder, "text_encoder": "bert-mini", "vocabulary_size": VOCABULARY, "dropout": 0},
            "objective": {"num_clusters": 128},
            "clustering": {"actors": 1, "cpus_per_actor": 0.1, "refresh_every": EVERY, "bank_size": 8192},
            "train": {
                "num_workers": 1, "microbatch_size": MICROBATCH, "global_batch_size": MICROBATCH, "log_every": EVERY,
                "zero_stage": zero_stage, "stage1_steps": 1, "stage2_steps": 10_000, "warmup_steps": 0,
                "checkpoint_every": 10**6,
            },
        }
    )  # fmt: skip


class CachedBlocks:
    """A few prepared blocks, repeated, at increasing positions."""

    studies = at_once = 10**9

    def __init__(self, config: Config) -> None:
        made = MemoryBlocks(config, CACHED * MICROBATCH, validation=MICROBATCH)
        self.blocks, self.validation = list(made.whole()), list(made.open_validation())

    def open(self, stretch: Stretch) -> Iterator[Block]:
        position = stretch.position
        while True:
            for block in self.blocks:
                yield replace(block, positions=block.positions - block.positions[0] + position, dealt_W5=None)
                position += MICROBATCH

    def prepare(self, stretch: Stretch) -> None:
        raise AssertionError("the epoch has no end")

    def open_validation(self) -> Iterator[Block]:
        return iter(self.validation)


class Clock:
    """Seconds spent inside the parts of the trainer, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count the time of ``owner.method`` under ``name``."""
        inner = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            before = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                self.spent[name] += time.perf_counter() - before

        setattr(owner, method, timed)


def build_trainer(config: Config, pool: Any, folder: Path) -> Trainer:
    """A trainer after its first steps in stage 2, with centroids."""
    torch.manual_seed(0)

    def model() -> CmCgnsModel:
        torch.manual_seed(0)
        return load_method(config).build_model(VOCABULARY)

    parts = Parts(
        build_model=model,
        blocks=CachedBlocks(config),
        batcher=Batcher(config, 0, torch.device("cpu")),
        banks=banks_of(config, RayPool(pool, "sentences")),
        method=load_method(config),
        schedule=Schedule(1, 10_000, 0),
        device=torch.device("cpu"),
        log=RunLog(str(folder), folder, 0),
        display=Quiet(),
        keep=lambda folder, step: None,
        stop_requested=lambda: False,
    )
    trainer = Trainer(config, parts)
    parts.banks.empty(0)
    centroids = parts.banks.first.centroids
    centroids.adopt(F.normalize(torch.randn_like(centroids.rows_KD), dim=1), 1, 0)
    trainer.next_step()  # stage 1, its validation and checkpoint
    trainer.next_step()
    return trainer


def build_bare_step(config: Config, trainer: Trainer) -> Callable[[], None]:
    """Forward, losses, backward and step of a separate DeepSpeed engine, on prepared batches."""
    torch.manual_seed(0)
    model = load_method(config).build_model(VOCABULARY)
    deepspeed = import_deepspeed(torch.device("cpu"))
    optimizer = build_optimizer(model, config.train)
    trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_settings(config.train, 1, trained, torch.device("cpu")),
        dist_init_required=False,
    )
    centroids_KD = trainer.parts.banks.first.centroids.rows_KD.clone()
    blocks = trainer.parts.blocks.blocks  # type: ignore[attr-defined]
    batches = [trainer.parts.batcher(block, (int(block.sentence_counts.sum()),), True) for block in blocks]

    def step() -> None:
        batch = batches.pop(0)
        engine.backward(losses_of(config, engine(batch, 2), batch, centroids_KD, stage=2).total)
        engine.step()
        batches.append(batch)

    return step


def watch_parts(trainer: Trainer) -> Clock:
    """A clock on every part of the trainer's step."""
    clock = Clock()
    for owner, method, name in (
        (trainer.reader, "next_step", "data wait"),
        (trainer.engine, "backward", "backward"),
        (trainer.engine, "step", "optimizer"),
        (trainer.banks, "advance", "pool pushes and centroids"),
        (trainer, "write_metrics", "logging"),
    ):
        clock.watch(owner, method, name)
    return clock


def alone(config: Config, trainer: Trainer, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward of the encoders and of the decoder, each measured separately on the trainer's batches."""
    torch.manual_seed(0)
    model = load_method(config).build_model(VOCABULARY)
    block = trainer.parts.blocks.blocks[0]  # type: ignore[attr-defined]
    batch = trainer.parts.batcher(block, (int(block.sentence_counts.sum()),), True)
    text = (
        batch.token_BT, batch.token_mask_BT, batch.sentence_of_token_BT, batch.sentence_mask_BS, batch.by_length_B,
        batch.slice_tokens,
    )  # fmt: skip

    def encoders() -> None:
        outputs = [*model.image_encoder(batch.image_B1HW), *model.text_encoder(*text)]
        torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])

    visible_BPE = torch.randn(MICROBATCH, model.image_encoder.patches, 2 * config.model.embed_dim, requires_grad=True)

    def decoder() -> None:
        rebuilt = model.decoder(visible_BPE)
        rebuilt.backward(torch.ones_like(rebuilt))

    return interleaved({"encoders": encoders, "decoder": decoder}, rounds)


def compare(loop: dict[str, Any]) -> None:
    """The Ray Train loop: both loops in turn, round after round; leaves a JSON file."""
    config = Config.model_validate(loop["config"])
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(config, loop["pool"], Path(scratch))
        bare = build_bare_step(config, trainer)

        def times(step: Callable[[], Any]) -> Callable[[], None]:
            return lambda: [step() for _ in range(EVERY)] and None

        clock = watch_parts(trainer)
        runs = {"trainer": times(trainer.next_step), "bare": times(bare)}
        seconds = interleaved(runs, loop["rounds"], warm_up=1)
        steps = (loop["rounds"] + 1) * EVERY
        spent = {name: total / steps for name, total in clock.spent.items()}
        found = {
            "seconds": {name: [each / EVERY for each in taken] for name, taken in seconds.items()},
            "spent": spent,
            "alone": alone(config, trainer, loop["rounds"]),
            "version": trainer.parts.banks.first.centroids.version,
        }
    assert distributed.world_size() == 1
    Path(loop["output"]).write_text(json.dumps(found))


def measure(config: Config, rounds: int) -> dict[str, Any]:
    """Result of ``compare`` in a Ray Train worker, with a pool of one actor."""
    pool = start_pool(config.clustering)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        TorchTrainer(
            compare,
            train_loop_config={
                "config": config.model_dump(), "pool": pool, "rounds": rounds, "output": str(output),
            },
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name="benchmark", storage_path=folder),
            torch_config=TorchConfig(backend="gloo"),
        ).fit()  # fmt: skip
        pool.stop()
        found: dict[str, Any] = json.loads(output.read_text())
    return found


def describe(config: Config, found: dict[str, Any]) -> list[Line]:
    """The lines of the table for one ZeRO stage."""
    seconds, spent = found["seconds"], found["spent"]
    ratio, step_s = ratio_of_medians(seconds, "trainer", "bare"), mean(seconds["trainer"])
    parts = {name: median(taken) for name, taken in found["alone"].items()}
    small = {name: spent[name] for name in ("optimizer", "pool pushes and centroids", "data wait", "logging")}
    parts |= {"heads and losses": step_s - sum(parts.values()) - sum(small.values())} | small
    name = f"trainer, {config.model.image_encoder} at {config.data.image_size}, ZeRO-{config.train.zero_stage}"
    return [
        Line(f"{name}, a step", f"{median(seconds['trainer']):.3f} s"),
        Line("  the bare DeepSpeed loop", f"{median(seconds['bare']):.3f} s"),
        Line("  ratio of medians", f"{ratio:.3f}", f"<= {MOST_RATIO:.2f}", ratio <= MOST_RATIO),
        *(Line(f"  share of {part}", f"{taken / step_s:.1%}") for part, taken in parts.items()),
    ]


def lines(zero_stages: tuple[int, ...] = (0, 2), rounds: int = ROUNDS) -> list[Line]:
    """The lines of the table, measured in a separate Ray."""
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR")
    try:
        configs = [settings(stage) for stage in zero_stages]
        return [line for config in configs for line in describe(config, measure(config, rounds))]
    finally:
        ray.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 2])
    given = parser.parse_args()
    print(where())
    print(*lines(tuple(given.zero), given.rounds), sep="\n")
