"""Lines, tubes and implants: their paths and how they are painted."""

import numpy as np

from cmcgns.phantom.anatomy import CM, SIGN, Chest
from cmcgns.phantom.canvas import Draws, Points, curve, ellipse
from cmcgns.phantom.findings import Finding
from cmcgns.phantom.lesions import Lesion, Setting

Path = tuple[Points, float, float]
"""A line, its half width and its density."""


def device(s: Setting, finding: Finding, d: Draws) -> Lesion:
    """Metal or radiopaque plastic over the chest."""
    paths, solids = _PATHS[finding.kind](s.chest, finding, d)
    density = np.zeros_like(s.lungs["right"])
    near = np.zeros_like(density)
    for line, half_width, weight in paths:
        density = np.maximum(density, weight * s.canvas.strokes([line], half_width))
        near = np.maximum(near, s.canvas.strokes([line], max(half_width, 0.014)))
    for outline in solids:
        block = s.canvas.fill([outline])
        density, near = np.maximum(density, 0.50 * block), np.maximum(near, block)
    return Lesion(density=s.canvas.blur(density, 0.002), masks=[near > 0.4])


def cava(chest: Chest, tip: str = "lower SVC") -> tuple[tuple[float, float], tuple[float, float]]:
    """The top of the superior vena cava, right of the midline, and the point in it named ``tip``."""
    x = -0.095 + 0.35 * chest.yaw
    depth = {"upper SVC": -0.06, "mid SVC": 0.05, "lower SVC": 0.16, "cavoatrial junction": 0.28}[tip]
    return (x, chest.carina - 0.22), (x - 0.01, chest.carina + depth)


def _internal_jugular(chest: Chest, finding: Finding, d: Draws) -> tuple[list[Path], list[Points]]:
    top, foot = cava(chest, finding.tip)
    x = SIGN[finding.side] * d.uniform(0.15, 0.22)
    start = (x * 1.25, -1.12), (x, chest.patient.apex - 0.05)
    bend = [(0.5 * x + 0.02, chest.patient.apex + 0.2)] if finding.side == "left" else []
    return [(curve([*start, *bend, top, foot]), 0.0110, 0.34)], []


def _subclavian(chest: Chest, finding: Finding, d: Draws) -> tuple[list[Path], list[Points]]:
    top, foot = cava(chest, finding.tip)
    y = chest.patient.apex + 0.17 + d.uniform(-0.03, 0.05)
    sign = SIGN[finding.side]
    start = (sign * d.uniform(0.55, 0.70), y + 0.06), (sign * 0.42, y), (sign * 0.22, y + 0.03)
    return [(curve([*start, top, foot]), 0.0110, 0.34)], []


def _picc(chest: Chest, finding: Finding, d: Draws) -> tuple[list[Path], list[Points]]:
    top, foot = cava(chest, finding.tip)
    sign, y = SIGN[finding.side], chest.patient.apex + 0.14 + d.uniform(-0.03, 0.05)
    start = (sign * 1.25, y + d.uniform(0.45, 0.75)), (sign * 0.98, y + 0.25), (sign * 0.72, y + 0.04)
    middle = (sign * 0.42, y - 0.01), (sign * 0.22, y + 0.06)
    return [(curve([*start, *middle, top, foot]), 0.0095, 0.32)], []


def _endotracheal(chest: Chest, finding: Finding, d: Draws) -> tuple[list[Path], list[Points]]:
    """Two faint walls and a bright marker line, ending above the carina."""
    tip = chest.carina - CM * finding.size_mm / 10
    y = np.linspace(-1.2, tip, 12)
    x = 0.012 + 0.35 * chest.yaw + 0.5 * chest.spine_x(y)
    walls = [np.stack([x + shift, y], 1) for shift in (-0.021, 0.021)]
    return [(walls[0], 0.0080, 0.34), (walls[1], 0.0080, 0.34), (np.stack([x, y], 1), 0.024, 0.10)], []


def _enteric(chest: Chest, finding: Finding, d: Draws) -> tuple[list[Path], list[Points]]:
    base = chest.dome("left")
    lean = d.uniform(0.02, 0.06)
    knots = [
        (0.0, -1.2), (lean, -0.6), (lean, chest.carina), (0.03, 0.1), (0.06, base + 0.06), (0.20, base + 0.22),
        (d.uniform(0.30, 0.50), base + d.uniform(0.25, 0.45)),
    ]  # fmt: skip
    return [(curve(knots) + np.array([0.2 * chest.yaw, 0.0]), 0.0120, 0.34)], []


