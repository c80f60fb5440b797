"""One Ray Train worker: builds the trainer, runs it and exports the model."""

import contextlib
import logging
import queue
import secrets
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.util import get_current_placement_group

from cmcgns import distributed, storage
from cmcgns.bad_rows import write_bad_rows
from cmcgns.cluster.coordinator import has_failed, log_to_coordinator
from cmcgns.cluster.heartbeat import EXPORT, Heartbeat, mark
from cmcgns.clustering.bank_pool import RayPool
from cmcgns.clustering.online_clustering import Centroids, OnlineClustering
from cmcgns.config import Bank
from cmcgns.data.batch import Batcher
from cmcgns.data.blocks import blocks
from cmcgns.data.order import VALIDATION_EPOCH
from cmcgns.data.record import Block
from cmcgns.data.stream import Stream
from cmcgns.errors import TrainingStoppedError, last_line
from cmcgns.library.runs import EXPORT_SETTINGS, portable_settings
from cmcgns.methods.base import load_method
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.train.banks import Banks
from cmcgns.train.checkpoint import EXPORT_FORMAT, export_model, load_progress
from cmcgns.train.launch import Assignment
from cmcgns.train.metrics import RunLog
from cmcgns.train.resume import checkpoint_damage, keep_best
from cmcgns.train.speed import set_up_torch
from cmcgns.train.steps import BlockSource, Stretch
from cmcgns.train.trainer import Parts, Trainer

logger = logging.getLogger(__name__)
STOP_POLL_S = 1.0
CLOSE_S, CLOSE_POLL_S = 5.0, 0.05
"""Longest wait for a stream to stop: its thread may be waiting for a film."""
BLOCKS_AHEAD = 4
"""Decoded microbatches buffered on each rank's host."""


class RayBlocks:
    """Blocks from Ray Data: rank 0 creates each stretch's dataset and gives every rank its iterator."""

    def __init__(self, train: Stream, valid: Stream, block_size: int) -> None:
        self.train, self.valid, self.block_size = train, valid, block_size
        self.coordinator = train.coordinator
        self.studies, self.at_once = train.studies, train.at_once
        self._prepared: tuple[Stretch, Iterator[Block]] | None = None
        self._started: list[PrefetchedBlocks] = []

    def close(self) -> None:
        """Stop all streams that have started."""
        for blocks_ahead in self._started:
            blocks_ahead.close()

    def prepare(self, stretch: Stretch) -> None:
        self._prepared = stretch, self._open(self.train, *stretch)

    def open(self, stretch: Stretch) -> Iterator[Block]:
        known, ready = self._prepared or (None, None)
        self._prepared = None
        if known == stretch and ready is not None:
            return ready
        if isinstance(ready, PrefetchedBlocks):
            ready.close()  # bad rows came after it was prepared, and it begins elsewhere
        return self._open(self.train, *stretch)

    def open_validation(self) -> Iterator[Block]:
        return self._open(self.valid, VALIDATION_EPOCH, 0, self.valid.studies)

    def _open(self, stream: Stream, epoch: int, position: int, end: int) -> Iterator[Block]:
        if position >= stream.studies:
            return iter(())
        ranks, split = distributed.world_size(), []
        if distributed.rank() == 0:
            split = stream.split(epoch, position, self.block_size, ranks, end)
        own = split[0] if ranks == 1 else self._hand_out(split)
        # rank 0 owns the actor behind all iterators: it must keep them as long as any rank reads
        blocks_ahead = PrefetchedBlocks(blocks(own, stream.config.resize, self.block_size), keep_alive=split)
        self._started = [*(other for other in self._started if other.reading), blocks_ahead]
        return blocks_ahead

    def _hand_out(self, split: list[Any]) -> Any:
        """This rank's iterator, from rank 0."""
        if distributed.rank() == 0:
            # through an actor: pickling the iterators by hand would keep their actor alive forever
            ray.get(self.coordinator.hand_out.remote(split))
        distributed.exchange([0])  # barrier: no rank takes its iterator before rank 0 has stored all
        return ray.get(self.coordinator.take.remote(distributed.rank()))


