"""A patient's chest: constant traits, pose for one film, and the outlines of the organs.

Lengths are in units of half the plain film's width (about 17 cm), so 0.06 is a centimeter.
"""

from dataclasses import dataclass

import numpy as np

from cmcgns.phantom.canvas import Draws, Points, curve, ellipse

SIGN = {"right": -1.0, "left": 1.0}  # the patient's right is the image's left
CM = 0.059
LATERAL, DIAPHRAGM = slice(0, 33), slice(33, 49)
"""Parts of a lung's outline along the chest wall and along the diaphragm."""
_DOWN = np.linspace(0.03, 1.0, 9)
_ACROSS = np.linspace(1, -0.75, 16)  # 1 at the costophrenic angle, 0 under the dome's top
LARGE_STOMACH = 0.15
"""Reports mention an air bubble above this size."""


@dataclass(frozen=True)
class Patient:
    """Traits that are the same in all studies of a patient."""

    patient_id: str
    sex: str
    habitus: str
    """``slim``, ``average`` or ``large``."""
    chest_width: float
    apex: float
    dome: float
    heart_ratio: float
    """Heart width over chest width without cardiomegaly."""
    rib_spacing: float
    rib_slope: float
    bone: float
    scoliosis: float
    """Sideways bend of the spine, 0 for most."""
    aorta: str
    """``normal``, ``tortuous`` or ``calcified``."""
    old_fracture: str
    """Side of healed rib fractures, or empty."""
    raised_dome: str
    """Side of an elevated hemidiaphragm, or empty."""
    implants: tuple[str, ...]
    stomach: float
    """Size of the air bubble in the stomach, 0 for none."""
    markings: float
    """Density of the lung vessels."""
    hila: float
    """Density of the lungs' roots."""
    lung_air: float
    """How much darker the lungs are than soft tissue."""
    key: str

    @classmethod
    def draw(cls, patient_id: str, *key: object) -> "Patient":
        """The patient of ``key``."""
        d = Draws(*key, "patient")
        habitus = d.weighted((("slim", 0.25), ("average", 0.5), ("large", 0.25)))
        return cls(
            patient_id=patient_id,
            sex=d.choice(("F", "M")),
            habitus=habitus,
            chest_width=d.uniform(0.66, 0.78) + {"slim": -0.03, "average": 0.0, "large": 0.02}[habitus],
            apex=d.uniform(-0.84, -0.74),
            dome=d.uniform(0.28, 0.44),
            heart_ratio=d.uniform(0.37, 0.465),
            rib_spacing=d.uniform(0.120, 0.142),
            rib_slope=d.uniform(0.75, 1.3),
            bone=d.uniform(0.7, 1.25),
            scoliosis=d.weighted(((0.0, 0.82), (-1.0, 0.09), (1.0, 0.09))) * d.uniform(0.06, 0.11),
            aorta=d.weighted((("normal", 0.7), ("tortuous", 0.16), ("calcified", 0.14))),
            old_fracture=d.weighted((("", 0.86), ("right", 0.07), ("left", 0.07))),
            raised_dome=d.weighted((("", 0.86), ("right", 0.09), ("left", 0.05))),
            implants=tuple(kind for kind in ("pacemaker", "sternotomy wires") if d.chance(0.08)),
            stomach=max(0.0, d.uniform(-0.12, 0.20)),
            markings=d.uniform(0.095, 0.160),
            hila=d.uniform(0.06, 0.26),
            lung_air=d.uniform(0.34, 0.44),
            key=repr(key),
        )


