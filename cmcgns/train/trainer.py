"""The training loop of both stages on one rank. It knows nothing of Ray: what it needs comes in through ``Parts``."""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cmcgns import distributed
from cmcgns.clustering.online_clustering import OnlineClustering
from cmcgns.config import Config
from cmcgns.data.batch import Batcher
from cmcgns.methods.cm_cgns.objective import LOSS_TERMS, STATISTICS, Losses, Objective
from cmcgns.models.vision_language import RECONSTRUCTION_PARTS, VisionLanguageModel
from cmcgns.train.checkpoint import (
    Progress,
    load_part,
    load_progress,
    restore_random_state,
    save_checkpoint,
    seed_everything,
)
from cmcgns.train.engine import Engine, State, average_buffers, build_engine
from cmcgns.train.metrics import RunLog, StepMetrics, Stopwatch, TimedIterator
from cmcgns.train.schedule import Schedule
from cmcgns.train.steps import BlockSource, Place, StepData, StepReader, validation_batches
from cmcgns.train.validation import Validation, validate

logger = logging.getLogger(__name__)
MEAN_COSINE = STATISTICS.index("mean_cosine")
COLLAPSED_SPREAD, COLLAPSED_STEPS = 0.05, 100


class TrainingStoppedError(RuntimeError):
    """Training cannot go on, and starting again from the last checkpoint would not help."""


class Display(Protocol):
    """Where rank 0 says how far it is."""

    def update(self, row: dict[str, Any]) -> None:
        """Show the last row of metrics."""


@dataclass
class Parts:
    """What surrounds the loop."""

    build_model: Callable[[], VisionLanguageModel]
    """A whole model with the run's first weights, the same on every rank."""
    blocks: BlockSource
    batcher: Batcher
    guide: OnlineClustering
    schedule: Schedule
    device: torch.device
    log: RunLog | None
    """Rank 0's metrics; None elsewhere."""
    display: Display
    keep: Callable[[Path, int], None]
    """Store a checkpoint folder that every rank has filled, under the step. Collective."""
    stop_requested: Callable[[], bool]


