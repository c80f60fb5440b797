"""Findings and condition of a study: the facts from which both film and report are made."""

from dataclasses import dataclass

from cmcgns.phantom.anatomy import Patient
from cmcgns.phantom.canvas import Draws

FINDINGS: tuple[str, ...] = (
    "cardiomegaly",
    "effusion",
    "pneumothorax",
    "consolidation",
    "edema",
    "atelectasis",
    "nodule",
    "device",
)
"""Every label, in the order of all tables. A study without any of them is normal."""
ZONES = ("upper", "mid", "lower")
NODULE_MM = (10, 12, 15, 18, 20, 25, 30)
TUBE_MM = (20, 30, 40, 50, 60)
TIPS = ("upper SVC", "mid SVC", "lower SVC", "cavoatrial junction")
BEDSIDE = ("endotracheal tube", "enteric tube", "chest tube")
"""Devices of patients who cannot stand for a film."""
VENOUS = ("internal jugular line", "subclavian line", "PICC")
DEVICES = (
    "pacemaker",
    "sternotomy wires",
    "endotracheal tube",
    "enteric tube",
    "internal jugular line",
    "subclavian line",
    "PICC",
    "chest tube",
)

_SHARE = {  # of the studies that are not normal by design
    "cardiomegaly": 0.28,
    "effusion": 0.30,
    "pneumothorax": 0.24,
    "consolidation": 0.30,
    "edema": 0.20,
    "atelectasis": 0.28,
    "nodule": 0.26,
    "device": 0.30,
}

_NORMAL = 0.20


@dataclass(frozen=True)
class Finding:
    """One finding visible on the films of a study."""

    name: str
    side: str = ""
    """``right``, ``left``, ``bilateral``, or empty for the midline."""
    zone: str = ""
    """``upper``, ``mid``, ``lower``, or empty if the finding has no zone."""
    severity: str = ""
    kind: str = ""
    """The kind of device."""
    size_mm: int = 0
    """A nodule's diameter, or the height of an endotracheal tube's tip above the carina."""
    tip: str = ""
    """Tip position of a venous line."""
    number: int = 0
    """Index among the study's findings of this name; seeds its geometry."""

    @property
    def sides(self) -> tuple[str, ...]:
        """Its one or two sides."""
        return ("right", "left") if self.side == "bilateral" else (self.side,) if self.side else ()


@dataclass(frozen=True)
class Condition:
    """How the films were taken, and overlying structures that are not findings."""

    views: tuple[str, ...]
    inspiration: str
    """``low``, ``normal`` or ``deep``."""
    rotation: str
    """Side to which the patient is rotated, or empty."""
    exposure: str
    """``under`` (too bright), ``normal`` or ``over``."""
    leads: bool
    """Electrocardiogram leads."""
    nipples: bool
    """Nipple shadows over both bases."""
    skin_fold: str
    """Side of a skin fold that mimics a pleural line, or empty."""

    @classmethod
    def draw(cls, bedside: bool, *key: object) -> "Condition":
        """The condition of study ``key``; two films in about 15 % of studies, all AP at the bedside."""
        d = Draws(*key, "condition")
        first = d.weighted((("PA", 0.60), ("AP", 0.40)))
        second = () if d.chance(0.85) else (d.weighted((("AP", 0.8), ("PA", 0.2))),)
        views = (first, *second)
        bedside = bedside or first == "AP"
        return cls(
            views=("AP",) * len(views) if bedside else views,
            inspiration=d.weighted((("low", 0.22 if bedside else 0.12), ("normal", 0.65), ("deep", 0.12))),
            rotation=d.weighted((("", 0.68), ("right", 0.16), ("left", 0.16))),
            exposure=d.weighted((("normal", 0.72), ("under", 0.14), ("over", 0.14))),
            leads=d.chance(0.35 if bedside else 0.06),
            nipples=d.chance(0.09),
            skin_fold=d.weighted((("", 0.88), ("right", 0.06), ("left", 0.06))),
        )


def draw_findings(patient: Patient, *key: object) -> tuple[Finding, ...]:
    """The findings of study ``key``, in the order of ``FINDINGS``."""
    d = Draws(*key, "findings")
    names = {name for name, share in _SHARE.items() if d.chance(share)} or {d.choice(FINDINGS)}
    if d.chance(_NORMAL):
        names = set()
    drawn: list[Finding] = []
    for name in FINDINGS:
        if name == "device":
            drawn += _devices(patient, name in names, drawn, d)
        elif name in names:
            drawn += _DRAW[name](d, drawn)
    return tuple(drawn)


