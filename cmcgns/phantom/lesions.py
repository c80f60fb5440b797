"""The effect of each finding on a film: on the air of the lung, the density and the vessels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from cmcgns.phantom.anatomy import CM, LATERAL, SIGN, Chest
from cmcgns.phantom.canvas import Canvas, Draws, FloatArray, Points, digest, ellipse, normal_array
from cmcgns.phantom.findings import Finding

Mask = npt.NDArray[np.bool_]
GRADE = {"mild": 0, "moderate": 1, "severe": 2}
GRID = 72
EXTENT = 1.3


@dataclass
class Lesion:
    """The effect of a finding per pixel; None means no change."""

    filled: FloatArray | None = None
    """Share of the lung's air that is replaced, 0 to 1."""
    density: FloatArray | None = None
    """Added attenuation."""
    bare: FloatArray | None = None
    """Share of the vessels that is removed, 0 to 1."""
    masks: list[Mask] = field(default_factory=list)
    """One mask per location; a bilateral finding has two."""


@dataclass(frozen=True)
class Setting:
    """The film on which a lesion is painted."""

    canvas: Canvas
    chest: Chest
    outlines: Mapping[str, Points]
    """The edge of each lung field."""
    lungs: Mapping[str, FloatArray]
    """Coverage by each lung field, before any finding."""
    heart: FloatArray
    """Coverage by the heart."""
    collapsed: tuple[str, ...] = ()
    """Sides with a pneumothorax: structures in the lung move toward its root."""


Painter = Callable[[Setting, Finding, Draws], Lesion]


def lung_point(chest: Chest, side: str, across: float, down: float) -> tuple[float, float]:
    """A point of a lung: ``across`` 0 at the mediastinum, 1 at the wall; ``down`` 0 at the apex, 1 at the dome."""
    y = chest.patient.apex + down * (chest.dome(side) - chest.patient.apex)
    wall = float(chest.wall(side, y))
    return SIGN[side] * (0.14 + across * (wall - 0.14)), y


def zone_spot(s: Setting, finding: Finding, d: Draws) -> tuple[float, float]:
    """A point of the finding's lung and zone that neither heart nor clavicle hides."""
    low, high = {"upper": (0.20, 0.36), "mid": (0.45, 0.60), "lower": (0.72, 0.88)}[finding.zone]
    hidden = 0.5 if finding.side == "left" and finding.zone != "upper" else 0.28
    hidden += 0.12 if s.chest.heart_ratio > 0.52 and finding.zone != "upper" else 0.0
    rim = max(hidden, 0.55) if finding.side in s.collapsed else 0.82
    return lung_point(s.chest, finding.side, d.uniform(hidden, rim), d.uniform(low, high))


def effusion(s: Setting, finding: Finding, d: Draws) -> Lesion:
    """Fluid from the base up to a meniscus."""
    filled, masks = np.zeros_like(s.lungs["right"]), []
    for side in finding.sides:
        grade = GRADE[finding.severity]
        top = s.chest.sulcus(side) - (0.18, 0.50, 0.92)[grade] - d.uniform(0.0, 0.10)
        low = s.chest.dome(side) + (0.10, -0.01, -0.28)[grade] + d.uniform(-0.03, 0.03)
        t = np.linspace(0, 1, 16)
        wall = s.chest.half_width(side) + 0.06
        level = np.stack([SIGN[side] * t * wall, low + (top - low) * t**2.4], 1)
        region = level, np.array([[SIGN[side] * wall, 1.4], [0.0, 1.4]])
        covered = s.canvas.blur(s.canvas.fill([np.concatenate(region)]), 0.014)
        filled = np.maximum(filled, 0.97 * covered)
        masks.append(covered * s.lungs[side] > 0.5)
    return Lesion(filled=filled, bare=filled, masks=masks)


