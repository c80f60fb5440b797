"""The training loop of all stages on one rank. It does not use Ray: everything it needs is in ``Parts``."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from cmcgns import distributed
from cmcgns.cluster.heartbeat import CLUSTERING, COPYING, FILMS, STARTING, WRITING, mark
from cmcgns.config import Config
from cmcgns.data.batch import Batcher, ImageReportBatch
from cmcgns.errors import TrainingStoppedError
from cmcgns.methods.base import Losses, Method
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.train.banks import Banks
from cmcgns.train.checkpoint import (
    CheckpointWriter,
    Contents,
    Progress,
    load_part,
    load_progress,
    load_shard,
    load_weights,
    restore_random_state,
    seed_everything,
    unprefixed,
)
from cmcgns.train.engine import Engine, average_buffers, build_engine
from cmcgns.train.finite import FiniteCheck
from cmcgns.train.global_batch import cached_step
from cmcgns.train.metrics import RunLog, StepMetrics, Stopwatch, TimedIterator
from cmcgns.train.optimizer import MOMENTS
from cmcgns.train.resume import CHECKPOINT_FORMAT, FIRST_SHARDED
from cmcgns.train.schedule import Schedule
from cmcgns.train.shards import State, copied, file_order
from cmcgns.train.steps import BlockSource, Cursor, StepData, StepReader, validation_batches
from cmcgns.train.term_gradients import term_gradients
from cmcgns.train.validation import Validation, validate

logger = logging.getLogger(__name__)
FORWARD = "forward and backward"
COLLAPSED_SPREAD, COLLAPSED_STEPS = 0.05, 100
SKIPS_IN_A_ROW = 50
"""Skipped steps after which a run ends. In fp16 the first few are normal: the loss scale falls from 65,536."""
CENTROIDS = "centroids."
"""Prefix of the centroids in the file of the best weights of earlier versions."""


class Display(Protocol):
    """Shows rank 0's progress."""

    def update(self, row: dict[str, Any]) -> None:
        """Show the last row of metrics."""


@dataclass
class Parts:
    """Everything that the loop needs."""

    method: Method[Any]
    build_model: Callable[[], DualEncoder]
    """A whole model with the run's initial weights, the same on every rank."""
    blocks: BlockSource
    batcher: Batcher
    banks: Banks
    schedule: Schedule
    device: torch.device
    log: RunLog | None
    """Rank 0's metrics; None on other ranks."""
    display: Display
    keep: Callable[[Path, int], None]
    """Store this rank's checkpoint folder of a step. Called in a thread, by every rank: it must not use torch's collectives."""
    stop_requested: Callable[[], bool]
    keep_best: Callable[[int], None] = lambda step: None
    """Keep the stored checkpoint of a step as the best, in place of the one before. Called by rank 0, in the same thread."""