def _severity(d: Draws) -> str:
    return d.weighted((("mild", 0.3), ("moderate", 0.4), ("severe", 0.3)))


def _side(d: Draws, bilateral: float) -> str:
    return d.weighted((("right", 0.5 - bilateral / 2), ("left", 0.5 - bilateral / 2), ("bilateral", bilateral)))


def _cardiomegaly(d: Draws, others: list[Finding]) -> list[Finding]:
    return [Finding("cardiomegaly", severity=_severity(d))]


def _effusion(d: Draws, others: list[Finding]) -> list[Finding]:
    """Fluid on one side or, if not severe, on both."""
    side, severity = _side(d, 0.3), _severity(d)
    if side == "bilateral" and severity == "severe":
        severity = "moderate"
    return [Finding("effusion", side=side, severity=severity)]


def _pneumothorax(d: Draws, others: list[Finding]) -> list[Finding]:
    return [Finding("pneumothorax", side=_side(d, 0.0), severity=_severity(d))]


def _free_zones(d: Draws, others: list[Finding]) -> list[tuple[str, str]]:
    """Sides and zones in random order, without those hidden by an effusion, because reports describe what is visible."""
    hidden = {"": 0, "mild": 0, "moderate": 1, "severe": 2}
    depth = dict.fromkeys(("right", "left"), 0)
    for finding in others:
        if finding.name == "effusion":
            depth |= dict.fromkeys(finding.sides, hidden[finding.severity])
    return d.shuffled([(side, zone) for side, lost in depth.items() for zone in ZONES[: 3 - lost]])


def _consolidation(d: Draws, others: list[Finding]) -> list[Finding]:
    """One or two patches in different zones."""
    count = d.weighted(((1, 0.7), (2, 0.3)))
    return [
        Finding("consolidation", side=side, zone=zone, severity=_severity(d), number=k)
        for k, (side, zone) in enumerate(_free_zones(d, others)[:count])
    ]


def _edema(d: Draws, others: list[Finding]) -> list[Finding]:
    return [Finding("edema", side="bilateral", severity=_severity(d))]


def _atelectasis(d: Draws, others: list[Finding]) -> list[Finding]:
    """Bands at one base or both, or in one mid lung."""
    free, severity = _free_zones(d, others), _severity(d)
    bases = [side for side, zone in free if zone == "lower"]
    if bases and d.chance(0.75):
        both = len(bases) == 2 and d.chance(0.3)
        return [Finding("atelectasis", side="bilateral" if both else bases[0], zone="lower", severity=severity)]
    side = next(side for side, zone in free if zone == "mid")
    return [Finding("atelectasis", side=side, zone="mid", severity=severity)]


def _nodule(d: Draws, others: list[Finding]) -> list[Finding]:
    """One or two nodules in different zones."""
    count = d.weighted(((1, 0.8), (2, 0.2)))
    return [
        Finding("nodule", side=side, zone=zone, size_mm=d.choice(NODULE_MM), number=k)
        for k, (side, zone) in enumerate(_free_zones(d, others)[:count])
    ]


_DRAW = {
    "cardiomegaly": _cardiomegaly,
    "effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "consolidation": _consolidation,
    "edema": _edema,
    "atelectasis": _atelectasis,
    "nodule": _nodule,
}


def _devices(patient: Patient, present: bool, others: list[Finding], d: Draws) -> list[Finding]:
    """The patient's implants, and the lines and tubes of this study."""
    kinds = set(patient.implants)
    if present:
        count = d.weighted(((1, 0.55), (2, 0.3), (3, 0.15)))
        kinds |= set(d.shuffled(DEVICES[2:7])[:count])
    collapsed = [finding.side for finding in others if finding.name == "pneumothorax"]
    if collapsed and d.chance(0.3):
        kinds.add("chest tube")
    side = {
        "pacemaker": "left" if Draws(patient.key, "pacemaker").chance(0.8) else "right",
        "internal jugular line": d.weighted((("right", 0.75), ("left", 0.25))),
        "subclavian line": d.choice(("right", "left")),
        "PICC": d.choice(("right", "left")),
        "chest tube": collapsed[0] if collapsed else "",
    }
    size = {"endotracheal tube": d.choice(TUBE_MM)}
    tip = {kind: d.choice(TIPS) for kind in VENOUS}
    worn = [kind for kind in DEVICES if kind in kinds]
    return [
        Finding("device", side=side.get(k, ""), kind=k, size_mm=size.get(k, 0), tip=tip.get(k, ""), number=n)
        for n, k in enumerate(worn)
    ]
