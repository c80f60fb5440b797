"""A short training run by Ray Train on random studies, with the Ray pool and with its in-process twin."""

import json
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cmcgns import distributed
from cmcgns.clustering.bank import PoolHandles, start_pool
from cmcgns.clustering.bank_pool import RayPool
from cmcgns.clustering.online_clustering import LocalPool, Pool
from cmcgns.config import Config
from cmcgns.data.batch import Batcher
from cmcgns.methods.base import load_method
from cmcgns.train.schedule import Schedule
from cmcgns.train.trainer import Parts, Trainer
from tests.clustering.delayed_actor import DelayedActor
from tests.small import banks_of, small_config, small_model
from tests.train.memory import MemoryBlocks

STUDIES = 160


def settings(steps: int, refresh_every: int = 8) -> Config:
    """Two ranks with accumulation, clustering live from the start."""
    return small_config(
        num_workers=2, cpus_per_worker=0.25, microbatch_size=8, global_batch_size=32, stage1_steps=steps, stage2_steps=0,
        zero_stage=2, clustering__actors=3, clustering__iterations=4, clustering__refresh_every=refresh_every,
        objective__num_clusters=16,
    )  # fmt: skip


class Watched(Trainer):
    """Records the centroids of this rank after each step."""

    def train_step(self, step: int, data: Any) -> None:
        super().train_step(step, data)
        centroids = self.parts.banks.first.centroids
        self.seen.append((step, centroids.version, centroids.digest()))

    seen: list[tuple[int, int, str]]


class Rows:
    """Keeps the rows of metrics in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, rows: list[dict[str, Any]]) -> None:
        self.rows += [row for row in rows if row["split"] == "train"]

    def update(self, row: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass


def train_loop(loop: dict[str, Any]) -> None:
    """The same training with the Ray pool, then with its twin; each rank writes its record."""
    config = Config.model_validate(loop["config"])
    torch.set_num_threads(1)
    for name, pool in (("pool", RayPool(loop["pool"], "sentences")), ("twin", LocalPool(config.clustering))):
        found = json.dumps(train(config, pool))
        (Path(loop["folder"]) / f"{name}_{distributed.rank()}.json").write_text(found)
    ray.train.report({})


def train(config: Config, pool: Pool) -> dict[str, Any]:
    device, rows = torch.device("cpu"), Rows()
    parts = Parts(
        build_model=lambda: small_model(config),
        blocks=MemoryBlocks(config, STUDIES),
        batcher=Batcher(config, 0, device),
        banks=banks_of(config, pool),
        method=load_method(config),
        schedule=Schedule(config.train.stage1_steps or 0, 0, 0),
        device=device,
        log=rows,  # type: ignore[arg-type]
        display=rows,
        keep=lambda folder, step: None,
        stop_requested=lambda: False,
    )
    trainer = Watched(config, parts)
    trainer.seen = []
    parts.banks.empty(0)
    trainer.train()
    return {"seen": trainer.seen, "loss": [row["loss"] for row in rows.rows], "waited_s": parts.banks.first.waited_s}


def run(folder: Path, config: Config, shard_type: type[DelayedActor]) -> dict[str, list[dict[str, Any]]]:
    """Records of each rank with the Ray pool, whose last actor is slow, and with the twin."""
    handles = start_pool(config.clustering, shard_type=shard_type)
    check_processes(handles)
    TorchTrainer(
        train_loop,
        train_loop_config={"config": config.model_dump(), "pool": handles, "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.25}),
        run_config=RunConfig(name="pool", storage_path=str(folder)),
        torch_config=TorchConfig(backend="gloo"),
    ).fit()
    handles.stop()
    read = lambda name, rank: json.loads((folder / f"{name}_{rank}.json").read_text())
    return {name: [read(name, rank) for rank in range(2)] for name in ("pool", "twin")}


def check_processes(handles: PoolHandles) -> None:
    """Check that each actor has its own process."""

    def pid(actor: Any) -> int:
        import os

        return os.getpid()

    pids = ray.get([shard.__ray_call__.remote(pid) for shard in handles.shards])
    assert len(set(pids)) == len(handles.shards)
