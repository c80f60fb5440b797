"""A chest film painted in layers: soft tissue, lungs, bones, findings, exposure, grain."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt

from cmcgns.phantom import devices, skeleton
from cmcgns.phantom.anatomy import DIAPHRAGM, SIGN, Chest, Patient
from cmcgns.phantom.canvas import Canvas, Draws, FloatArray, Points, curve, digest, ellipse, normal_array
from cmcgns.phantom.findings import Condition, Finding
from cmcgns.phantom.lesions import PAINTERS, Lesion, Mask, Setting

SIDES = ("right", "left")
GRAIN = 256  # noise is drawn on this grid, so that every film size shows the same grain
PAINTERS = {**PAINTERS, "device": devices.device}


@dataclass(frozen=True)
class FilmFacts:
    """All parameters of a film except its size."""

    patient: Patient
    condition: Condition
    findings: tuple[Finding, ...]
    study_key: tuple[object, ...]
    film: int


@dataclass
class Painting:
    """A finished film with the masks of everything on it."""

    pixels: npt.NDArray[np.uint8]
    lesions: list[tuple[Finding, Lesion]]
    structures: dict[str, Mask]


def paint(facts: FilmFacts, height: int, width: int) -> Painting:
    """The film of ``facts`` at the given size."""
    draws = Draws(*facts.study_key, "film", facts.film)
    chest = _chest(facts, draws)
    canvas = _pose(height, width, chest.view, draws)
    outlines = {side: chest.lung(side) for side in SIDES}
    lungs = {side: canvas.blur(canvas.fill([outlines[side]]), 0.006) for side in SIDES}
    collapsed = tuple(side for f in facts.findings if f.name == "pneumothorax" for side in f.sides)
    setting = Setting(canvas, chest, outlines, lungs, canvas.fill([chest.heart()]), collapsed)
    lesions = [
        (f, PAINTERS[f.name](setting, f, Draws(*facts.study_key, "lesion", f.name, f.number))) for f in facts.findings
    ]
    density = _chest_density(setting, facts, [lesion for _, lesion in lesions])
    density += _on_skin(setting, facts, draws)
    pixels = _develop(density, canvas, facts, draws)
    structures = {f"lung_{side}": lungs[side] > 0.5 for side in SIDES}
    structures["heart"] = setting.heart > 0.5
    return Painting(pixels, lesions, structures)


def _chest(facts: FilmFacts, d: Draws) -> Chest:
    """The chest in the pose of this film."""
    by_name = {finding.name: finding for finding in facts.findings}
    ratio = facts.patient.heart_ratio
    if "cardiomegaly" in by_name:
        grade = {"mild": 0.545, "moderate": 0.60, "severe": 0.66}[by_name["cardiomegaly"].severity]
        ratio = grade + 0.25 * (ratio - 0.42)
    turn = {"": d.uniform(-0.02, 0.02), "right": -d.uniform(0.10, 0.15), "left": d.uniform(0.10, 0.15)}
    shrunk = by_name.get("atelectasis")
    loss = shrunk.sides if shrunk and shrunk.zone == "lower" and shrunk.severity == "severe" else ()
    condition = facts.condition
    return Chest(
        facts.patient, condition.views[facts.film], condition.inspiration, turn[condition.rotation], ratio, loss
    )


def _pose(height: int, width: int, view: str, d: Draws) -> Canvas:
    """Position of the chest on the film: size, tilt and shift."""
    zoom = d.uniform(0.76, 1.10) * (1.04 if view == "AP" else 1.0)
    tilt = d.normal(0.05 if view == "AP" else 0.03)
    dx, dy = d.uniform(-0.13, 0.13), d.uniform(-0.08, 0.16)
    half = min(height, width) / 2
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]) * zoom * half
    center = np.array([width / 2, height / 2]) + half * np.array([dx, dy + 0.06])
    return Canvas(height, width, np.concatenate([turn, center[:, None]], axis=1))


def _chest_density(s: Setting, facts: FilmFacts, lesions: list[Lesion]) -> FloatArray:
    """Attenuation of the body with its findings."""
    canvas, chest = s.canvas, s.chest
    heart = canvas.blur(s.heart, 0.010)
    middle = canvas.blur(canvas.fill([chest.mediastinum()]), 0.012)
    lung = np.maximum(s.lungs["right"], s.lungs["left"])
    solid = np.maximum(heart * 0.90, middle * 0.96)
    air = lung * (1 - solid)
    filled, bare = np.ones_like(air), np.ones_like(air)
    for lesion in lesions:
        if lesion.filled is not None:
            filled *= 1 - lesion.filled
        if lesion.bare is not None:
            bare *= 1 - np.clip(lesion.bare, 0, 1)
    density = _soft_tissue(s, facts.patient)
    density -= facts.patient.lung_air * air * filled
    density += 0.10 * heart * lung + 0.05 * middle
    density += _vessels(s, facts) * np.sqrt(air) * bare * (0.4 + 0.6 * filled)
    density += _bones(s, facts.patient)
    for lesion in lesions:
        if lesion.density is not None:
            density += lesion.density
    return density


def _soft_tissue(s: Setting, patient: Patient) -> FloatArray:
    """The body without the lungs: thick at the abdomen, thin at the flanks; breasts, trachea, stomach air."""
    canvas, chest = s.canvas, s.chest
    body = canvas.blur(canvas.fill([chest.body()]), 0.012)
    depth = canvas.blur(body, 0.13)
    level = {"slim": 0.60, "average": 0.66, "large": 0.74}[patient.habitus]
    tissue = body * (0.22 + (level - 0.22) * depth * depth)
    domes = s.outlines["right"][DIAPHRAGM], s.outlines["left"][DIAPHRAGM][::-1]
    belly = np.concatenate([*domes, [[1.2, 0.9], [1.3, 1.6], [-1.3, 1.6], [-1.2, 0.9]]])
    tissue += 0.13 * body * canvas.blur(canvas.fill([belly]), 0.03)
    if patient.sex == "F":
        for side in SIDES:
            tissue += 0.055 * canvas.blur(canvas.fill([chest.breast(side)]), 0.012) * body
    x, y = chest.trachea()[-1]
    hila = [chest.hilum(side) for side in SIDES]
    bronchi = [np.linspace([x, y - 0.02], [hx, hy - 0.03], 5) for hx, hy in hila]
    airway = np.maximum(canvas.strokes([chest.trachea()], 0.038), canvas.strokes(bronchi, 0.022))
    tissue -= 0.11 * canvas.blur(airway, 0.008)
    if patient.stomach > 0.04:
        y = chest.dome("left") + 0.06 + patient.stomach * 0.75
        bubble = ellipse(0.36, y, patient.stomach * 1.3, patient.stomach * 0.75, -0.2)
        tissue -= 0.20 * canvas.blur(canvas.fill([bubble]), 0.010)
    return tissue


def _vessels(s: Setting, facts: FilmFacts) -> FloatArray:
    """Vessel markings, wider in the upper lobes of a congested lung; the tree is constant for a patient."""
    p = facts.patient
    congested = any(finding.name == "edema" for finding in facts.findings)
    total = np.zeros((s.canvas.height, s.canvas.width), np.float32)
    for side in SIDES:
        layers = skeleton.vessels(s.chest, side, digest(p.key, side), 1.8 if congested else 0.9)
        for (lines, widths), weight in zip(layers, (1.0, 0.75, 0.75, 0.5), strict=True):
            total += np.float32(weight) * s.canvas.tangle(lines, widths)
    root = s.canvas.fill([skeleton.hilar_shadow(s.chest, side) for side in SIDES])
    soft = s.canvas.blur(np.minimum(total, 1.6), 0.009 if congested else 0.006)
    grain = s.canvas.texture(cv2.GaussianBlur(normal_array(digest(p.key, "lung"), (160, 160)), (0, 0), 1.0))
    markings: FloatArray = p.markings * soft + p.hila * s.canvas.blur(root, 0.03) + np.float32(0.035) * grain
    return markings


def _bones(s: Setting, patient: Patient) -> FloatArray:
    """Ribs, clavicles, scapulae and spine."""
    canvas, chest = s.canvas, s.chest
    back = [skeleton.posterior_ribs(chest, side) for side in SIDES]
    front = [skeleton.anterior_ribs(chest, side, arcs) for side, arcs in zip(SIDES, back, strict=True)]
    bones = 0.095 * _tubular(canvas, np.concatenate(back), 0.030)
    bones += 0.055 * _tubular(canvas, np.concatenate(front), 0.034)
    bones += 0.085 * _tubular(canvas, np.stack([skeleton.clavicle(chest, side) for side in SIDES]), 0.036)
    blades = canvas.fill([skeleton.scapula(chest, side) for side in SIDES])
    bones += 0.045 * canvas.blur(blades, 0.010)
    heads = [ellipse(SIGN[side] * 1.03, chest.patient.apex + 0.10, 0.105, 0.12) for side in SIDES]
    shafts = [np.array([[SIGN[side] * 1.09, chest.patient.apex + 0.12], [SIGN[side] * 1.22, 0.5]]) for side in SIDES]
    bones += 0.07 * canvas.blur(np.maximum(canvas.fill(heads), canvas.strokes(shafts, 0.055)), 0.006)
    column = canvas.strokes([skeleton.spine(chest)], 0.075)
    discs = canvas.ribbons(skeleton.disc_spaces(chest), 0.012)
    bones += canvas.blur(0.085 * column - 0.05 * discs * column, 0.006)
    if patient.old_fracture:
        bones += 0.10 * canvas.blur(_callus(canvas, chest, patient), 0.010)
    if patient.aorta == "calcified":
        bones += 0.14 * canvas.strokes([chest.knob()], 0.011)
    return np.float32(patient.bone) * bones


def _tubular(canvas: Canvas, lines: Points, half_width: float) -> FloatArray:
    """Coverage by long bones, with rims brighter than the marrow."""
    rims = canvas.ribbons(lines, half_width)
    marrow = canvas.ribbons(lines, half_width * 0.62)
    return canvas.blur(rims - 0.42 * marrow, 0.004)


def _callus(canvas: Canvas, chest: Chest, patient: Patient) -> FloatArray:
    """Thickened spots on two or three neighboring ribs: healed fractures."""
    d = Draws(patient.key, "fracture")
    first, at = 3 + d.integer(3), 11 + d.integer(4)
    spots = []
    ribs = skeleton.posterior_ribs(chest, patient.old_fracture)
    for x, y in ribs[first : first + 2 + d.integer(2), at]:
        spots.append(ellipse(x, y, 0.050, 0.034, 0.5 * SIGN[patient.old_fracture]))
    return canvas.fill(spots)


def _on_skin(s: Setting, facts: FilmFacts, d: Draws) -> FloatArray:
    """Structures on or of the skin: leads, nipples, folds. None is a finding."""
    canvas, chest, condition = s.canvas, s.chest, facts.condition
    total = np.zeros((canvas.height, canvas.width), np.float32)
    if condition.leads:
        wires, discs = devices.electrodes(chest, d)
        total += 0.16 * canvas.strokes(wires, 0.006) + 0.26 * canvas.fill(discs)
    if condition.nipples:
        spots = [
            ellipse(SIGN[side] * 0.60 * chest.half_width(side), chest.dome(side) - 0.12, 0.034, 0.030) for side in SIDES
        ]
        total += 0.09 * canvas.blur(canvas.fill(spots), 0.014)
    if condition.skin_fold:
        total += _fold(canvas, chest, condition.skin_fold, d)
    return total


def _fold(canvas: Canvas, chest: Chest, side: str, d: Draws) -> FloatArray:
    """A fold of skin: an edge like a pleural line, but one-sided, with vessels beyond it."""
    x = SIGN[side] * chest.half_width(side)
    lean = d.uniform(0.45, 0.75)
    line = curve([(x * lean, -0.55), (x * (lean + 0.12), -0.1), (x * (lean + 0.10), 0.5)])
    outer = canvas.strokes([line], 0.05)
    band = canvas.blur(outer, 0.03) * outer
    return np.float32(0.07) * band


def _develop(density: FloatArray, canvas: Canvas, facts: FilmFacts, d: Draws) -> npt.NDArray[np.uint8]:
    """Grey levels: scatter, exposure, the film's curve, grain, marker and collimation."""
    view = facts.condition.views[facts.film]
    scatter = canvas.blur(density, 0.20)
    local = d.uniform(0.22, 0.42) if view == "PA" else d.uniform(0.12, 0.34)
    flat = density - local * (scatter - 0.5)
    y = np.linspace(-1, 1, canvas.height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, canvas.width, dtype=np.float32)[None, :]
    flat += np.float32(d.uniform(-0.06, 0.06)) * x + np.float32(d.uniform(-0.07, 0.07)) * y
    clouds = normal_array(digest(*facts.study_key, "shading", facts.film), (5, 5))
    flat += np.float32(0.045) * cv2.resize(clouds, (canvas.width, canvas.height), interpolation=cv2.INTER_CUBIC)
    shift = {"normal": d.uniform(-0.03, 0.03), "under": d.uniform(0.09, 0.13), "over": -d.uniform(0.09, 0.13)}
    middle, slope = 0.43 - shift[facts.condition.exposure], d.uniform(4.8, 6.8)
    grain = normal_array(digest(*facts.study_key, "grain", facts.film), (GRAIN, GRAIN))
    noise = cv2.resize(grain, (canvas.width, canvas.height), interpolation=cv2.INTER_AREA)
    flat += np.float32(d.uniform(0.006, 0.014) * (1.5 if view == "AP" else 1.0)) * noise
    grey = 250 / (1 + np.exp(np.float32(-slope) * (flat - np.float32(middle))))
    grey = _mark(grey, canvas, d)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def _mark(grey: FloatArray, canvas: Canvas, d: Draws) -> FloatArray:
    """The side marker, on its side of the film, and black outside the collimator."""
    height, width = grey.shape
    if d.chance(0.5):
        side = d.choice(("R", "L"))
        x = d.uniform(0.05, 0.10) if side == "R" else d.uniform(0.88, 0.93)
        grey = np.maximum(grey, 245 * _letter(side, x, d.uniform(0.06, 0.20), height, width))
    if d.chance(0.25):
        border = [d.uniform(0.0, 0.05) for _ in range(4)]
        ys = (np.arange(height, dtype=np.float32) + 0.5)[:, None] / height
        xs = (np.arange(width, dtype=np.float32) + 0.5)[None, :] / width
        across = np.minimum(xs - border[0], 1 - border[1] - xs)
        down = np.minimum(ys - border[2], 1 - border[3] - ys)
        grey = grey * np.clip(np.minimum(across, down) * 300 + 0.5, 0, 1)
    return grey


def _letter(letter: str, x: float, y: float, height: int, width: int) -> FloatArray:
    """Coverage by a lead letter centered at (x, y), as fractions of the film."""
    size = 0.022
    strokes = {
        "R": [[(-1, 1.4), (-1, -1.4), (0.6, -1.4), (1, -0.7), (0.6, 0.0), (-1, 0.0)], [(-0.1, 0.0), (1, 1.4)]],
        "L": [[(-0.8, -1.4), (-0.8, 1.4), (1, 1.4)]],
    }[letter]
    side = float(min(height, width))
    plain = Canvas(height, width, np.array([[side, 0, x * width], [0, side, y * height]]))
    lines = [np.asarray(stroke) * size for stroke in strokes]
    legs = [line[k : k + 2] for line in lines for k in range(len(line) - 1)]
    return plain.ribbons(legs, 0.006)


def without(facts: FilmFacts, name: str) -> FilmFacts:
    """The facts without the finding ``name``; nothing else changes."""
    return replace(facts, findings=tuple(f for f in facts.findings if f.name != name))
