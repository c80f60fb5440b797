"""Keyed random draws, and a canvas to paint shapes on."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt

T = TypeVar("T")
FloatArray = npt.NDArray[np.float32]
_ROOT = 0.8660254037844386  # the sum of four has deviation sqrt(4 / 3)
_UNPACK = struct.Struct("<8Q").unpack


def digest(*key: object) -> bytes:
    """A 64-byte hash of ``key``."""
    return hashlib.blake2b(repr(key).encode()).digest()


class Draws:
    """A stream of random draws; the same key always gives the same stream."""

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
        """A roughly normal number with standard deviation ``scale``, at most 3.5 of them from 0.

        Sum of four uniforms, without a library's logarithm: bit-equal on every machine.
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
        """One of the weighted ``items``."""
        left = self.uniform(0.0, sum(weight for _, weight in items))
        for item, weight in items:
            left -= weight
            if left < 0:
                return item
        return items[-1][0]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """``items`` in random order."""
        rest = list(items)
        return [rest.pop(self.integer(len(rest))) for _ in range(len(rest))]


def uniform_array(key: bytes, shape: tuple[int, ...]) -> FloatArray:
    """Numbers in [0, 1) of the given shape, from raw Philox bits."""
    return _raw_bytes(key, shape, 2).view(np.uint16).reshape(shape).astype(np.float32) * np.float32(2**-16)


def normal_array(key: bytes, shape: tuple[int, ...]) -> FloatArray:
    """Numbers with mean 0 and standard deviation 1, each the sum of two raw Philox bytes."""
    raw = _raw_bytes(key, shape, 2).view(np.uint16).reshape(shape)
    total = (raw & np.uint16(0xFF)) + (raw >> np.uint16(8))
    return (total.astype(np.float32) - np.float32(255.0)) * np.float32(1 / 104.5)