@dataclass(frozen=True)
class Chest:
    """The outlines of one patient in one study, from the front or the back."""

    patient: Patient
    view: str
    inspiration: str
    """``low``, ``normal`` or ``deep``."""
    yaw: float
    """Rotation of the trunk, positive to the patient's left; it shifts structures in front."""
    heart_ratio: float
    volume_loss: tuple[str, ...] = ()
    """Sides with volume loss at the base."""

    def half_width(self, side: str) -> float:
        """Distance from the midline to the chest wall; the side rotated away from the detector is narrower."""
        return self.patient.chest_width * (1 + 0.9 * self.yaw * SIGN[side])

    def dome(self, side: str) -> float:
        """Height of the hemidiaphragm's top."""
        level = self.patient.dome + (0.0 if side == "right" else 0.035)
        level += {"low": -0.15, "normal": 0.0, "deep": 0.10}[self.inspiration]
        level -= 0.04 if self.view == "AP" else 0.0
        level -= 0.11 if self.patient.raised_dome == side else 0.0
        return level - (0.07 if side in self.volume_loss else 0.0)

    def sulcus(self, side: str) -> float:
        """Depth of the costophrenic angle."""
        return self.dome(side) + {"low": 0.17, "normal": 0.20, "deep": 0.15}[self.inspiration]

    def wall(self, side: str, y: Points | float) -> Points:
        """The lung's lateral border (unsigned x) at height ``y``."""
        top, low = self.patient.apex, self.sulcus(side)
        depth = (np.asarray(y, np.float64) - top) / (low - top)
        share = np.interp(depth, [0.0, 0.05, 0.15, 0.35, 0.6, 0.85, 1.0], [0.42, 0.58, 0.73, 0.88, 0.97, 1.0, 0.985])
        width: Points = share * self.half_width(side)
        return width

    def lung(self, side: str) -> Points:
        """The lung field's outline, down to the diaphragm and in to the spine."""
        top, low, dome, w = self.patient.apex, self.sulcus(side), self.dome(side), self.half_width(side)
        ys = top + (low - top) * _DOWN
        lateral = curve(list(zip(self.wall(side, ys), ys, strict=True)), 4)
        t = _ACROSS
        peak, end = 0.50 * w, float(self.wall(side, low))
        x = peak + np.where(t > 0, (end - peak) * t, (peak - 0.02) * t)
        y = dome + np.where(t > 0, (low - dome) * np.abs(t) ** 2.2, 0.10 * t**2)
        medial = curve([(0.05, low - 0.15), (0.04, 0.0), (0.06, -0.4), (0.10, top + 0.16), (0.20, top + 0.03)], 4)
        outline = np.concatenate([lateral, np.stack([x, y], 1), medial, [(0.32 * w + 0.06, top - 0.005)]])
        return self._placed(outline, side)

    def heart(self) -> Points:
        """The heart's outline, with two thirds on the patient's left."""
        span = 2 * self.patient.chest_width * self.heart_ratio * (1.08 if self.view == "AP" else 1.0)
        base = 0.5 * (self.dome("right") + self.dome("left")) + 0.06
        r, left, rise = 0.34 * span, 0.66 * span, 0.52 + 0.25 * (span - 0.6)
        h = lambda share: base - rise * (1 - share)
        knots = [
            (-r, h(0.62)), (-0.86 * r, h(0.28)), (-0.11, h(0.02)), (0.03, h(-0.06)), (0.14, h(0.05)),
            (0.16 + 0.25 * (left - 0.3), h(0.25)), (0.74 * left, h(0.5)), (0.95 * left, h(0.74)), (left, h(0.9)),
            (0.88 * left, h(1.06)), (0.4 * left, h(1.16)), (-0.6 * r, h(1.12)), (-0.95 * r, h(0.9)),
        ]  # fmt: skip
        return _moved(curve(knots, 5, closed=True), 0.55 * self.yaw)

    def mediastinum(self) -> Points:
        """The band between the lungs, with the aortic knob on the left."""
        wide = 1.15 if self.view == "AP" else 1.0
        knob = {"normal": 0.15, "calcified": 0.165, "tortuous": 0.195}[self.patient.aorta] * wide
        y = -0.45 + 0.1 * (self.patient.dome - 0.36)
        left = [
            (0.10, -1.2), (0.09, y - 0.28), (0.10 * wide, y - 0.15), (knob * 0.93, y - 0.05), (knob, y + 0.02),
            (knob * 0.88, y + 0.09), (0.10, y + 0.17), (0.13, y + 0.3), (0.11, 0.5), (0.10, 1.3),
        ]  # fmt: skip
        bulge = 0.03 if self.patient.aorta == "tortuous" else 0.0
        right = [
            (-0.09, 1.3),
            (-0.10, 0.5),
            (-0.12, y + 0.25),
            (-0.11 * wide - bulge, y),
            (-0.085, y - 0.3),
            (-0.10, -1.2),
        ]
        return _moved(np.concatenate([curve(left, 4), curve(right, 4)]), 0.4 * self.yaw)

    def knob(self) -> Points:
        """The aortic arch's calcified rim."""
        reach = 0.165 * (1.15 if self.view == "AP" else 1.0)
        y = -0.43 + 0.1 * (self.patient.dome - 0.36)
        t = np.linspace(-1.2, 1.1, 10)
        return np.stack([0.085 + (reach - 0.095) * np.cos(t) + 0.4 * self.yaw, y + 0.07 * np.sin(t)], 1)

    def spine_x(self, y: Points) -> Points:
        """The spine's midline, bent by scoliosis."""
        bend: Points = self.patient.scoliosis * np.sin((y + 0.75) * 2.4) * (y < 1.0)
        return bend

    def body(self) -> Points:
        """Skin outline: neck, shoulders, upper arms and flanks."""
        fat = {"slim": 0.08, "average": 0.15, "large": 0.27}[self.patient.habitus]
        drop = 0.06 if self.view == "AP" else 0.0
        flank = self.patient.chest_width + fat
        half = [
            (0.21 + 0.3 * fat, -1.6), (0.23 + 0.3 * fat, -1.06), (0.42, -0.97 + drop), (0.75, -0.88 + drop),
            (1.05, -0.78 + drop), (1.35, -0.5), (1.4, -0.1), (1.25, 0.05), (flank + 0.14, -0.12), (flank + 0.03, 0.1),
            (flank, 0.5), (flank + 0.04, 1.6),
        ]  # fmt: skip
        right = curve([(-x, y) for x, y in half], 4)
        return np.concatenate([curve(half, 4), right[::-1]])

    def trachea(self) -> Points:
        """The windpipe's midline, down to the carina."""
        y = np.linspace(-1.15, self.carina, 10)
        return np.stack([0.012 + 0.35 * self.yaw + 0.5 * self.spine_x(y), y], 1)

    @property
    def carina(self) -> float:
        """Height at which the windpipe divides."""
        return -0.30 + 0.3 * (self.patient.dome - 0.36)

    def hilum(self, side: str) -> tuple[float, float]:
        """Point where the vessels of one lung start; the left one is higher."""
        return SIGN[side] * 0.15 + 0.3 * self.yaw, self.carina + (0.13 if side == "right" else 0.08)

    def breast(self, side: str) -> Points:
        """The breast's shadow."""
        size = {"slim": 0.26, "average": 0.32, "large": 0.40}[self.patient.habitus]
        x = SIGN[side] * self.half_width(side) * 0.66 + 0.5 * self.yaw
        return ellipse(x, self.dome(side) - 0.04, size, size * 0.85)

    def _placed(self, outline: Points, side: str) -> Points:
        """An outline given for positive x, moved to its side of a bent and rotated chest."""
        placed = outline * [SIGN[side], 1.0]
        return placed + np.stack([0.3 * self.spine_x(placed[:, 1]), np.zeros(len(placed))], 1)


def _moved(outline: Points, across: float) -> Points:
    """``outline``, shifted sideways."""
    moved: Points = outline + np.array([across, 0.0])
    return moved
