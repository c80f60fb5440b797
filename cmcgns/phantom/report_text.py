"""The report of a study: its findings in varying words, and the other sections that radiologists write."""

import re
from dataclasses import dataclass

from cmcgns.phantom import phrases
from cmcgns.phantom.anatomy import LARGE_STOMACH, Patient
from cmcgns.phantom.canvas import Draws
from cmcgns.phantom.findings import Condition, Finding

LUNG = {"consolidation", "edema", "nodule", "atelectasis"}
"""The lungs may be called clear only without these."""
PLEURA = {"effusion", "pneumothorax"}


@dataclass(frozen=True)
class ReportFacts:
    """The facts that a report may mention."""

    patient: Patient
    condition: Condition
    findings: tuple[Finding, ...]
    prior: tuple[Finding, ...] | None
    """The findings of the patient's previous study."""

    @property
    def present(self) -> set[str]:
        """Names of the findings."""
        return {finding.name for finding in self.findings}


def write_report(facts: ReportFacts, *key: object) -> str:
    """The report of study ``key``, with blank lines between sections."""
    d = Draws(*key, "report")
    preamble = _preamble(facts, d)
    findings, impression = _body(facts, d)
    named = ("FINDINGS:  " + findings if findings else "", "IMPRESSION:  " + impression if impression else "")
    return "\n\n".join(section for section in (*preamble, *named) if section)


def _body(facts: ReportFacts, d: Draws) -> tuple[str, str]:
    """FINDINGS and IMPRESSION, one of which may be empty."""
    if not facts.findings and d.chance(0.5):
        return d.choice(phrases.STOCK_NORMAL)
    if len(facts.findings) == 1 and not facts.present & {"device", "cardiomegaly"} and d.chance(0.2):
        return "", _impression(facts, d)
    style = d.weighted((("both", 0.80), ("findings", 0.10), ("impression", 0.10)))
    description = "  ".join(_findings(facts, d))
    if style == "impression":  # the whole description under one heading, as is common on wards
        return "", description
    return description, _impression(facts, d) if style == "both" else ""


def word(template: str, finding: Finding, d: Draws) -> str:
    """``template`` with size, side and location of the finding."""
    size = d.choice(phrases.SIZE[finding.name][finding.severity]) if finding.severity else ""
    return _fill(
        template,
        size=size,
        sizely=size + "ly" if size != "marked" else "markedly",
        side=finding.side,
        place=d.choice(phrases.locations(finding)),
        length=d.choice(phrases.LENGTH[finding.size_mm]) if finding.size_mm else "",
        tip=finding.tip,
        device=finding.kind,
    )


def _fill(template: str, **slots: str) -> str:
    """``template`` with its slots filled, and capitals for capitalised slots and at the start."""
    capitals = {name.capitalize(): value[:1].upper() + value[1:] for name, value in slots.items()}
    text = template.format(**slots, **capitals).replace("the both", "both")
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[:1].upper() + text[1:]


def _preamble(facts: ReportFacts, d: Draws) -> list[str]:
    """Some of EXAMINATION, INDICATION, TECHNIQUE and COMPARISON."""
    views = facts.condition.views
    portable = views[0] == "AP"
    sections = []
    if d.chance(0.7):
        exams = ("CHEST (PORTABLE AP)", "CHEST PORT. LINE PLACEMENT", "Portable chest radiograph") if portable else (
            "CHEST (PA ONLY)", "CHEST RADIOGRAPH", "Chest radiograph PA")  # fmt: skip
        sections.append("EXAMINATION:  " + d.choice(exams))
    if d.chance(0.75):
        who = "woman" if facts.patient.sex == "F" else "man"
        years = d.choice(("___ year old", "___-year-old", "___F" if facts.patient.sex == "F" else "___M"))
        person = years if years[-1] in "FM" else f"{years} {who}"
        sections.append(f"INDICATION:  {person} {d.choice(phrases.INDICATIONS)}.")
    if d.chance(0.5):
        how = "Portable AP view of the chest." if portable else "PA view of the chest."
        how = how if len(views) == 1 else "Two frontal views of the chest."
        sections.append("TECHNIQUE:  " + d.choice((how, how, how.replace("chest", "chest was obtained"))))
    if d.chance(0.6):
        sections.append("COMPARISON:  " + (d.choice(("___.", "Radiograph of ___.", "___")) if facts.prior else "None."))
    return d.shuffled(sections) if d.chance(0.15) else sections


def _findings(facts: ReportFacts, d: Draws) -> list[str]:
    """The sentences of FINDINGS: topics in one of several orders."""
    topics = {
        "technique": _technique(facts, d),
        "devices": [word(d.choice(phrases.sentences(f)), f, d) for f in facts.findings if f.name == "device"],
        "lungs": _lungs(facts, d),
        "heart": _heart(facts, d),
        "rest": _rest(facts, d),
    }
    orders = (
        ("technique", "devices", "lungs", "heart", "rest"),
        ("technique", "lungs", "heart", "rest", "devices"),
        ("devices", "technique", "heart", "lungs", "rest"),
        ("heart", "lungs", "rest", "devices", "technique"),
        ("lungs", "heart", "devices", "technique", "rest"),
    )
    return [sentence for topic in d.choice(orders) for sentence in topics[topic]]


