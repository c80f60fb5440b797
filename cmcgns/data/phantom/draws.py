"""Numbers that depend on their key alone: the phantom's only source of chance.

Scalars come from BLAKE2b in counter mode and arrays from raw Philox bits, neither of which changes with
the machine, the process, the numpy release or the order of the calls.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
FloatArray = npt.NDArray[np.float32]

_ROOT = 0.8660254037844386  # the sum of four has deviation sqrt(4 / 3)
_UNPACK = struct.Struct("<8Q").unpack


def digest(*key: object) -> bytes:
    """64 bytes that stand for ``key``."""
    return hashlib.blake2b(repr(key).encode()).digest()


class Draws:
    """A stream of draws that starts anew wherever the same key is given."""

    def __init__(self, *key: object) -> None:
        self._key = digest(*key)
        self._block = 0
        self._words: list[int] = []

    def _word(self) -> int:
        """The next 64 bits of the stream."""
        if not self._words:
            block = hashlib.blake2b(self._block.to_bytes(8, "little"), key=self._key).digest()
            self._words = list(_UNPACK(block))
            self._block += 1
        return self._words.pop()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * ((self._word() >> 11) * 2.0**-53)

    def normal(self, scale: float = 1.0) -> float:
        """A bell-shaped number of standard deviation ``scale``, never beyond 3.5 of them.

        Sum of four uniforms: no library's logarithm, hence the same bits everywhere.
        """
        return scale * sum(self.uniform(-1.0, 1.0) for _ in range(4)) * _ROOT

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.uniform() < probability

    def integer(self, count: int) -> int:
        """A whole number in [0, count)."""
        return self._word() * count >> 64

    def choice(self, items: Sequence[T]) -> T:
        """One of ``items``."""
        return items[self.integer(len(items))]

    def weighted(self, items: Sequence[tuple[T, float]]) -> T:
        """One of ``items``, each given with its weight."""
        left = self.uniform(0.0, sum(weight for _, weight in items))
        for item, weight in items:
            left -= weight
            if left < 0:
                return item
        return items[-1][0]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """``items`` in a drawn order."""
        rest = list(items)
        return [rest.pop(self.integer(len(rest))) for _ in range(len(rest))]


def uniform_array(key: bytes, shape: tuple[int, ...]) -> FloatArray:
    """Numbers in [0, 1) of the given shape, from raw Philox bits."""
    return _raw_bytes(key, shape, 2).view(np.uint16).reshape(shape).astype(np.float32) * np.float32(2**-16)


def normal_array(key: bytes, shape: tuple[int, ...]) -> FloatArray:
    """Peaked numbers of mean 0 and deviation 1, each the sum of two raw Philox bytes."""
    raw = _raw_bytes(key, shape, 2).view(np.uint16).reshape(shape)
    total = (raw & np.uint16(0xFF)) + (raw >> np.uint16(8))
    return (total.astype(np.float32) - np.float32(255.0)) * np.float32(1 / 104.5)


def _raw_bytes(key: bytes, shape: tuple[int, ...], width: int) -> npt.NDArray[np.uint8]:
    """As many raw bytes as ``shape`` numbers of ``width`` bytes take, in little-endian order."""
    count = int(np.prod(shape)) * width
    words = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw((count + 7) // 8)
    return words.astype("<u8", copy=False).view(np.uint8)[:count]


def permuted(index: int, count: int, *key: object) -> int:
    """The place of ``index`` in a keyed permutation of range(count): unlike a hash, it never collides."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:  # cycle walking: at most a few rounds, since count > 4 ** (half - 1)
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ int.from_bytes(digest(*key, turn, right)[:4], "little") & mask
        index = left << half | right
        if index < count:
            return index
