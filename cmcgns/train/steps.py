"""Microbatches of each optimizer step on this rank: the ranks agree on the host, then the data moves to the device."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from cmcgns import distributed
from cmcgns.cluster.heartbeat import FILMS, mark
from cmcgns.data.batch import Batcher, ImageReportBatch
from cmcgns.data.record import Block, blank_block

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

    def is_due(self, position: int) -> bool:
        """True if what comes next should be read now; ``position`` is the progress in the epoch."""
        now = time.monotonic()
        # measured from the first call: the start-up time before it says nothing about the speed
        began, first = self._first = self._first or (now, position)
        if now > began:
            self._speed = (position - first) / (now - began)
        speed = self._speed if now - began > MEASURED_S else self._speed_before
        return self._end - position <= max(self._least, speed * START_S)


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
    """The data of one optimizer step."""

    microbatches: list[ImageReportBatch]
    cursor: Cursor
    """Position in the stream after this step."""
    studies_digest: str
    """Hash of the films of this step on all ranks; it does not depend on their order."""
    stop_requested: bool
    checkpoint_due: bool
    """By the clock of rank 0."""


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
        data, empty_epochs = self._read_step(), 0
        while data is None:
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
            data = self._read_step()
        return data

    def _read_step(self) -> StepData | None:
        """One step's batches, or None if any rank has too few blocks left in this stretch."""
        blocks = [block for _, block in zip(range(self.accumulation), self._blocks, strict=False)]
        facts = np.zeros((self.accumulation, 4), np.int64)
        for row, block in zip(facts, blocks, strict=False):
            row[:] = block.sentence_counts.sum(), block.positions[0], block.positions[-1], digest(block)
        size = self.batcher.config.train.microbatch_size
        short = len(blocks) < self.accumulation or any(len(block) != size for block in blocks)
        prefetch = self._prefetch.is_due(self.cursor.position)
        mark("waiting for the other ranks")
        flags = [int(short), int(self.stop()), int(prefetch), int(self.checkpoint_due())]
        ranks = np.array(distributed.exchange([*flags, *facts.ravel().tolist()]))
        if ranks[:, 0].any():
            return None
        facts_WA4 = ranks[:, len(flags) :].reshape(len(ranks), self.accumulation, 4)
        check_order(facts_WA4)
        self.cursor = Cursor(self.cursor.epoch, int(facts_WA4[:, :, 2].max()) + 1)
        # once: each bad row after it moves where the next stretch begins, and opening one anew costs seconds
        if ranks[:, 2].any() and not self._next_is_prepared:  # collective: the ranks' clocks differ
            self._next_is_prepared = True
            self.source.prepare(self._next())
        microbatches = [
            self.batcher(block, tuple(int(count) for count in facts_WA4[:, i, 0]), training=True)
            for i, block in enumerate(blocks)
        ]
        whole = int(facts_WA4[:, :, 3].astype(np.uint64).sum(dtype=np.uint64))
        return StepData(microbatches, self.cursor, f"{whole:016x}", bool(ranks[:, 1].any()), bool(ranks[0, 3]))


def digest(block: Block) -> int:
    """Sum of the films' keys; it does not depend on their order."""
    return int(block.draw_keys.sum(dtype=np.int64))


def check_order(facts_WA4: np.ndarray) -> None:
    """Assert that block b of the index went to rank b mod world size."""
    bounds = facts_WA4[:, :, 1:3].transpose(1, 0, 2).ravel()
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
