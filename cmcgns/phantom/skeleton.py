"""Bones of the chest and vessels of the lungs, as lines to draw."""

import numpy as np

from cmcgns.phantom.anatomy import SIGN, Chest
from cmcgns.phantom.canvas import Points, curve, ellipse, uniform_array

RIBS = 10
TRUNKS = 10
_ARC = np.linspace(0, 1, 16)
_ALONG = np.linspace(0, 1, 7)


def posterior_ribs(chest: Chest, side: str) -> Points:
    """The back arcs of the ribs (ribs, points, 2), from the spine to the lateral wall."""
    patient, n = chest.patient, np.arange(RIBS)[:, None]
    start = patient.apex + 0.03 + patient.rib_spacing * n * (1 + 0.012 * n)
    t = _ARC
    drop = (0.05 + 0.034 * n) * patient.rib_slope
    y = start - 0.045 * np.sin(np.pi * np.minimum(1.6 * t, 1.0)) + drop * t**1.9
    reach = chest.wall(side, np.minimum(start + drop, chest.sulcus(side))) + 0.015
    x = 0.06 + (np.maximum(reach, 0.3) - 0.06) * np.sin(t * np.pi / 2) ** 0.92
    return _on(chest, side, x, y, 0.0)


def anterior_ribs(chest: Chest, side: str, back: Points) -> Points:
    """The front arcs of the upper ribs, from the end of their ``back`` arcs down to the cartilage."""
    n = np.arange(1, 7)[:, None]
    t = _ARC
    x0, y0 = back[1:7, -1, 0, None], back[1:7, -1, 1, None]
    reach, end = np.abs(x0), 0.24 + 0.035 * n
    x = end + (reach - end) * np.cos(t * np.pi / 2) ** 0.9
    y = y0 + (0.20 + 0.02 * n) * chest.patient.rib_slope * t**0.85
    return _on(chest, side, x, y, 0.25)


def clavicle(chest: Chest, side: str) -> Points:
    """The clavicle; its inner end moves with the front of a rotated chest."""
    lift = 0.07 if chest.view == "AP" else 0.0
    top = chest.patient.apex - lift
    inner = 0.075 + 0.8 * chest.yaw * SIGN[side]
    knots = [
        (inner, top + 0.22),
        (0.25, top + 0.135),
        (0.45, top + 0.07),
        (0.66, top + 0.045),
        (0.88, top - 0.03),
    ]
    return curve(knots, 5) * [SIGN[side], 1.0]


def scapula(chest: Chest, side: str) -> Points:
    """The scapula: over the lung on an AP film, lateral to it on a PA film."""
    x = 0.60 if chest.view == "AP" else 0.90
    top = chest.patient.apex + 0.02
    knots = [
        (x - 0.08, top + 0.06),
        (x + 0.18, top),
        (x + 0.30, top + 0.12),
        (x + 0.10, top + 0.42),
        (x + 0.02, top + 0.66),
    ]
    return curve([*knots, (x - 0.05, top + 0.5)], 5, closed=True) * [SIGN[side], 1.0]


def spine(chest: Chest) -> Points:
    """The midline of the vertebral column."""
    y = np.linspace(-1.3, 1.3, 30)
    return np.stack([chest.spine_x(y), y], 1)


def disc_spaces(chest: Chest) -> Points:
    """The gaps between vertebrae (gaps, points, 2), top to bottom."""
    ys = np.linspace(-1.2, 1.1, 18)[:, None] + 0.3 * (chest.patient.rib_spacing - 0.13)
    xs = chest.spine_x(ys) + np.array([-0.062, 0.0, 0.062])
    return np.stack([xs, ys + np.array([0.0, 0.003, 0.0])], -1)


def vessels(chest: Chest, side: str, key: bytes, upper_lobe: float = 1.0) -> list[tuple[Points, Points]]:
    """One lung's vessels in layers of (lines, half widths); lines of one layer hardly cross."""
    c = uniform_array(key, (50, 6)).astype(np.float64)
    root = np.repeat([chest.hilum(side)], TRUNKS, axis=0)
    angle = -1.35 + 2.7 * (np.arange(TRUNKS) + 0.8 * c[:10, 0]) / TRUNKS  # straight up to straight down
    length = (0.42 + 0.2 * c[:10, 1]) * np.where(angle > 0.5, 1.25, 1.0)
    girth = (0.0085 + 0.0055 * c[:10, 2]) * np.where(angle < 0, upper_lobe, 1.15)
    trunks = _twigs(root, angle, 0.7 * (c[:10, 3] - 0.5), length, SIGN[side])
    parent, turn = np.repeat(np.arange(TRUNKS), 2), np.tile([-1.0, 1.0], TRUNKS)
    b, e = c[10:30], c[30:50]
    heading = angle[parent] + (0.35 + 0.5 * b[:, 1]) * turn
    fork = trunks[parent, 2 + (3 * b[:, 0]).astype(int)]
    twigs = _twigs(fork, heading, 0.8 * (b[:, 2] - 0.5), length[parent] * (0.45 + 0.2 * b[:, 3]), SIGN[side])
    fork = twigs[np.arange(2 * TRUNKS), 2 + (2 * e[:, 0]).astype(int)]
    ends = _twigs(fork, heading + 1.3 * (e[:, 1] - 0.5), 0.5 * (e[:, 2] - 0.5), np.full(20, 0.2), SIGN[side])
    thin = 0.55 * girth[parent]
    return [
        (trunks, _tapered(girth, 0.0020)),
        (twigs[::2], _tapered(thin[::2], 0.0016)),
        (twigs[1::2], _tapered(thin[1::2], 0.0016)),
        (ends, _tapered(0.6 * thin, 0.0013)),
    ]


def hilar_shadow(chest: Chest, side: str) -> Points:
    """The outline of the hilum."""
    x, y = chest.hilum(side)
    return ellipse(x + SIGN[side] * 0.025, y + 0.02, 0.05, 0.12, SIGN[side] * -0.25)


def _tapered(girth: Points, tip: float) -> Points:
    """Half widths (lines, points) that decrease from ``girth`` to ``tip``."""
    widths: Points = girth[:, None] * (1 - _ALONG) + tip * _ALONG
    return widths


def _twigs(start: Points, angle: Points, bend: Points, length: Points, sign: float) -> Points:
    """Gently bent lines from ``start``; angle 0 points away from the midline, positive downward."""
    heading = angle[:, None] + bend[:, None] * _ALONG
    step = np.stack([np.cos(heading) * sign, np.sin(heading)], -1) * (length / 6)[:, None, None]
    step[:, 0] = start
    return np.cumsum(step, axis=1)


def _on(chest: Chest, side: str, x: Points, y: Points, depth: float) -> Points:
    """A line given for positive x, moved to its side; ``depth`` is how much it follows the rotation of the chest."""
    shift = chest.spine_x(y) * np.clip(1.3 - 2 * x, 0.3, 1.0)  # a bent spine shifts the heads of the ribs
    return np.stack([SIGN[side] * x + shift + depth * chest.yaw, y], -1)