class Trainer:
    """Stage 1, then stage 2 from stage 1's best weights."""

    def __init__(self, config: Config, parts: Parts, checkpoint: Path | None = None) -> None:
        self.config, self.parts = config, parts
        self.objective = Objective(config.objective)
        self.metrics = StepMetrics()
        self.progress = Progress(ranks=distributed.world_size())
        self.best: State = {}
        self.last_validation: Validation | None = None
        self.engine: Engine
        if checkpoint is not None:
            self.progress = load_progress(checkpoint)
        place = Place(self.progress.epoch, self.progress.position)
        accumulation = config.train.global_batch_size // (config.train.microbatch_size * distributed.world_size())
        # before the engine is built: the first films take as long to come
        self.reader = StepReader(parts.blocks, parts.batcher, place, accumulation, parts.stop_requested)
        if checkpoint is None:
            seed_everything(config.train.seed)
            self._build_engine(None)
        else:
            self._resume(checkpoint)
        self.watch, self.finite = Stopwatch(), FiniteWatch(parts.device)

    def train(self) -> bool:
        """Run to the end of the schedule, from wherever the checkpoint left off; False when asked to stop before."""
        while self.progress.step < self.parts.schedule.total:
            stop_requested = self.next_step()
            if stop_requested and self.progress.step < self.parts.schedule.total:
                return False
        return True

    def next_step(self) -> bool:
        """One optimizer step, and what is due after it; True where the user has asked to stop. Collective."""
        schedule, train = self.parts.schedule, self.config.train
        if schedule.stage(self.progress.step + 1) != self.progress.stage:
            self.start_stage2()
        step = self.progress.step + 1
        data = self.reader.next_step()
        self.train_step(step, data)
        self._advance(step, data)
        ends_stage = step in (schedule.stage1, schedule.total)
        if is_due(step, train.log_every) or ends_stage:
            self.write_metrics()
        if is_due(step, train.validate_every) or ends_stage:
            self.validate()
        if is_due(step, train.checkpoint_every) or ends_stage or data.stop_requested:
            self.save()  # collective: every rank enters
        return data.stop_requested

    def train_step(self, step: int, data: StepData) -> None:
        """One optimizer step: forward, objective, backward, then parameters, bank and centroids move."""
        waited_s = self.watch.lap()
        pool_waited_s = self.parts.guide.waited_s
        losses: list[Losses] = []
        for i, batch in enumerate(data.microbatches):
            outputs = self.engine(batch, self.progress.stage == 2)
            losses.append(self.objective(outputs, batch, self.parts.guide.centroids.current))
            self.parts.guide.centroids.observe(losses[-1].attended_nD)
            last = i == len(data.microbatches) - 1
            if last:
                self.finite.start(torch.stack([each.terms for each in losses]))
            self.engine.backward(losses[-1].total, last)
        self.finite.check(step)  # before any weight moves
        self.engine.step(self.learning_rate(step))
        self._guide(step, data, losses)
        step_s = waited_s + self.watch.lap()
        facts = {
            "step": step,
            "stage": self.progress.stage,
            "split": "train",
            "epoch": data.place.epoch,
            "learning_rate": self.learning_rate(step),
            "centroids_version": self.parts.guide.centroids.version,
            "studies_digest": data.studies_digest,
            "studies_per_s": self.config.train.global_batch_size / step_s,
            "data_wait_s": waited_s,
            "pool_wait_s": self.parts.guide.waited_s - pool_waited_s,
            "step_s": step_s,
        }
        self.metrics.record(facts, losses)

    def _guide(self, step: int, data: StepData, losses: list[Losses]) -> None:
        counts = [sum(column) for column in zip(*(batch.rank_sentences for batch in data.microbatches), strict=True)]
        self.parts.guide.push(step, [each.attended_nD for each in losses], counts)
        mean_cosine = torch.stack([each.statistics[MEAN_COSINE] for each in losses]).mean()
        self.parts.guide.refresh(step, self.parts.schedule.warmed_up(step), mean_cosine)

    def learning_rate(self, step: int) -> float:
        """The scheduled rate of ``step``."""
        train = self.config.train
        return self.parts.schedule.learning_rate(step, train.learning_rate, train.warmup_learning_rate)

    def _advance(self, step: int, data: StepData) -> None:
        self.progress.step = step
        self.progress.epoch, self.progress.position = data.place.epoch, data.place.position
        self.progress.studies_seen += self.config.train.global_batch_size

    def write_metrics(self) -> None:
        """Bring the steps since the last call to metrics.jsonl and the display. Collective."""
        rows = self.metrics.rows()
        self._watch_for_collapse(rows)
        if self.parts.log is not None:
            self.parts.log.write(rows)
            if rows:
                self.parts.display.update(rows[-1])
        self.watch.lap()

    def _watch_for_collapse(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            collapsed = min(row["patches_std"], row["attended_std"]) < COLLAPSED_SPREAD
            self.progress.collapsed_steps = self.progress.collapsed_steps + 1 if collapsed else 0
            if self.progress.collapsed_steps == COLLAPSED_STEPS and distributed.rank() == 0:
                name = min(("patches_std", "attended_std"), key=lambda key: row[key])
                logger.warning(
                    "features have collapsed: %s has been under %s for %d steps (%.4f at step %d)",
                    name, COLLAPSED_SPREAD, COLLAPSED_STEPS, row[name], row["step"],
                )  # fmt: skip

    def validate(self) -> None:
        """Score the validation split; in stage 1 remember the best weights. Collective."""
        average_buffers(self.engine.module)
        size = self.config.train.microbatch_size
        batches = TimedIterator(validation_batches(self.parts.blocks, self.parts.batcher, size))
        self.watch.lap()
        stage, centroids = self.progress.stage, self.parts.guide.centroids
        found = validate(self.engine, self.objective, batches, centroids.current, reconstruct=stage == 2)
        self.last_validation = found
        step_s = self.watch.lap()
        facts = {
            "step": self.progress.step,
            "stage": stage,
            "split": "val",
            "centroids_version": centroids.version,
            "studies_per_s": found.scores["studies"] / step_s,
            "data_wait_s": batches.waited_s,
            "step_s": step_s,
        }
        if self.parts.log is not None:
            self.parts.log.write([facts | found.scores])
            if found.picture_1HW is not None:
                self.parts.log.picture("reconstruction", found.picture_1HW, self.progress.step)
        self.parts.display.update(facts | found.scores)
        if stage == 1 and self._is_best(found):
            self.progress.best = {
                "step": self.progress.step,
                "mean_recall": found.mean_recall,
                "loss_global": found.scores["loss_global"],
            }
            self.best = self.engine.weights() | prefixed("centroids.", centroids.state_dict())
        self.watch.lap()

    def _is_best(self, found: Validation) -> bool:
        """Highest mean recall, then lower global loss, then later."""
        best = self.progress.best
        if not best:
            return True
        return (found.mean_recall, -found.scores["loss_global"]) >= (best["mean_recall"], -best["loss_global"])

    def start_stage2(self) -> None:
        """Go on from stage 1's best weights and centroids with an empty bank and a new engine. Collective."""
        self.progress.stage = 2
        guide = self.parts.guide
        guide.empty_bank(self.progress.step)
        guide.centroids.load_state_dict(unprefixed("centroids.", self.best))
        weights = {name: value for name, value in self.best.items() if not name.startswith("centroids.")}
        self._build_engine(weights)
        self.best = {}
        if distributed.rank() == 0:
            logger.info("stage 2 starts from the weights of step %d", self.progress.best["step"])

    def _build_engine(self, weights: State | None) -> None:
        with torch.random.fork_rng():  # the same weights on every rank, and dropout none the wiser
            model = self.parts.build_model()
        if weights is not None:
            model.load_state_dict(weights)
        frozen = RECONSTRUCTION_PARTS if self.progress.stage == 1 else ()
        self.engine = build_engine(model, self.config.train, self.parts.device, frozen)
        self.engine.module.train()

    def save(self) -> None:
        """Write a checkpoint from which any number of ranks can go on. Collective."""
        self.write_metrics()
        average_buffers(self.engine.module)
        parts = {
            "weights": self.engine.weights(),
            "optimizer": self.engine.optimizer_state(),
            "clustering": self.parts.guide.state_dict(self.progress.step),
        }
        if self.best:
            parts["best"] = self.best
        with tempfile.TemporaryDirectory(prefix="cmcgns-checkpoint-") as folder:
            save_checkpoint(Path(folder), self.progress, parts)
            if self.parts.log is not None:
                self.parts.log.sync()
            self.parts.keep(Path(folder), self.progress.step)
        self.watch.lap()

    def _resume(self, folder: Path) -> None:
        saved = self.progress
        self._build_engine(load_part(folder, "weights"))
        self.engine.load_optimizer_state(load_part(folder, "optimizer"))
        self.parts.guide.load_state_dict(load_part(folder, "clustering"), saved.step)
        self.best = load_part(folder, "best")
        if not restore_random_state(folder, saved, self.config.train.seed) and distributed.rank() == 0:
            logger.info(
                "resumed on %d ranks instead of %d: dropout is drawn anew", distributed.world_size(), saved.ranks
            )
        self.progress.ranks = distributed.world_size()


class FiniteWatch:
    """Learns during the backward pass whether every rank's losses are finite, without stalling the device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.host_T = torch.ones(len(LOSS_TERMS), pin_memory=self.on_gpu)
        self.copied = torch.cuda.Event() if self.on_gpu else None

    def start(self, terms_AT: Tensor) -> None:
        """Put the question of all microbatches' ``LOSS_TERMS`` to the device. Collective."""
        finite_T = distributed.all_reduce(torch.isfinite(terms_AT).all(0).float(), dist.ReduceOp.MIN)
        self.host_T.copy_(finite_T, non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    def check(self, step: int) -> None:
        """Raise on every rank alike where a term is not finite. Waits for the forward, while the backward runs."""
        if self.copied is not None:
            self.copied.synchronize()
        bad = [name for name, good in zip(LOSS_TERMS, self.host_T.tolist(), strict=True) if not good]
        if bad:
            raise TrainingStoppedError(
                f"step {step}: {', '.join(bad[1:] or bad)} is not finite; the weights are those of step {step - 1}. "
                "Try a lower train.learning_rate, train.gradient_clip, or fp32"
            )


def is_due(step: int, every: int | None) -> bool:
    """True at every ``every``-th step."""
    return every is not None and step % every == 0


def prefixed(prefix: str, state: State) -> State:
    """``state`` with ``prefix`` before each name."""
    return {prefix + name: value for name, value in state.items()}


def unprefixed(prefix: str, state: State) -> State:
    """The part of ``state`` whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