def _raw_bytes(key: bytes, shape: tuple[int, ...], width: int) -> npt.NDArray[np.uint8]:
    """Raw little-endian bytes for ``shape`` numbers of ``width`` bytes."""
    count = int(np.prod(shape)) * width
    words = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw((count + 7) // 8)
    return words.astype("<u8", copy=False).view(np.uint8)[:count]


def permuted(index: int, count: int, *key: object) -> int:
    """The position of ``index`` in a keyed permutation of range(count); unlike a hash it never collides."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:  # cycle walking: at most a few rounds, since count > 4 ** (half - 1)
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ int.from_bytes(digest(*key, turn, right)[:4], "little") & mask
        index = left << half | right
        if index < count:
            return index


Points = npt.NDArray[np.float64]
"""Rows of (x, y) in anatomy coordinates."""
_TURNS = np.arange(28) * (2 * np.pi / 28)
_CIRCLE = np.stack([np.cos(_TURNS), np.sin(_TURNS)], 1)
_SHIFT = 4  # fillPoly takes 1/16 pixel
_LEFT = np.array([-1.0, 1.0])  # (dx, dy) reversed and multiplied by this is the normal
_EDGE = 0.70  # pixels from a polygon to the antialiased edge that fillPoly paints around it, measured
_THINNEST = 0.87  # pixels: half the width of the thinnest line fillPoly draws


@dataclass(frozen=True)
class Canvas:
    """The pixel grid of a film and the position of the anatomy on it."""

    height: int
    width: int
    affine: npt.NDArray[np.float64]
    """2 x 3: anatomy coordinates to pixels, with 0 at the outer edge of the first pixel."""
    scale: float = field(init=False)
    """Pixels per unit of anatomy."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(np.sqrt(abs(np.linalg.det(self.affine[:, :2])))))

    def pixels(self, points: Points) -> Points:
        """``points`` in pixels."""
        placed: Points = points @ self.affine[:, :2].T + self.affine[:, 2]
        return placed

    def fill(self, outlines: Sequence[Points]) -> FloatArray:
        """Coverage in [0, 1] of each pixel by closed outlines."""
        return self._paint([_trimmed(self.pixels(outline)) for outline in outlines], [1.0] * len(outlines))

    def ribbons(self, lines: Sequence[Points] | Points, half_width: float | Points) -> FloatArray:
        """Coverage by lines with equally many points; half widths for all, per point, or per line and point."""
        outlines = self._ribbons(np.asarray(lines), np.asarray(half_width))
        return self._paint(outlines, np.broadcast_to(self._faint(np.asarray(half_width)), len(outlines)))

    def strokes(self, lines: Sequence[Points], half_width: float) -> FloatArray:
        """Coverage by lines of any length and one half width."""
        width = np.asarray(half_width)
        return self._paint([self._ribbons(line, width) for line in lines], [float(self._faint(width))] * len(lines))

    def tangle(self, lines: Points, half_width: Points) -> FloatArray:
        """Coverage by many thin lines, painted at once; two lines cancel where they cross."""
        sheet = np.zeros((self.height, self.width), np.uint8)
        value = round(255 * float(np.mean(self._faint(half_width))))
        cv2.fillPoly(sheet, _fixed(self._ribbons(lines, half_width)), (value,), lineType=cv2.LINE_AA, shift=_SHIFT)
        return sheet.astype(np.float32) * np.float32(1 / 255)

    def _ribbons(self, lines: Points, half_width: Points) -> Points:
        """The outlines, in pixels, of lines (..., points, 2), trimmed for ``fillPoly``."""
        placed = self.pixels(lines)
        along = np.empty_like(placed)
        along[..., 1:-1, :] = placed[..., 2:, :] - placed[..., :-2, :]
        along[..., 0, :] = placed[..., 1, :] - placed[..., 0, :]
        along[..., -1, :] = placed[..., -1, :] - placed[..., -2, :]
        normal = along[..., ::-1] * _LEFT
        reach = np.maximum(half_width * self.scale - _EDGE, 0.0)[..., None]
        side = normal * (reach / np.maximum(np.sqrt((normal * normal).sum(-1, keepdims=True)), 1e-9))
        return np.concatenate([placed + side, (placed - side)[..., ::-1, :]], axis=-2)

    def _faint(self, half_width: Points) -> Points:
        """Strength of each line: lines thinner than ``fillPoly`` can draw are painted fainter."""
        shares: Points = np.minimum(half_width * (self.scale / _THINNEST), 1.0)
        return shares.mean(-1) if half_width.ndim else shares

    def _paint(self, outlines: Sequence[Points] | Points, values: Sequence[float] | Points) -> FloatArray:
        """Coverage by outlines in pixels; later ones overwrite earlier ones."""
        sheet = np.zeros((self.height, self.width), np.uint8)
        for polygon, value in zip(_fixed(outlines), values, strict=True):
            cv2.fillPoly(sheet, [polygon], (round(float(value) * 255),), lineType=cv2.LINE_AA, shift=_SHIFT)
        return sheet.astype(np.float32) * np.float32(1 / 255)

    def blur(self, picture: FloatArray, sigma: float) -> FloatArray:
        """``picture`` blurred by a Gaussian of ``sigma``; wide ones are computed on a coarser grid."""
        pixels = sigma * self.scale
        if pixels < 0.25:
            return picture
        factor = 1 << max(0, int(np.log2(pixels / 2.0))) if pixels >= 4 else 1
        if factor == 1:
            return np.asarray(cv2.GaussianBlur(picture, (0, 0), pixels), np.float32)
        size = (max(8, self.width // factor), max(8, self.height // factor))
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        soft = cv2.GaussianBlur(small, (0, 0), pixels * size[0] / self.width)
        return np.asarray(cv2.resize(soft, (self.width, self.height)), np.float32)

    def texture(self, grid: FloatArray, extent: float = 1.3) -> FloatArray:
        """A square ``grid`` over anatomy [-extent, extent], in pixels of this film."""
        unit = 2 * extent / grid.shape[0]
        to_anatomy = np.array([[unit, 0, -extent + unit / 2], [0, unit, -extent + unit / 2]])
        joined = self.affine[:, :2] @ to_anatomy
        joined[:, 2] += self.affine[:, 2] - 0.5
        drawn = cv2.warpAffine(
            grid, joined, (self.width, self.height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
        )
        return np.asarray(drawn, np.float32)


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Points:
    """The outline of an ellipse, rotated by ``angle`` radians."""
    c, s = np.cos(angle), np.sin(angle)
    outline: Points = _CIRCLE @ np.array([[c * rx, s * rx], [-s * ry, c * ry]]) + np.array([x, y])
    return outline


def curve(points: Sequence[tuple[float, float]], steps: int = 8, closed: bool = False) -> Points:
    """A smooth line (Catmull-Rom) through ``points``."""
    knots = np.array(points, np.float64)
    if closed:
        ring = np.concatenate([knots[-1:], knots, knots[:2]])
    else:
        ring = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    legs = np.stack([ring[:-3], ring[1:-2], ring[2:-1], ring[3:]], 1)
    line = (_basis(steps) @ legs).reshape(-1, 2)
    return line if closed else np.concatenate([line, knots[-1:]])


@lru_cache
def _basis(steps: int) -> Points:
    """Catmull-Rom weights of four neighboring knots at ``steps`` points of a segment."""
    t = np.arange(steps)[:, None] / steps
    powers = np.concatenate([t**0, t, t**2, t**3], 1)
    weights = np.array([[0.0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]])
    basis: Points = 0.5 * powers @ weights
    return basis


def _fixed(outlines: Sequence[Points] | Points) -> list[npt.NDArray[np.int32]]:
    """Outlines in pixels converted for fillPoly: in 1/16 pixels, from pixel centers."""
    if isinstance(outlines, np.ndarray):
        return list(np.rint((outlines - 0.5) * (1 << _SHIFT)).astype(np.int32))
    if not outlines:
        return []
    fixed = np.rint((np.concatenate(outlines) - 0.5) * (1 << _SHIFT)).astype(np.int32)
    ends = np.cumsum([len(outline) for outline in outlines])
    return [fixed[end - len(outline) : end] for end, outline in zip(ends, outlines, strict=True)]


def _trimmed(outline: Points) -> Points:
    """A closed outline in pixels, shrunk by the margin that fillPoly adds."""
    ahead = np.concatenate([outline[1:], outline[:1]])
    behind = np.concatenate([outline[-1:], outline[:-1]])
    along = ahead - behind
    turn = np.sign((outline[:, 0] * ahead[:, 1] - ahead[:, 0] * outline[:, 1]).sum())
    inward = along[:, ::-1] * _LEFT * (turn * _EDGE)
    trimmed: Points = outline + inward / np.maximum(np.sqrt((along * along).sum(-1, keepdims=True)), 1e-9)
    return trimmed