def _technique(facts: ReportFacts, d: Draws) -> list[str]:
    """Remarks on how the film was taken, if it was not as usual."""
    condition, sentences = facts.condition, []
    if condition.inspiration != "normal" and d.chance(0.92):
        sentences.append(d.choice(phrases.INSPIRATION[condition.inspiration]))
    if condition.rotation and d.chance(0.88):
        sentences.append(_fill(d.choice(phrases.ROTATION), side=condition.rotation))
    if condition.exposure != "normal" and d.chance(0.85):
        sentences.append(d.choice(phrases.EXPOSURE[condition.exposure]))
    if facts.patient.habitus == "large" and d.chance(0.7):
        sentences.append(d.choice(phrases.HABITUS["large"]))
    return sentences


def _lungs(facts: ReportFacts, d: Draws) -> list[str]:
    """Lungs and pleura: present findings, then absent ones."""
    sentences = []
    for finding in d.shuffled([f for f in facts.findings if f.name not in ("cardiomegaly", "device")]):
        sentences.append(word(d.choice(phrases.sentences(finding)), finding, d))
        change = _change(finding, facts.prior)
        if change and d.chance(0.35):
            sentences.append(d.choice(phrases.CHANGES[change]))
    if not facts.present & LUNG and d.chance(0.7):
        sentences.append(d.choice(phrases.OTHERWISE_CLEAR if facts.present & PLEURA else phrases.CLEAR))
    denials = _denials(facts, d)
    return denials + sentences if d.chance(0.15) else sentences + denials


def _denials(facts: ReportFacts, d: Draws) -> list[str]:
    """Sentences that deny absent findings, one to three at a time."""
    weights = {"effusion": 0.8, "pneumothorax": 0.8, "consolidation": 0.6, "edema": 0.35, "nodule": 0.08}
    absent = [name for name, share in weights.items() if name not in facts.present and d.chance(share)]
    sentences = [d.choice(phrases.ABSENT[name]) for name in d.shuffled(absent)]
    cut = 2 if len(sentences) > 3 or (len(sentences) > 1 and d.chance(0.2)) else 0
    return [_fill(d.choice(phrases.DENIALS), list=_listed(part)) for part in (sentences[:cut], sentences[cut:]) if part]


def _listed(items: list[str]) -> str:
    """``a, b or c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " or " + items[-1]


def _change(finding: Finding, prior: tuple[Finding, ...] | None) -> str:
    """Change of a finding since the previous study: new, worse, better, same, or empty without one."""
    if prior is None or finding.name == "nodule":
        return ""
    grades = ("mild", "moderate", "severe")
    before = [f for f in prior if f.name == finding.name and (f.side, f.zone) == (finding.side, finding.zone)]
    if not before:
        return "" if any(f.name == finding.name for f in prior) else "new"
    now, then = grades.index(finding.severity), grades.index(before[0].severity)
    return "same" if now == then else "worse" if now > then else "better"


def _heart(facts: ReportFacts, d: Draws) -> list[str]:
    """Heart, aorta and mediastinum."""
    large = [f for f in facts.findings if f.name == "cardiomegaly"]
    sentences = [word(d.choice(phrases.sentences(f)), f, d) for f in large]
    if not large and d.chance(0.85):
        sentences.append(
            d.choice([s for s in phrases.HEART_NORMAL if facts.patient.aorta == "normal" or "media" not in s])
        )
    if facts.patient.aorta != "normal":
        if d.chance(0.8):
            sentences.append(d.choice(phrases.AORTA[facts.patient.aorta]))
    elif d.chance(0.4):
        sentences.append(d.choice(phrases.MEDIASTINUM_NORMAL))
    return sentences


def _rest(facts: ReportFacts, d: Draws) -> list[str]:
    """Bones, diaphragm, overlying structures and general remarks."""
    patient, condition = facts.patient, facts.condition
    sentences = []
    if patient.scoliosis and d.chance(0.85):
        sentences.append(d.choice(phrases.SCOLIOSIS["left" if patient.scoliosis > 0 else "right"]))
    if patient.old_fracture and d.chance(0.8):
        sentences.append(_fill(d.choice(phrases.FRACTURE), side=patient.old_fracture))
    if patient.raised_dome and d.chance(0.85):
        sentences.append(_fill(d.choice(phrases.RAISED_DOME), side=patient.raised_dome))
    if patient.stomach > LARGE_STOMACH and d.chance(0.6):
        sentences.append(d.choice(phrases.STOMACH))
    if condition.leads and d.chance(0.75):
        sentences.append(d.choice(phrases.LEADS))
    if condition.nipples and d.chance(0.75):
        sentences.append(d.choice(phrases.NIPPLES))
    if condition.skin_fold and d.chance(0.6):
        sentences.append(_fill(d.choice(phrases.SKIN_FOLD), side=condition.skin_fold))
    if not (patient.scoliosis or patient.old_fracture) and d.chance(0.4):
        sentences.append(d.choice(phrases.REMARKS))
    return sentences


def _impression(facts: ReportFacts, d: Draws) -> str:
    """The summary: worst findings first, sometimes as a numbered list."""
    rank = ("pneumothorax", "consolidation", "edema", "effusion", "nodule", "cardiomegaly", "atelectasis", "device")
    chosen = sorted(facts.findings, key=lambda f: rank.index(f.name))
    devices = [f for f in chosen if f.name == "device" and d.chance(0.5)]
    chosen = [f for f in chosen if f.name != "device"] + devices[:1]
    lines = [word(d.choice(phrases.summaries(f)), f, d) for f in chosen[:4]]
    if not lines:
        return d.choice(phrases.QUIET_SUMMARY if facts.findings else phrases.NORMAL_SUMMARY)
    if len(lines) > 1 and d.chance(0.5):
        return "\n\n" + "\n".join(f"{k}. {line}" for k, line in enumerate(lines, 1))
    return "  ".join(lines)
