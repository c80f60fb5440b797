"""A corpus in memory: blocks as Ray Data would deliver them, for tests of the loop without Ray."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from cmcgns import distributed
from cmcgns.config import Config
from cmcgns.data.order import VALIDATION_EPOCH, Arrangement
from cmcgns.data.record import FACTS, Block
from cmcgns.train.steps import Stretch
from tests.small import VOCABULARY


def order_of(seed: int, epoch: int, studies: int) -> np.ndarray:
    """The studies of an epoch in order, as if stored in groups of 8."""
    numbers = np.arange(studies)
    return Arrangement(numbers, (numbers // 8).astype(np.int32), -(-studies // 8)).epoch(seed, epoch, 2).row_S


class MemoryBlocks:
    """``studies`` random studies; those in ``bad`` cannot be used. Block b goes to rank b mod world."""

    def __init__(
        self, config: Config, studies: int, validation: int = 8, bad: tuple[int, ...] = (), at_once: int | None = None
    ) -> None:
        self.config, self.studies, self.validation, self.bad = config, studies, validation, bad
        self.at_once = studies if at_once is None else at_once
        self.prepared: list[Stretch] = []
        self.opened: list[Stretch] = []

    def open(self, stretch: Stretch) -> Iterator[Block]:
        self.opened.append(stretch)
        order = order_of(self.config.data.seed, stretch.epoch, self.studies)
        places = range(stretch.position, stretch.end)
        return self._blocks([(place, int(order[place])) for place in places], stretch.epoch)

    def prepare(self, stretch: Stretch) -> None:
        self.prepared.append(stretch)

    def whole(self, epoch: int = 0) -> Iterator[Block]:
        """The blocks of ``epoch``."""
        return self.open(Stretch(epoch, 0, self.studies))

    def open_validation(self) -> Iterator[Block]:
        return self._blocks([(place, 10_000 + place) for place in range(self.validation)], VALIDATION_EPOCH)

    def _blocks(self, places: list[tuple[int, int]], epoch: int) -> Iterator[Block]:
        good = [(place, study) for place, study in places if study not in self.bad]
        size = self.config.train.microbatch_size
        cut = [good[start : start + size] for start in range(0, len(good), size)]
        ranks = distributed.world_size()
        for start in range(0, len(cut), ranks):
            blocks = [self._block(rows, epoch) for rows in cut[start : start + ranks]]
            facts_W5 = np.zeros((ranks, len(FACTS)), np.int64)  # each block tells of itself
            facts_W5[: len(blocks)] = [block.facts_5 for block in blocks]
            for block in blocks[distributed.rank() :][:1]:
                yield replace(block, dealt_W5=facts_W5)

    def _block(self, rows: list[tuple[int, int]], epoch: int) -> Block:
        studies = [self._study(study) for _, study in rows]
        return Block(
            positions=np.array([place for place, _ in rows]),
            draw_keys=np.array([study * 1_000_003 + epoch for _, study in rows]),
            images_BRR=np.stack([study[0] for study in studies]),
            tokens=[study[1] for study in studies],
            sentence_of_token=[study[2] for study in studies],
            sentence_hashes=[study[3] for study in studies],
            report_hashes=np.array([study[4] for study in studies]),
        )

    def _study(self, study: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        random = np.random.default_rng([7, study])
        sentences, side = int(random.integers(1, 6)), self.config.data.resize
        lengths = random.integers(2, 7, sentences)
        owners = np.concatenate([[-1], np.repeat(np.arange(sentences), lengths), [-1]]).astype(np.int16)
        tokens = np.concatenate([[2], random.integers(5, VOCABULARY, lengths.sum()), [3]]).astype(np.int32)
        image = random.integers(0, 256, (side, side)).astype(np.uint8)
        return image, tokens, owners, random.integers(0, 2**40, sentences), int(random.integers(0, 2**40))


class Quiet:
    """A display that shows nothing."""

    def update(self, row: dict[str, Any]) -> None:
        pass


def studies_of(block_or_keys: np.ndarray, epoch: int) -> list[int]:
    """The studies behind ``draw_keys`` of ``epoch``."""
    return [(int(key) - epoch) // 1_000_003 for key in block_or_keys]