def _chest_tube(chest: Chest, finding: Finding, d: Draws) -> tuple[list[Path], list[Points]]:
    sign, w = SIGN[finding.side], chest.half_width(finding.side)
    y = d.uniform(0.0, 0.25)
    top = chest.patient.apex + d.uniform(0.14, 0.3)
    knots = [(sign * (w + 0.35), y + 0.15), (sign * (w + 0.02), y), (sign * 0.78 * w, y - 0.25), (sign * 0.45 * w, top)]
    line = curve(knots)
    return [(line, 0.021, 0.15), (line + np.array([0.012, 0.0]), 0.008, 0.34)], []


def _pacemaker(chest: Chest, finding: Finding, d: Draws) -> tuple[list[Path], list[Points]]:
    """A generator below the clavicle, with one or two leads into the right heart."""
    sign, own = SIGN[finding.side], Draws(chest.patient.key, "generator")
    x, y = sign * own.uniform(0.48, 0.62), chest.patient.apex + own.uniform(0.24, 0.40)
    turn = own.uniform(-0.4, 0.4)
    box = _rounded_box(x, y, 0.088, 0.070, turn)
    top, foot = cava(chest)
    apex = chest.patient.apex
    entry = [(x - sign * 0.04, y - 0.06), (sign * 0.40, apex + 0.14), (sign * 0.2, apex + 0.2)]
    base = 0.5 * (chest.dome("right") + chest.dome("left"))
    ventricle = curve([*entry, top, foot, (-0.08, base - 0.12), (0.06, base + 0.03), (0.24, base - 0.0)])
    atrium = curve([*entry, (top[0] + 0.015, top[1]), foot, (-0.10, base - 0.16), (-0.13, base - 0.26)])
    leads = [ventricle, atrium] if own.chance(0.6) else [ventricle]
    return [(lead, 0.0105, 0.40) for lead in leads], [box]


def _sternotomy(chest: Chest, finding: Finding, d: Draws) -> tuple[list[Path], list[Points]]:
    """Wire loops along the sternum, which moves with the front of a rotated chest."""
    own = Draws(chest.patient.key, "sternotomy")
    paths: list[Path] = []
    for y in np.linspace(chest.patient.apex + 0.26, 0.22, 6):
        x = 0.8 * chest.yaw + own.uniform(-0.012, 0.012)
        loop = ellipse(x, float(y), 0.040, 0.020, own.uniform(-0.3, 0.3))
        paths.append((np.concatenate([loop, loop[:1]]), 0.0105, 0.48))
    return paths, []


_PATHS = {
    "internal jugular line": _internal_jugular,
    "subclavian line": _subclavian,
    "PICC": _picc,
    "endotracheal tube": _endotracheal,
    "enteric tube": _enteric,
    "chest tube": _chest_tube,
    "pacemaker": _pacemaker,
    "sternotomy wires": _sternotomy,
}


def _rounded_box(x: float, y: float, rx: float, ry: float, angle: float) -> Points:
    """The outline of a superellipse."""
    unit = ellipse(0.0, 0.0, 1.0, 1.0)
    blunt = np.sign(unit) * np.abs(unit) ** 0.5 * [rx, ry]
    c, s = np.cos(angle), np.sin(angle)
    placed: Points = blunt @ np.array([[c, s], [-s, c]]) + np.array([x, y])
    return placed


def electrodes(chest: Chest, d: Draws) -> tuple[list[Points], list[Points]]:
    """Wires and discs of electrocardiogram leads; not a finding."""
    wires, discs = [], []
    spots = [(-0.62, -0.42), (0.62, -0.40), (0.55, 0.30), (-0.55, 0.34)]
    for x, y in spots[: 3 + d.integer(2)]:
        x, y = x * d.uniform(0.8, 1.15), y + d.uniform(-0.15, 0.15)
        discs.append(ellipse(x, y, 0.030, 0.030))
        end = (np.sign(x) * d.uniform(0.9, 1.3), y + d.uniform(-0.3, 0.6))
        wires.append(curve([(x, y), (x * 1.1 + 0.05, y + d.uniform(0.05, 0.2)), end]))
    return wires, discs
