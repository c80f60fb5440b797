"""Microbatches of each optimizer step on this rank, read while the device computes the step before.

Reading them waits for no other rank: the dealer tells each of the others' blocks, and what only a rank itself can know travels
while the step runs and counts from the next one on.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from cmcgns import distributed
from cmcgns.cluster.heartbeat import FILMS, mark
from cmcgns.data.batch import Batcher, ImageReportBatch, SideStream
from cmcgns.data.record import FACTS, Block, blank_block

STEPS_AHEAD = 40
"""Start reading the next stretch at the latest this many steps before the end of the current one."""
START_S = 8.0
"""Start reading the next stretch this many seconds before it is needed."""
MEASURED_S = 2.0
"""Seconds after which a stretch's speed is trusted: the first studies are already decoded and arrive faster than reading."""


class PrefetchTimer:
    """Decides when to start reading what comes next, from the speed at which the current stretch is read: an epoch, or a part of
    a long one."""

    def __init__(self, end: int, least: int) -> None:
        self._least = least
        self._speed = 0.0
        self.start(end)

    def start(self, end: int) -> None:
        """Reset at the start of a stretch up to position ``end``. The previous speed is used until this one is known; a short
        stretch may end before."""
        self._end = end
        self._speed_before = self._speed
        self._first: tuple[float, int] | None = None

    def is_near(self, position: int) -> bool:
        """True near the end of the stretch, by ``position`` alone: on all ranks at once."""
        return self._end - position <= self._least

    def is_due(self, position: int) -> bool:
        """True if what comes next should be read now; ``position`` is the progress in the epoch."""
        now = time.monotonic()
        # measured from the first call: the start-up time before it says nothing about the speed
        began, first = self._first = self._first or (now, position)
        if now > began:
            self._speed = (position - first) / (now - began)
        speed = self._speed if now - began > MEASURED_S else self._speed_before
        return self.is_near(position) or self._end - position <= speed * START_S


class BlockSource(Protocol):
    """Source of blocks; every rank opens the same stretch. Collective."""

    @property
    def studies(self) -> int:
        """Studies of an epoch's order."""

    @property
    def at_once(self) -> int:
        """Most studies to open at once."""

    def open(self, stretch: "Stretch") -> Iterator[Block]:
        """This rank's blocks of ``stretch``."""

    def prepare(self, stretch: "Stretch") -> None:
        """Start reading ``stretch``, which will soon be opened."""

    def open_validation(self) -> Iterator[Block]:
        """This rank's blocks of the validation split."""


class Stretch(NamedTuple):
    """Positions of an epoch's order that are read at once: all, or in a long epoch a part."""

    epoch: int
    position: int
    end: int


@dataclass
class Cursor:
    """Position in the stream: all studies before ``position`` in ``epoch``'s order have been used."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class StepData:
    """The data of one optimizer step. What a rank asks for reaches all of them with the next step."""

    microbatches: list[ImageReportBatch]
    cursor: Cursor
    """Position in the stream after this step."""
    studies_digest: str
    """Hash of the films of this step on all ranks; it does not depend on their order."""
    stop_requested: bool
    """A rank had a stop request in the step before."""
    checkpoint_due: bool
    """In the step before, by the clock of rank 0."""


class _Read(NamedTuple):
    """A step's data before it is known what the other ranks ask for."""

    microbatches: list[ImageReportBatch]
    cursor: Cursor
    studies_digest: str
    is_near: bool
    """The end of the stretch is near."""


class Wishes(NamedTuple):
    """What ranks ask for in a step."""

    stop: bool = False
    prefetch: bool = False
    checkpoint: bool = False


