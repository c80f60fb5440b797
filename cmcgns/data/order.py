"""The order of an epoch: a function of (seed, epoch) and the studies only, the same for a raw and a prepared set.

Studies are in groups: the row groups of a prepared set, or as many studies each of a raw one. An epoch permutes the groups,
joins every ``groups_per_window`` of them into a window, and shuffles within each window. Since groups are random samples of
the corpus, this is as good as a full shuffle, and a reader holds only one window in memory.

Where a window starts depends on the number of studies in each group, and its inside on the keys of its own studies. So an
epoch of any length can be read by window: ``readers/grouped.py``.
"""

# S studies of a split, G groups

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

VALIDATION_EPOCH = -1
"""Epoch number of validation, so that its random draws never change."""
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class Arrangement:
    """Groups of the S studies of a split, in the order of its table."""

    key_S: NDArray[np.int64]
    """Hash of each study's id."""
    group_S: NDArray[np.int32]
    """Group of each study, from 0, in ascending order."""
    groups: int
    """Number of groups; some may have no usable study."""

    def first(self, studies: int | None) -> "Arrangement":
        """The arrangement of the first ``studies``."""
        return Arrangement(self.key_S[:studies], self.group_S[:studies], self.groups)

    def epoch(self, seed: int, epoch: int, groups_per_window: int) -> "EpochOrder":
        """The order of ``epoch``; validation keeps the order of the table."""
        draw = EpochDraw.of(seed, epoch, self.groups)
        window_S = draw.turn_G[self.group_S] // groups_per_window
        row_S = np.arange(len(self.key_S))
        if draw.salt is not None:
            row_S = np.lexsort((mixed(self.key_S, draw.salt), window_S))
        return EpochOrder(row_S, np.searchsorted(window_S[row_S], np.arange(window_S.max(initial=-1) + 2)))


@dataclass(frozen=True)
class EpochDraw:
    """What is drawn for an epoch."""

    turn_G: NDArray[np.int64]
    """When each group has its turn."""
    salt: np.int64 | None
    """Of the hash by which the studies of a window are sorted; None if they keep the order of the table. A hash and not a
    permutation: a missing study does not change the order of the others."""

    @classmethod
    def of(cls, seed: int, epoch: int, groups: int) -> "EpochDraw":
        """The draw of ``epoch``; nothing is drawn for validation."""
        if epoch == VALIDATION_EPOCH:
            return cls(np.arange(groups), None)
        random = np.random.Generator(np.random.PCG64([seed % 2**64, epoch]))
        return cls(random.permutation(groups), np.int64(random.integers(2**63)))


@dataclass(frozen=True)
class EpochOrder:
    """The rows of a split in the order of an epoch, and the starts of its windows plus the end of the last."""

    row_S: NDArray[np.int64]
    starts: NDArray[np.int64]


def mixed(key_S: NDArray[np.int64], salt: np.int64) -> NDArray[np.uint64]:
    """A hash of each key and ``salt``: the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = key_S.view(np.uint64) ^ np.uint64(salt)
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def one_after_the_other(parts: Sequence[Arrangement], groups_per_window: int) -> Arrangement:
    """The arrangement of the splits ``parts`` in a row; no window has groups of two."""
    groups, group_S = 0, list[NDArray[np.int32]]()
    for part in parts:
        groups = -(-groups // groups_per_window) * groups_per_window
        group_S.append(part.group_S + np.int32(groups))
        groups += part.groups
    return Arrangement(np.concatenate([part.key_S for part in parts]), np.concatenate(group_S), groups)


def study_key(study_id: str) -> int:
    """Signed 64-bit hash of a study's id."""
    return _hash64(study_id)


def study_keys(studies: pa.Table, rename: Callable[[str], str] = str) -> NDArray[np.int64]:
    """``study_key`` of each index row, after ``rename`` has replaced its id."""
    return np.fromiter((study_key(rename(study)) for study in studies["study_id"].to_pylist()), np.int64, len(studies))


def arranged(studies: pa.Table, group_studies: int, rename: Callable[[str], str] = str) -> tuple[pa.Table, Arrangement]:
    """The studies of a raw split sorted by the key of their renamed id, in groups of ``group_studies``.

    This order mixes patients and years, so each group is a random sample of the corpus.
    """
    key_S = study_keys(studies, rename)
    row_S = np.argsort(key_S, kind="stable")
    group_S = (np.arange(len(row_S)) // group_studies).astype(np.int32)
    return studies.take(row_S), Arrangement(key_S[row_S], group_S, -(-len(row_S) // group_studies))


def draw_key(seed: int, epoch: int, image_id: str) -> int:
    """Signed 64-bit key for all random draws about one image in one epoch, the same on every rank."""
    return _hash64(f"{seed}|{epoch}|{image_id}")


def drawn_image(seed: int, epoch: int, study_id: str, films: int) -> int:
    """Index of the film of a study, out of ``films``, that this epoch uses."""
    return _hash64(f"film|{seed}|{epoch}|{study_id}") % films


def _hash64(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