class PrefetchedBlocks:
    """Reads a few blocks ahead in a thread. The thread starts at once, since an epoch takes seconds to start."""

    def __init__(self, source: Generator[Block], keep_alive: Any) -> None:
        self._ready: queue.Queue[Block | Exception | None] = queue.Queue(maxsize=BLOCKS_AHEAD)
        self._keep_alive = keep_alive
        self._closed = False
        self._thread = threading.Thread(target=self._read, args=(source,), name="blocks-ahead", daemon=True)
        self._thread.start()

    @property
    def reading(self) -> bool:
        """True until everything has been read."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop reading, so that Ray Data ends its tasks; buffered blocks are dropped."""
        self._closed, began = True, time.monotonic()
        while self.reading and time.monotonic() - began < CLOSE_S:
            with contextlib.suppress(queue.Empty):  # makes room, in case the thread waits in put()
                self._ready.get(timeout=CLOSE_POLL_S)

    def _read(self, source: Generator[Block]) -> None:
        try:
            with contextlib.closing(source):
                for block in source:
                    if self._closed:
                        return
                    self._ready.put(block)
            self._ready.put(None)
        except Exception as error:  # raised in __next__
            self._ready.put(error)

    def __iter__(self) -> Iterator[Block]:
        return self

    def __next__(self) -> Block:
        block = self._ready.get()
        if block is None:
            self._ready.put(None)
            raise StopIteration
        if isinstance(block, Exception):
            raise block
        return block


def work(assignment: Assignment) -> None:
    """The train loop of one rank. Errors that a restart can fix are raised; others are reported to the coordinator."""
    log_to_coordinator(assignment.coordinator)
    if has_failed(assignment.coordinator):
        return  # started again after a failure that a restart does not fix
    if distributed.rank() == 0 and (before := ray.get(assignment.coordinator.take_error.remote())):
        logger.warning("the workers are started again: %s", before)
    try:
        with Heartbeat(assignment.coordinator, distributed.rank(), assignment.config.train.hang_timeout_s):
            _train(assignment)
    except Exception as error:
        if storage.is_full_disk(error):
            places = f"{assignment.folder} or {tempfile.gettempdir()} of {ray.util.get_node_ip_address()}"
            ray.get(assignment.coordinator.fail.remote(f"the disk of {places} is full; free some space"))
            raise  # so that the other ranks, which may be waiting in Ray Train, end too
        if isinstance(error, TrainingStoppedError):
            ray.get(assignment.coordinator.fail.remote(str(error)))
        # raises if the coordinator is lost: Ray Train then ends all ranks and starts them again, and they return above
        if ray.get(assignment.coordinator.failure.remote()) is None:
            reason = f"{type(error).__name__}: {last_line(error)}"
            ray.get(assignment.coordinator.report_error.remote(distributed.rank(), reason))
            raise
        dist.destroy_process_group()  # otherwise other ranks would wait for this one


def _train(assignment: Assignment) -> None:
    config, device = assignment.config, ray.train.torch.get_device()
    torch.set_num_threads(assignment.threads)
    set_up_torch(config.train, device)
    if distributed.rank() == 0:
        assignment.coordinator.hold.remote(get_current_placement_group())
    checkpoint = ray.train.get_checkpoint()
    with ExitStack() as stack:
        uri = None if checkpoint is None else check_checkpoint(assignment, checkpoint.path)
        scratch = stack.enter_context(storage.scratch_folder())
        step = 0 if uri is None else load_progress(uri).step
        log = RunLog(assignment.folder, scratch, step, config) if distributed.rank() == 0 else None
        source = RayBlocks(assignment.train, assignment.valid, config.train.microbatch_size)
        stack.callback(source.close)
        parts = build_parts(assignment, source, device, log)
        trainer = Trainer(config, parts, uri)
        if uri is None:
            parts.banks.empty(0)  # the pool may still hold rows that replaced workers pushed
        elif distributed.rank() == 0:
            logger.warning("resuming after step %d of %d", step, assignment.schedule.total)
        assignment.coordinator.mark.remote("training")
        finished = trainer.train()
        if finished and trainer.last_validation is None:
            trainer.validate()  # restarted after the last checkpoint: only validation and export remain
        assignment.coordinator.mark.remote("trained")
        outcome = conclude(assignment, trainer, finished)
        if log is not None:
            log.close()
            ray.get(assignment.coordinator.finish.remote(outcome))


def check_checkpoint(assignment: Assignment, path: str) -> str:
    """URI of the run's checkpoint at ``path``, Ray's word for it; raises on all ranks if it is damaged. Collective.

    Each rank reads a part of it, unless the driver has verified it.
    """
    name = path.rstrip("/").rpartition("/")[2]
    uri = storage.join(assignment.folder, name)
    if name == assignment.verified:
        return uri
    reason = checkpoint_damage(uri, name, (distributed.rank(), distributed.world_size()))
    if any(damaged for (damaged,) in distributed.exchange([int(reason is not None)])):
        raise TrainingStoppedError(
            f"checkpoint {uri} is damaged: {reason or 'in the files of another rank'}. Resume the run: it takes the one before"
        )
    return uri