class StepReader:
    """Reads each step's blocks, over epochs; the last incomplete global batch of an epoch is dropped.

    A long epoch is read by stretches. Where bad rows let one end within a global batch, the next one begins with that batch.
    """

    def __init__(
        self,
        source: BlockSource,
        batcher: Batcher,
        cursor: Cursor,
        accumulation: int,
        stop: Callable[[], bool],
        checkpoint_due: Callable[[], bool] = lambda: False,
    ) -> None:
        self.source, self.batcher, self.cursor = source, batcher, cursor
        self.accumulation, self.stop, self.checkpoint_due = accumulation, stop, checkpoint_due
        self._global_batch = batcher.config.train.global_batch_size
        self._prefetch = PrefetchTimer(source.studies, STEPS_AHEAD * self._global_batch)
        self._sent: Callable[[], list[list[int]]] | None = None
        self._ahead: _Read | None = None
        self._side = SideStream(batcher.device)
        self._stretches = 0
        self._open(cursor, self._stretch(cursor.epoch, cursor.position))

    def _stretch(self, epoch: int, position: int, reached: int = 0) -> Stretch:
        """The stretch from ``position``, of whole global batches; those before it have ``reached`` this position."""
        size, studies = self._global_batch, self.source.studies
        most = max(self.source.at_once // size, 1) * size
        end = position + -(-max(reached - position, 0) // size) * size + most
        # no short one at the end
        return Stretch(epoch, position, studies if end + most // 2 >= studies else end)

    def _open(self, cursor: Cursor, stretch: Stretch) -> None:
        self.cursor, self._current = cursor, stretch
        self._stretches += 1
        self._blocks = self.source.open(stretch)
        self._next_is_prepared = False
        self._prefetch.start(stretch.end)

    def _next(self) -> Stretch:
        """What comes after the current stretch if the rest of it has no bad rows."""
        epoch, _, end = self._current
        if end == self.source.studies:
            return self._stretch(epoch + 1, 0)
        rest = (end - self.cursor.position) // self._global_batch * self._global_batch
        return self._stretch(epoch, self.cursor.position + rest, reached=end)

    def next_step(self) -> StepData:
        """The next step's batches. Collective; opens the next stretch or epoch if this one has no full step left."""
        self.read_ahead()
        assert self._ahead is not None
        read, self._ahead = self._ahead, None
        wishes = self._wishes()
        # once: each bad row after it moves where the next stretch begins, and opening one anew costs seconds
        if (read.is_near or wishes.prefetch) and not self._next_is_prepared:
            self._next_is_prepared = True
            self.source.prepare(self._next())
        batches = [self._side.taken(batch) for batch in read.microbatches]
        return StepData(batches, read.cursor, read.studies_digest, wishes.stop, wishes.checkpoint)

    def read_ahead(self) -> None:
        """Read what ``next_step`` will return, unless it is read already. Collective. To be called while the device computes."""
        empty_epochs = 0
        while self._ahead is None:
            self._ahead = self._read_step()
            if self._ahead is not None:
                return
            epoch, _, end = self._current
            if end < self.source.studies:
                self._open(self.cursor, self._stretch(epoch, self.cursor.position, reached=end))
            else:
                empty_epochs += 1
                if empty_epochs == 2:
                    raise RuntimeError(
                        "an epoch holds less than one global batch of usable studies; lower train.global_batch_size"
                    )
                self._open(Cursor(epoch + 1, 0), self._stretch(epoch + 1, 0))

    def _read_step(self) -> _Read | None:
        """One step's batches, or None if any rank has too few blocks left in this stretch."""
        blocks = [block for _, block in zip(range(self.accumulation), self._blocks, strict=False)]
        facts_AW5 = np.array([dealt_facts(block) for block in blocks])
        size = self.batcher.config.train.microbatch_size
        if len(blocks) < self.accumulation or (facts_AW5[:, :, FACTS.index("studies")] < size).any():
            return None
        sentences_AW, first_AW, last_AW, digest_AW = np.moveaxis(facts_AW5[:, :, 1:], 2, 0)
        check_order(first_AW, last_AW)
        is_near = self._prefetch.is_near(self.cursor.position)
        self.cursor = Cursor(self.cursor.epoch, int(last_AW.max()) + 1)
        with self._side:
            microbatches = [
                self.batcher(block, tuple(sentences_W.tolist()), training=True)
                for block, sentences_W in zip(blocks, sentences_AW, strict=True)
            ]
        digest = int(digest_AW.astype(np.uint64).sum(dtype=np.uint64))
        return _Read(microbatches, self.cursor, f"{digest:016x}", is_near)

    def _wishes(self) -> Wishes:
        """What the ranks asked for in the step before; sends what this one asks for now."""
        before = Wishes()
        if self._sent is not None:
            mark("waiting for the other ranks")
            stop_W, stretch_W, checkpoint_W = np.array(self._sent()).T
            prefetch = (stretch_W == self._stretches).any()  # of the stretch before it would come too late
            before = Wishes(bool(stop_W.any()), bool(prefetch), bool(checkpoint_W[0]))
        prefetch = self._prefetch.is_due(self.cursor.position)
        checkpoint = self.checkpoint_due() and not before.checkpoint  # that one is written after this step
        self._sent = distributed.exchange_later([int(self.stop()), self._stretches * prefetch, int(checkpoint)])
        return before


def dealt_facts(block: Block) -> np.ndarray:
    """``FACTS`` of the blocks of ``block``'s round on all ranks, compared with those of ``block`` itself."""
    facts_W5 = block.facts_W5
    ranks, rank = distributed.world_size(), distributed.rank()
    if len(facts_W5) != ranks or (facts_W5[rank] != block.facts_5).any():
        raise RuntimeError(
            f"rank {rank} of {ranks} has a block that was dealt to another rank, or to {len(facts_W5)} ranks"
        )
    return facts_W5


def check_order(first_AW: np.ndarray, last_AW: np.ndarray) -> None:
    """Assert that block b of the index went to rank b mod world size."""
    bounds = np.stack([first_AW, last_AW], axis=2).ravel()
    if not (np.diff(bounds) >= 0).all():
        raise RuntimeError(f"blocks are out of order: they end at positions {bounds[1::2].tolist()}")


def validation_batches(
    source: BlockSource, batcher: Batcher, size: int
) -> Iterator[tuple[ImageReportBatch, int, bool]]:
    """Batches of ``size`` rows, the number of real rows on this rank, and whether all rows of all ranks are real. Collective.

    A rank without data continues with blank rows until the last rank has finished, since every forward is collective.
    """
    blocks = source.open_validation()
    while True:
        mark(FILMS)
        block = next(blocks, None)
        real = 0 if block is None else len(block)
        mark("validation")
        padded = blank_block(size, batcher.config.data.resize) if block is None else block.padded(size)
        ranks = distributed.exchange([real, int(padded.sentence_counts.sum())])
        if not any(count for count, _ in ranks):
            return
        batch = batcher(padded, tuple(count for _, count in ranks), training=False)
        yield batch, real, all(count == size for count, _ in ranks)