def pneumothorax(s: Setting, finding: Finding, d: Draws) -> Lesion:
    """Air outside a retracted lung, whose edge is a thin line without vessels beyond it."""
    side = finding.side
    x0, y0 = s.chest.hilum(side)
    amount = (0.13, 0.24, 0.42)[GRADE[finding.severity]] + d.uniform(-0.015, 0.03)
    outline = s.outlines[side]
    away = outline - [x0, y0]
    height = np.clip((outline[:, 1] - s.chest.patient.apex) / (s.chest.sulcus(side) - s.chest.patient.apex), 0, 1)
    pull = amount * (1.15 - (0.85 if amount < 0.3 else 0.35) * height)
    pull *= np.clip((np.abs(outline[:, 0]) - 0.1) / 0.12, 0, 1)  # the root stays in place
    inner = [x0, y0] + away * (1 - pull[:, None])
    within = s.canvas.fill([inner])
    outside = s.lungs[side] * (1 - within)
    edge = (
        s.canvas.blur(s.canvas.strokes([np.concatenate([inner[-3:], inner[LATERAL]])], 0.0075), 0.003) * s.lungs[side]
    )
    sunk = s.lungs[side] * within * (0.04, 0.10, 0.24)[GRADE[finding.severity]]
    return Lesion(
        filled=sunk - 0.16 * outside,
        density=0.17 * edge,
        bare=outside,
        masks=[s.canvas.blur(outside, 0.004) > 0.5],
    )


def consolidation(s: Setting, finding: Finding, d: Draws) -> Lesion:
    """A fluffy patch of filled air spaces with open bronchi inside."""
    x, y = zone_spot(s, finding, d)
    grade = GRADE[finding.severity]
    radius = (0.17, 0.22, 0.28)[grade] * d.uniform(0.9, 1.15)
    stretch = d.uniform(0.8, 1.25)
    gx, gy = _grid()
    distance = np.sqrt(((gx - x) / (radius * stretch)) ** 2 + ((gy - y) / (radius / stretch)) ** 2)
    clouds = _clouds(d, 3.0) + 0.6 * _clouds(d, 1.4)
    blob = np.clip((1.1 - distance + 0.38 * np.clip(clouds, -1.3, 2.0)) * 1.9, 0, 1)
    soft = s.canvas.texture(blob.astype(np.float32)) * np.minimum(1, 3 * s.lungs[finding.side])  # up to the rim
    filled = soft * (0.58, 0.72, 0.86)[grade]
    filled *= 1 - 0.42 * s.canvas.blur(_bronchi(s, finding.side, x, y, radius, d), 0.004)
    return Lesion(filled=filled, bare=0.8 * soft, masks=[soft * s.lungs[finding.side] > 0.35])


def edema(s: Setting, finding: Finding, d: Draws) -> Lesion:
    """Haze around both hila, coarse interstitium and short septal lines at the bases' rims."""
    grade = GRADE[finding.severity]
    gx, gy = _grid()
    haze = np.zeros((GRID, GRID), np.float32)
    septa: list[Points] = []
    for side in finding.sides:
        x, y = s.chest.hilum(side)
        x += SIGN[side] * 0.10
        haze += np.exp(-(((gx - x) / 0.24) ** 2) - ((gy - y - 0.08) / 0.34) ** 2)
        septa += _septal_lines(s.chest, side, 5 + 3 * grade, d)
    speckle = np.maximum(_clouds(d, 0.8), 0) + 0.5 * _clouds(d, 2.5)
    wool = np.clip(haze, 0, 1) * (0.9 + 0.55 * speckle) + 0.10 * np.maximum(speckle, 0)
    both = s.lungs["right"] + s.lungs["left"]
    filled = np.clip(s.canvas.texture(wool.astype(np.float32)) * (0.36, 0.50, 0.66)[grade], 0, 0.9) * both
    lines = s.canvas.blur(s.canvas.ribbons(septa, 0.0050), 0.002) * both
    masks = [s.canvas.texture(np.clip(haze, 0, 1)) * s.lungs[side] > 0.4 for side in finding.sides]
    return Lesion(filled=filled, density=np.float32(0.10) * lines, masks=masks)


def atelectasis(s: Setting, finding: Finding, d: Draws) -> Lesion:
    """Dense bands across the base or the mid lung."""
    total, masks = np.zeros_like(s.lungs["right"]), []
    for side in finding.sides:
        bands, widths = [], []
        for _ in range((1, 2, 3)[GRADE[finding.severity]]):
            down = d.uniform(0.74, 0.95) if finding.zone == "lower" else d.uniform(0.46, 0.60)
            x, y = lung_point(s.chest, side, d.uniform(0.58, 0.72) if side == "left" else d.uniform(0.45, 0.65), down)
            reach, tilt, sag = d.uniform(0.15, 0.22), d.uniform(-0.45, 0.45), d.uniform(-0.02, 0.02)
            t = np.linspace(-1, 1, 9)
            line = np.stack([x + reach * t * np.cos(tilt), y + reach * t * np.sin(tilt) + sag * t**2], 1)
            bands.append(line)
            widths.append(d.uniform(0.018, 0.030) * (1 - 0.75 * t**4))
        band = s.canvas.blur(s.canvas.ribbons(bands, np.stack(widths)), 0.007) * s.lungs[side]
        total = np.maximum(total, band)
        masks.append(band > 0.3)
    return Lesion(density=0.29 * total, masks=masks)