def build_parts(assignment: Assignment, source: BlockSource, device: torch.device, log: RunLog | None) -> Parts:
    """Everything that the loop needs, built from the assignment."""
    config, stream = assignment.config, assignment.train
    method = load_method(config)

    def model() -> DualEncoder:
        torch.manual_seed(config.train.seed)
        return method.build_model(stream.tokenizer.vocabulary_size)

    def clustering(bank: Bank) -> OnlineClustering:
        assert assignment.pool is not None
        centroids = Centroids(bank.num_clusters, bank.dim, device, config.clustering.momentum * bank.moves)
        return OnlineClustering(config.clustering, centroids, RayPool(assignment.pool, bank.name))

    return Parts(
        method=method,
        build_model=model,
        blocks=source,
        batcher=Batcher(config, stream.tokenizer.pad_id, device, method.views, method.continuations(stream.tokenizer)),
        banks=Banks(method.banks, [clustering(bank) for bank in method.banks], method.statistics),
        schedule=assignment.schedule,
        device=device,
        log=log,
        display=CoordinatorDisplay(assignment.coordinator),
        keep=partial(report_checkpoint, assignment, distributed.broadcast_object(secrets.token_hex(3))),
        stop_requested=StopPoll(assignment.coordinator),
        keep_best=partial(keep_best, assignment.folder),
    )


class CoordinatorDisplay:
    """Sends rank 0's last metrics to the coordinator; the driver shows them."""

    def __init__(self, coordinator: Any) -> None:
        self.coordinator = coordinator

    def update(self, row: dict[str, Any]) -> None:
        if distributed.rank() == 0:
            self.coordinator.update.remote(row)


class StopPoll:
    """Polls the coordinator in the background for a stop request (on rank 0, which passes it on to the other ranks)."""

    def __init__(self, coordinator: Any) -> None:
        self.coordinator = coordinator
        self._requested = threading.Event()
        if distributed.rank() == 0:
            threading.Thread(target=self._poll, name="stop-poll", daemon=True).start()

    def __call__(self) -> bool:
        return self._requested.is_set()

    def _poll(self) -> None:
        waiting = threading.Event()
        while not self._requested.is_set():
            if ray.get(self.coordinator.stop_requested.remote()):
                self._requested.set()
            waiting.wait(STOP_POLL_S)


def report_checkpoint(assignment: Assignment, unique: str, folder: Path, step: int) -> None:
    """Pass this rank's folder to Ray Train, which merges those of all ranks into one checkpoint in the run folder.

    ``unique`` is the same on all ranks and another one each time that workers start: they may reach the same step again.
    """
    if distributed.rank() == 0:
        write_bad_rows(assignment.folder, ray.get(assignment.coordinator.account.remote())["bad_rows"])
    name = f"checkpoint_{step:08d}_of_{distributed.world_size()}_{unique}"
    checkpoint = ray.train.Checkpoint.from_directory(str(folder))
    ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_dir_name=name)


def conclude(assignment: Assignment, trainer: Trainer, finished: bool) -> dict[str, Any]:
    """Outcome of the run, with its export if it has finished (rank 0). Collective."""
    first, config = trainer.banks.first, assignment.config
    outcome: dict[str, Any] = {
        "finished": finished,
        "steps": trainer.progress.step,
        "studies_seen": trainer.progress.studies_seen,
        "clustering_started_at": first.centroids.started_at if first else None,
        "centroids_version": first.centroids.version if first else None,
        "metrics": trainer.last_validation.scores if trainer.last_validation else {},
        "best_stage1": trainer.progress.best,
    }
    # rank 0 alone keeps what all ranks gather
    mark(EXPORT)
    weights = trainer.engine.weights(keep=distributed.rank() == 0) if finished else {}
    if weights:
        outcome["export"] = storage.join(assignment.folder, "export")
        with storage.scratch_folder() as local:
            with torch.device("meta"):  # it takes over the weights: no second copy of them
                model = trainer.method.build_model(assignment.train.tokenizer.vocabulary_size)
            preprocess = {
                "format": EXPORT_FORMAT,
                "resize": config.data.resize,
                "crop": config.data.image_size,
                "channels": 3,
                "range": [-1.0, 1.0],
                "max_tokens": config.data.max_tokens,
                "lower_case": True,
                "report": ["impression", "findings"],
            }
            (local / EXPORT_SETTINGS).write_text(portable_settings(config))
            export_model(local, model, weights, assignment.train.tokenizer, preprocess, trainer.banks.centroids_state())
            storage.upload_folder(local, outcome["export"])
    return outcome