class Trainer:
    """Stage 1, then each later stage from the best weights of the one before."""

    def __init__(self, config: Config, parts: Parts, checkpoint: str | None = None) -> None:
        """``checkpoint``: URI of the one to resume from."""
        self.config, self.parts = config, parts
        self.method, self.banks = parts.method, parts.banks
        self.metrics = StepMetrics(parts.method)
        self.progress = Progress(ranks=distributed.world_size())
        self.best: State = {}
        """This rank's part of the best weights of a stage."""
        self.best_centroids: State = {}
        self._best_step: int | None = None
        """Step of a checkpoint that is the best and may still be being written."""
        self.skips = 0
        self.last_validation: Validation | None = None
        self.engine: Engine
        if checkpoint is not None:
            self.progress = load_progress(checkpoint)
        cursor = Cursor(self.progress.epoch, self.progress.position)
        accumulation = config.train.global_batch_size // (config.train.microbatch_size * distributed.world_size())
        # before the engine is built: reading the first films takes about as long
        self.reader = StepReader(
            parts.blocks, parts.batcher, cursor, accumulation, parts.stop_requested, self._minutes_are_over
        )
        self.saved_at, self.saved_step = time.monotonic(), 0
        if checkpoint is None:
            seed_everything(config.train.seed)
            self._build_engine(None)
        else:
            self._resume(checkpoint)
        self.watch, self.finite = Stopwatch(), FiniteCheck(parts.device)
        self.writer = CheckpointWriter(self._keep)

    def train(self) -> bool:
        """Run the remaining steps of the schedule; False if the user stopped the run before the end."""
        stop_requested = False
        try:
            while self.progress.step < self.parts.schedule.total and not stop_requested:
                stop_requested = self.next_step()
        finally:
            self.writer.wait()
        self._keep_best(self._written_best())
        return self.progress.step == self.parts.schedule.total

    def next_step(self) -> bool:
        """One optimizer step, and logging, validation and checkpoint if due. True if the user has asked to stop. Collective."""
        self.writer.check()
        schedule, train = self.parts.schedule, self.config.train
        stage = schedule.stage(self.progress.step + 1)
        if stage != self.progress.stage:
            self.start_stage(stage)
        step = self.progress.step + 1
        mark(FILMS, step)
        data = self.reader.next_step()
        self.train_step(step, data)
        self._advance(step, data)
        ends_stage = step in schedule.ends
        if is_due(step, train.log_every) or ends_stage:
            self.write_metrics()
        is_best = False
        if is_due(step, train.validate_every) or ends_stage:
            is_best = self.validate() and train.keep_best
        by_clock = data.checkpoint_due and self.saved_step != step - 1  # it was asked for before that one was written
        if is_due(step, train.checkpoint_every) or by_clock or ends_stage or is_best or data.stop_requested:
            self.save(is_best)  # collective: every rank enters
        return data.stop_requested

    def train_step(self, step: int, data: StepData) -> None:
        """One optimizer step: forward, losses, backward, then update of parameters, banks and centroids."""
        waited_s, stage = self.watch.lap(), self.progress.stage
        pool_waited_s = self.banks.waited_s
        if self.config.train.contrast == "global_batch" and len(data.microbatches) > 1:
            losses, batches, gradients = self._global_batch(step, data)
        else:
            losses, batches, gradients = self._microbatches(step, data)
        step_s = waited_s + self.watch.lap()
        if step < self.parts.schedule.total and not data.stop_requested:
            mark(FILMS)
            self.reader.read_ahead()  # a GPU is busy with the backward pass meanwhile
        ahead_s = self.watch.lap()
        self.finite.check(step, self.progress, data)  # before the weights change
        mark("optimizer step")
        self.engine.step(self.learning_rate(step))
        self.phase = FORWARD
        mark(CLUSTERING)
        self.banks.advance(step, self.parts.schedule.warmed_up(step), losses, batches)
        step_s += ahead_s + self.watch.lap()
        facts = {
            "step": step,
            "stage": stage,
            "split": "train",
            "epoch": data.cursor.epoch,
            "learning_rate": self.learning_rate(step),
            **self.banks.facts(),
            "studies_digest": data.studies_digest,
            "studies_per_s": self.config.train.global_batch_size / step_s,
            "data_wait_s": waited_s + ahead_s,
            "pool_wait_s": self.banks.waited_s - pool_waited_s,
            "step_s": step_s,
            **gradients,
        }
        self.metrics.record(facts, losses, self.engine.gradient_norm)

    def _minutes_are_over(self) -> bool:
        minutes = self.config.train.checkpoint_minutes
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def _microbatches(self, step: int, data: StepData) -> tuple[list[Losses], list[ImageReportBatch], dict[str, float]]:
        """Forward, losses and backward of one microbatch after the other. Losses, batches, and gradients by term if asked for."""
        stage = self.progress.stage
        losses: list[Losses] = []
        gradients: dict[str, float] = {}
        for i, batch in enumerate(data.microbatches):
            mark(self.phase)
            outputs = self.engine(batch, stage)
            losses.append(self.method.losses(outputs, batch, self.banks.centroids, stage, step))
            self.banks.observe(losses[-1])
            last = i == len(data.microbatches) - 1
            if last:
                self.finite.start(self.method.terms(stage), torch.stack([each.terms for each in losses]))
                if self.config.train.log_term_gradients and is_due(step, self.config.train.log_every):
                    gradients = term_gradients(self.engine.module, losses[-1].weighted or {"loss": losses[-1].total})
            self.engine.backward(losses[-1].total, last)
        return losses, data.microbatches, gradients

    def _global_batch(self, step: int, data: StepData) -> tuple[list[Losses], list[ImageReportBatch], dict[str, float]]:
        """The same with losses over all microbatches at once; no gradients by term."""
        stage, centroids = self.progress.stage, self.banks.centroids

        def forward(batch: ImageReportBatch) -> Any:
            mark(self.phase)  # of each one: a step of many may take longer than hang_timeout_s
            return self.engine(batch, stage)

        cached = cached_step(
            forward,
            self.engine.backward,
            lambda outputs, batch: self.method.losses(outputs, batch, centroids, stage, step),
            self.engine.module,
            data.microbatches,
        )
        self.banks.observe(cached.losses)
        self.finite.start(self.method.terms(stage), cached.losses.terms.unsqueeze(0))
        cached.backward()
        return [cached.losses], [cached.batch], {}

    def learning_rate(self, step: int) -> float:
        """The scheduled learning rate of ``step``."""
        train = self.config.train
        rates = train.learning_rate, train.stage2_learning_rate, train.stage3_learning_rate
        peak = [rate for rate in rates[: self.parts.schedule.stage(step)] if rate is not None][-1]
        return self.parts.schedule.learning_rate(step, peak, train.warmup_learning_rate)

    def _advance(self, step: int, data: StepData) -> None:
        self.progress.step = step
        self.progress.epoch, self.progress.position = data.cursor.epoch, data.cursor.position
        self.progress.studies_seen += self.config.train.global_batch_size

    def write_metrics(self) -> None:
        """Write the steps since the last call to metrics.jsonl and the display. Collective."""
        mark("metrics")
        rows = self.metrics.rows()
        self._check_collapse(rows)
        if self.parts.log is not None:
            self.parts.log.write(rows)
            if rows:
                self.parts.display.update(rows[-1])
        self._check_skips(rows)  # after the rows are written, since it may end the run
        self.watch.lap()

    def _check_skips(self, rows: list[dict[str, Any]]) -> None:
        """Warn about skipped steps; raise on all ranks after too many in a row."""
        for row in rows:
            self.skips = self.skips + 1 if row["gradient_norm"] is None else 0
            if self.skips == 1 and distributed.rank() == 0:
                logger.warning("step %d: the gradient is not finite; the step was skipped", row["step"])
            if self.skips == SKIPS_IN_A_ROW:
                raise TrainingStoppedError(
                    f"steps {row['step'] - SKIPS_IN_A_ROW + 1} to {row['step']}: the gradient was not finite, so the weights did "
                    "not change. Lower train.learning_rate, or set train.precision to bf16 or fp32"
                )

    def _check_collapse(self, rows: list[dict[str, Any]]) -> None:
        names = self.method.collapse_statistics
        for row in rows if names else []:
            name = min(names, key=lambda each: row[each])
            self.progress.collapsed_steps = self.progress.collapsed_steps + 1 if row[name] < COLLAPSED_SPREAD else 0
            if self.progress.collapsed_steps == COLLAPSED_STEPS and distributed.rank() == 0:
                logger.warning(
                    "features have collapsed: %s has been under %s for %d steps (%.4f at step %d)",
                    name, COLLAPSED_SPREAD, COLLAPSED_STEPS, row[name], row["step"],
                )  # fmt: skip

    def validate(self) -> bool:
        """Score the validation split; keep the best weights for the next stage, if there can be one. Collective.

        True if no earlier validation of the stage ranks higher."""
        average_buffers(self.engine.module)
        size = self.config.train.microbatch_size
        batches = TimedIterator(validation_batches(self.parts.blocks, self.parts.batcher, size))
        self.watch.lap()
        mark("validation")
        stage = self.progress.stage
        validation = validate(self.engine, self.method, batches, self.banks.centroids, stage, self.progress.step)
        self.last_validation = validation
        step_s = self.watch.lap()
        facts = {
            "step": self.progress.step,
            "stage": stage,
            "split": "val",
            **self.banks.facts(),
            "studies_per_s": validation.scores["studies"] / step_s,
            "data_wait_s": batches.waited_s,
            "step_s": step_s,
        }
        if self.parts.log is not None:
            self.parts.log.write([facts | validation.scores])
            if validation.picture_1HW is not None:
                self.parts.log.picture("reconstruction", validation.picture_1HW, self.progress.step)
        self.parts.display.update(facts | validation.scores)
        is_best = self._is_best(validation)
        if is_best and (stage == 1 or stage < self.parts.schedule.last_stage):
            self.progress.best = {name: value for name, value in self.progress.best_of_stage.items() if name != "stage"}
            self.best, self.best_centroids = copied(self.engine.weights_shard()), self.banks.centroids_state()
        self.watch.lap()
        return is_best

    def _is_best(self, validation: Validation) -> bool:
        """True, and recorded, if no earlier validation of the stage ranks higher; the later one wins a tie."""
        numbers = validation.scores | {"mean_recall": validation.mean_recall}
        here = {name.lstrip("-"): numbers[name.lstrip("-")] for name in self.method.ranked_by}
        stage, before = self.progress.stage, self.progress.best_of_stage
        if before.get("stage") == stage and self._rank(here) < self._rank(before):
            return False
        self.progress.best_of_stage = {"stage": stage, "step": self.progress.step, **here}
        return True

    def _rank(self, numbers: dict[str, float]) -> list[float]:
        return [-numbers[name[1:]] if name.startswith("-") else numbers[name] for name in self.method.ranked_by]

    def start_stage(self, stage: int) -> None:
        """Continue from the last stage's best weights and centroids with empty banks and a new engine. Collective."""
        mark(STARTING)
        self.progress.stage = stage
        self.banks.empty(self.progress.step)
        self.banks.load_centroids(self.best_centroids)
        self.engine.close()  # otherwise its averages stay in memory
        self._build_engine(self.best)
        self.best, self.best_centroids = {}, {}
        if distributed.rank() == 0:
            logger.info("stage %d starts from the weights of step %d", stage, self.progress.best["step"])
        if stage < self.parts.schedule.last_stage:
            self.progress.best = {}

    def _build_engine(self, weights: State | None) -> None:
        """A new engine, with initial weights or with those of which each rank passes its part. Collective."""
        with torch.random.fork_rng():  # the same weights on every rank, without consuming dropout RNG
            model = self.parts.build_model()
        if weights is not None:
            load_weights(model, weights)
        self.sizes = {name: value.numel() for name, value in model.state_dict().items()}
        frozen = self.method.frozen(self.progress.stage)
        new_parts = self.method.frozen(1) if self.progress.stage == 2 else None
        self.engine = build_engine(model, self.config.train, self.parts.device, frozen, new_parts)
        self.engine.module.train()
        self.phase = STARTING if self.config.train.compile else FORWARD  # the first step compiles, for minutes

    def save(self, is_best: bool = False) -> None:
        """Begin to write a checkpoint from which any number of ranks can resume; training goes on meanwhile. Collective."""
        self.write_metrics()
        mark(WRITING)
        self.writer.wait()  # before the state is copied: two copies would take twice the memory
        self._best_to_keep = self._written_best()
        self._best_step = self.progress.step if is_best else None
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step
        mark(COPYING)
        average_buffers(self.engine.module)
        averages = {f"{moment}.{name}": size for name, size in self.sizes.items() for moment in MOMENTS}
        whole = {"clustering": self.banks.state_dict(self.progress.step), "best_centroids": self.best_centroids}
        contents = Contents(
            {"best": self.best} if self.best else {},
            self.sizes | averages,
            {name: state for name, state in whole.items() if state},
            {
                "weights": file_order(self.engine.weights_shard()),
                "optimizer": file_order(self.engine.optimizer_state()),
            },
        )
        self.writer.start(self.progress, contents)
        self.watch.lap()

    def _keep(self, folder: Path, step: int) -> None:
        """In the writer's thread: metrics are stored first, so that those of a checkpoint's steps are always there."""
        if self.parts.log is not None:
            self.parts.log.sync()
        self._keep_best(self._best_to_keep)  # before Ray Train is told of another one and deletes it
        self.parts.keep(folder, step)

    def _written_best(self) -> int | None:
        """Step of a new best checkpoint that every rank has written, for rank 0 to keep. Collective."""
        step, self._best_step = self._best_step, None
        if step is not None:
            distributed.exchange([0])  # barrier: every rank has waited for its writer
        return step if distributed.rank() == 0 else None

    def _keep_best(self, step: int | None) -> None:
        if step is not None:
            self.parts.keep_best(step)

    def _resume(self, uri: str) -> None:
        saved = self.progress
        self._build_engine(load_shard(uri, "weights", saved))
        self.engine.load_optimizer_state(load_shard(uri, "optimizer", saved))
        self.banks.load_state_dict(load_part(uri, "clustering"), saved.step)
        self.best, self.best_centroids = load_shard(uri, "best", saved), load_part(uri, "best_centroids")
        if saved.format < FIRST_SHARDED:  # both in one file
            self.best_centroids = unprefixed(CENTROIDS, load_part(uri, "best"))
            self.best = {name: part for name, part in self.best.items() if not name.startswith(CENTROIDS)}
            saved.best_of_stage = {"stage": saved.stage, **saved.best} if self.best else {}
        if self.config.train.keep_best and saved.best_of_stage.get("step") == saved.step:
            self._best_step = saved.step  # the run may have ended before it was kept
        if not restore_random_state(uri, saved, self.config.train.seed) and distributed.rank() == 0:
            logger.info(
                "resumed on %d ranks instead of %d: dropout has a new seed", distributed.world_size(), saved.ranks
            )
        self.progress.ranks, self.progress.format = distributed.world_size(), CHECKPOINT_FORMAT


def is_due(step: int, every: int | None) -> bool:
    """True on every ``every``-th step; never if ``every`` is None."""
    return every is not None and step % every == 0