def nodule(s: Setting, finding: Finding, d: Draws) -> Lesion:
    """A round, well-defined shadow."""
    x, y = zone_spot(s, finding, d)
    radius = max(0.5 * CM * finding.size_mm / 10, 0.038)
    lobed = ellipse(x, y, radius * d.uniform(0.94, 1.06), radius, d.uniform(0, 3))
    core = [x, y] + 0.6 * (lobed - [x, y])
    spot = s.canvas.fill([lobed])
    dome = s.canvas.blur(0.65 * spot + 0.35 * s.canvas.fill([core]), 0.009)
    return Lesion(density=(0.46 - 1.2 * radius) * dome, masks=[spot > 0.5])


def cardiomegaly(s: Setting, finding: Finding, d: Draws) -> Lesion:
    """Only the outline of the heart: the chest is already drawn with an enlarged heart."""
    return Lesion(masks=[s.heart > 0.5])


PAINTERS: dict[str, Painter] = {
    "cardiomegaly": cardiomegaly,
    "effusion": effusion,
    "pneumothorax": pneumothorax,
    "consolidation": consolidation,
    "edema": edema,
    "atelectasis": atelectasis,
    "nodule": nodule,
}


def _grid() -> tuple[FloatArray, FloatArray]:
    """Anatomy coordinates of a coarse grid's cells."""
    line = ((np.arange(GRID, dtype=np.float32) + 0.5) / GRID * 2 - 1) * np.float32(EXTENT)
    cells = np.asarray(line, np.float32)
    return cells[None, :], cells[:, None]


def _clouds(d: Draws, cells: float) -> FloatArray:
    """Smooth noise with standard deviation 1 on the coarse grid, with a correlation length of ``cells`` cells."""
    noise = cv2.GaussianBlur(normal_array(digest(d.uniform()), (GRID, GRID)), (0, 0), cells)
    return np.asarray(noise * np.float32(2 * np.sqrt(np.pi) * cells), np.float32)


def _bronchi(s: Setting, side: str, x: float, y: float, radius: float, d: Draws) -> FloatArray:
    """Open airways that fan out through a consolidation, away from the hilum."""
    x0, y0 = s.chest.hilum(side)
    toward = np.arctan2(y - y0, x - x0)
    t = np.linspace(0, 1, 7)
    lines = []
    for k in range(4):
        start = radius * np.array([-0.75 + 0.25 * (k % 2), 0.22 * (k - 1.5)])
        angle = 0.38 * (k - 1.5) + d.uniform(-0.2, 0.2)
        bend = d.uniform(-0.15, 0.15) * np.sin(2.5 * t)
        length = d.uniform(0.8, 1.4) * t
        u = start[0] + radius * (length * np.cos(angle) - bend * np.sin(angle))
        v = start[1] + radius * (length * np.sin(angle) + bend * np.cos(angle))
        turned = u * np.cos(toward) - v * np.sin(toward), u * np.sin(toward) + v * np.cos(toward)
        lines.append(np.stack([x + turned[0], y + turned[1]], 1))
    taper = np.linspace(0.010, 0.004, 7)
    return s.canvas.ribbons(lines, taper)


def _septal_lines(chest: Chest, side: str, count: int, d: Draws) -> list[Points]:
    """Kerley B lines: short, level, touching the lower lateral wall."""
    lines = []
    for _ in range(count):
        y = chest.patient.apex + d.uniform(0.62, 0.98) * (chest.sulcus(side) - 0.06 - chest.patient.apex)
        wall = float(chest.wall(side, y)) - 0.01
        length = d.uniform(0.07, 0.13)
        lines.append(np.array([[SIGN[side] * wall, y], [SIGN[side] * (wall - length), y + d.uniform(-0.01, 0.01)]]))
    return lines
