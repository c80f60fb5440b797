"""The microbatches of each optimizer step on this rank: agreed between ranks on the host, moved to the device."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cmcgns import distributed
from cmcgns.data.batch import Batcher, ImageReportBatch
from cmcgns.data.record import Block, blank_block

STEPS_AHEAD = 40
"""Steps before an epoch's end at which the next one begins to be read, at the latest."""
START_S = 8.0
"""Seconds that an epoch may take to start: it begins to be read so long before it is needed."""
MEASURED_S = 2.0
"""Seconds of an epoch that tell its speed: what lay ready at its start comes faster than it can be read."""


class EpochPrefetch:
    """Tells when the next epoch has to begin to be read, by how fast this one goes."""

    def __init__(self, studies: int, least: int) -> None:
        self._studies, self._least = studies, least
        self._speed = 0.0
        self.begin()

    def begin(self) -> None:
        """An epoch begins; the last one's speed counts until its own is known: it may be over by then."""
        self._speed_before = self._speed
        self._first: tuple[float, int] | None = None

    def is_time(self, position: int) -> bool:
        """Whether to begin, with this epoch read up to ``position``."""
        now = time.monotonic()
        # from the first call on: until then the epoch has been starting, which says nothing of its speed
        began, first = self._first = self._first or (now, position)
        if now > began:
            self._speed = (position - first) / (now - began)
        speed = self._speed if now - began > MEASURED_S else self._speed_before
        return self._studies - position <= max(self._least, speed * START_S)


class BlockSource(Protocol):
    """Where blocks come from; every rank opens the same epoch at the same place. Collective."""

    @property
    def studies(self) -> int:
        """Studies of an epoch's order."""

    def open(self, epoch: int, position: int) -> Iterator[Block]:
        """This rank's blocks of ``epoch``, from ``position`` of its order on."""

    def prepare(self, epoch: int) -> None:
        """Begin to read ``epoch``, which will be opened soon from its start."""

    def open_validation(self) -> Iterator[Block]:
        """This rank's blocks of the validation split."""


@dataclass
class Place:
    """Where the stream stands: all studies before ``position`` of ``epoch``'s order have been used."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class StepData:
    """What one optimizer step trains on."""

    microbatches: list[ImageReportBatch]
    place: Place
    """Where the stream stands after this step."""
    studies_digest: str
    """Order-free hash of the films that all ranks see at this step."""
    stop_requested: bool


class StepReader:
    """Gathers each step's blocks over epochs; an epoch's last incomplete global batch is left out."""

    def __init__(
        self, source: BlockSource, batcher: Batcher, place: Place, accumulation: int, stop: Callable[[], bool]
    ) -> None:
        self.source, self.batcher, self.place = source, batcher, place
        self.accumulation, self.stop = accumulation, stop
        self._prefetch = EpochPrefetch(source.studies, STEPS_AHEAD * batcher.config.train.global_batch_size)
        self._open(place)

    def _open(self, place: Place) -> None:
        self.place = place
        self._blocks = self.source.open(place.epoch, place.position)
        self._prefetch.begin()

    def next_step(self) -> StepData:
        """The next step's batches. Collective; goes on to the next epoch where this one has no full step left."""
        found, empty_epochs = self._gather(), 0
        while found is None:
            empty_epochs += 1
            if empty_epochs == 2:
                raise RuntimeError("an epoch holds less than one global batch of usable studies")
            self._open(Place(self.place.epoch + 1, 0))
            found = self._gather()
        return found

    def _gather(self) -> StepData | None:
        """One step's batches, or None where the ranks together have too few blocks left in this epoch."""
        held = [block for _, block in zip(range(self.accumulation), self._blocks, strict=False)]
        facts = np.zeros((self.accumulation, 4), np.int64)
        for row, block in zip(facts, held, strict=False):
            row[:] = block.sentence_counts.sum(), block.positions[0], block.positions[-1], digest(block)
        size = self.batcher.config.train.microbatch_size
        short = len(held) < self.accumulation or any(len(block) != size for block in held)
        hurry = self._prefetch.is_time(self.place.position)
        ranks = np.array(distributed.exchange([int(short), int(self.stop()), int(hurry), *facts.ravel().tolist()]))
        if ranks[:, 0].any():
            return None
        facts_WA4 = ranks[:, 3:].reshape(len(ranks), self.accumulation, 4)
        check_order(facts_WA4)
        self.place = Place(self.place.epoch, int(facts_WA4[:, :, 2].max()) + 1)
        if ranks[:, 2].any():  # collective: the ranks' clocks differ
            self.source.prepare(self.place.epoch + 1)
        microbatches = [
            self.batcher(block, tuple(int(count) for count in facts_WA4[:, i, 0]), training=True)
            for i, block in enumerate(held)
        ]
        whole = int(facts_WA4[:, :, 3].astype(np.uint64).sum(dtype=np.uint64))
        return StepData(microbatches, self.place, f"{whole:016x}", bool(ranks[:, 1].any()))


def digest(block: Block) -> int:
    """Sum of the films' keys, which does not depend on their order."""
    return int(block.draw_keys.sum(dtype=np.int64))


def check_order(facts_WA4: np.ndarray) -> None:
    """Assert that blocks went round the ranks in the order of the index: block b to rank b mod world."""
    bounds = facts_WA4[:, :, 1:3].transpose(1, 0, 2).ravel()
    if not (np.diff(bounds) >= 0).all():
        raise RuntimeError(f"the stream left its order: blocks end at positions {bounds[1::2].tolist()}")


def validation_batches(
    source: BlockSource, batcher: Batcher, size: int
) -> Iterator[tuple[ImageReportBatch, int, bool]]:
    """Batches of ``size`` rows, how many rows of this rank's are real, and whether all ranks' are. Collective.

    Ranks that run out go on with blank rows until the last one is done, since every forward is collective.
    """
    own = source.open_validation()
    while True:
        block = next(own, None)
        real = 0 if block is None else len(block)
        held = blank_block(size, batcher.config.data.resize) if block is None else block.padded(size)
        ranks = distributed.exchange([real, int(held.sentence_counts.sum())])
        if not any(count for count, _ in ranks):
            return
        batch = batcher(held, tuple(count for _, count in ranks), training=False)
        yield batch, real, all(count == size for count, _ in ranks)
