"""The phantom's reports, checked by rules that know English but not the generator."""

import re
from collections import Counter

import pytest

from cmcgns.phantom import Finding, PhantomCorpus

CORPUS = PhantomCorpus(3000)
DENIED = re.compile(r"^(no|there is no|no evidence of|normal)\b|without focal|\bis not\b", re.IGNORECASE)
CLAIM = {
    "effusion": r"effusion",
    "pneumothorax": r"pneumothorax",
    "consolidation": r"consolidation|airspace opacity|opacification|pneumonia",
    "edema": r"edema",
    "atelectasis": r"atelectasis",
    "nodule": r"\bnodul",
    "cardiomegaly": r"cardiomegaly|enlarge",
    "device": r"pacemaker|tube|catheter|line (tip|terminates|with|ends)|central line|PICC|sternotomy|drain|devices",
}
SEVERITY = {
    ("effusion", "mild"): "small|trace",
    ("effusion", "moderate"): "moderate",
    ("effusion", "severe"): "large",
    ("pneumothorax", "mild"): "small|tiny",
    ("pneumothorax", "moderate"): "moderate",
    ("pneumothorax", "severe"): "large",
    ("cardiomegaly", "mild"): "mild",
    ("cardiomegaly", "moderate"): "moderate",
    ("cardiomegaly", "severe"): "severe|marked",
    ("edema", "mild"): "mild",
    ("edema", "moderate"): "moderate",
    ("edema", "severe"): "severe",
}
ZONE = {"upper": "upper", "mid": "mid", "lower": "lower|base"}
DEVICE = {
    "pacemaker": "pacemaker",
    "sternotomy wires": "sternotomy",
    "endotracheal tube": "endotracheal|ET tube",
    "enteric tube": "enteric|gastric",
    "internal jugular line": "internal jugular|IJ",
    "subclavian line": "subclavian",
    "PICC": "PICC",
    "chest tube": "chest tube|pleural drain",
}


def body(report: str) -> str:
    """FINDINGS and IMPRESSION."""
    return " ".join(re.search(r"(FINDINGS|IMPRESSION):.*", report, re.DOTALL).group().split())


def claims(report: str) -> list[str]:
    """The sentences that state a finding."""
    plain = re.sub(r"(FINDINGS|IMPRESSION):|\b\d\. (?=[A-Z])", " ", body(report))
    return [s.strip() for s in re.split(r"\.(?:\s|$)", plain) if s.strip() and not DENIED.search(s.strip())]


def describes(sentence: str, finding: Finding) -> bool:
    """Whether the sentence names the finding with its side, zone and severity."""
    if finding.name == "device":
        return bool(re.search(DEVICE[finding.kind], sentence, re.IGNORECASE)) and finding.side in sentence.lower()
    if not re.search(CLAIM[finding.name], sentence, re.IGNORECASE):
        return False
    sides = "bilateral|both|septal|Kerley|vascular|edema" if finding.side == "bilateral" else finding.side
    return all(
        re.search(pattern, sentence, re.IGNORECASE)
        for pattern in (sides, ZONE.get(finding.zone, ""), SEVERITY.get((finding.name, finding.severity), ""))
    )


def is_short(report: str) -> bool:
    """Whether the report has a summary and no description, which may leave a size or a device out."""
    return "FINDINGS:" not in report


@pytest.mark.parametrize("part", range(3))
def test_a_report_names_every_finding_with_its_side_zone_and_severity(part: int) -> None:
    for i in range(part * 500, part * 500 + 500):
        study = CORPUS.study(i)
        sentences = claims(study.report)
        for finding in study.findings:
            if is_short(study.report) and len(study.findings) == 1:
                continue
            assert any(describes(s, finding) for s in sentences), (finding, study.report)


def test_a_short_report_names_its_finding_and_side() -> None:
    for i in range(1500):
        study = CORPUS.study(i)
        if is_short(study.report) and len(study.findings) == 1:
            finding = study.findings[0]
            found = [s for s in claims(study.report) if re.search(CLAIM[finding.name], s, re.IGNORECASE)]
            wanted = "bilateral|both|edema" if finding.side == "bilateral" else finding.side
            assert any(re.search(wanted, s, re.IGNORECASE) for s in found), study.report


def test_a_report_claims_no_finding_that_is_absent() -> None:
    for i in range(1500):
        study = CORPUS.study(i)
        for sentence in claims(study.report):
            for name, pattern in CLAIM.items():
                claimed = re.search(pattern, sentence, re.IGNORECASE)
                assert not claimed or study.labels[name], (name, sentence)


def test_a_report_denies_no_finding_that_is_present() -> None:
    for i in range(1500):
        study = CORPUS.study(i)
        for sentence in re.split(r"\.\s", body(study.report)):
            if DENIED.search(sentence.strip()):
                for name in ("effusion", "pneumothorax", "consolidation", "edema", "nodule"):
                    denied = re.search(CLAIM[name], sentence, re.IGNORECASE)
                    assert not denied or not study.labels[name], sentence


def test_a_one_sided_finding_is_never_put_on_the_other_side() -> None:
    other = {"right": "left", "left": "right"}
    for i in range(1500):
        study = CORPUS.study(i)
        for name in ("effusion", "pneumothorax"):
            sides = {f.side for f in study.findings if f.name == name}
            if len(sides) == 1 and (side := sides.pop()) in other:
                said = [s for s in claims(study.report) if re.search(CLAIM[name], s)]
                assert not any(re.search(rf"\b{other[side]}\b|bilateral", s, re.IGNORECASE) for s in said), said


def words(text: str) -> str:
    return " ".join(re.findall("[a-z]+", text.lower()))


def test_most_reports_are_distinct_and_some_repeat() -> None:
    texts = [words(body(CORPUS.study(i).report)) for i in range(1000)]
    assert 0.60 <= len(set(texts)) / 1000 <= 0.97


def test_no_number_identifies_a_study() -> None:
    numbers = Counter()
    for i in range(3000):
        numbers.update(set(re.findall(r"\d+(?:\.\d+)?", CORPUS.study(i).report)))
    assert numbers
    assert min(numbers.values()) >= 2


def test_reports_contain_no_identifier() -> None:
    for i in range(300):
        study = CORPUS.study(i)
        assert study.study_id[1:] not in study.report
        assert study.patient_id[1:] not in study.report


def test_reports_vary_in_sections_order_and_lists() -> None:
    reports = [CORPUS.study(i).report for i in range(400)]
    for section in ("EXAMINATION", "INDICATION", "TECHNIQUE", "COMPARISON", "FINDINGS", "IMPRESSION"):
        assert 0.3 < sum(f"{section}:" in report for report in reports) / 400 < 1
    assert any("\n1. " in report for report in reports)
    assert any("___" in report for report in reports)
    starts = Counter(body(report).split()[1] for report in reports)
    assert max(starts.values()) < 200


def test_changes_are_mentioned_only_with_a_prior_study() -> None:
    changed = re.compile(r"unchanged|prior study|since ___|Stable compared|compared to ___|not present on ___")
    seen = set()
    for i in range(1000):
        study = CORPUS.study(i)
        if changed.search(body(study.report)):
            assert study.patient_id in seen
        seen.add(study.patient_id)


def test_no_report_is_too_short_to_learn_from() -> None:
    assert min(len(words(body(CORPUS.study(i).report)).split()) for i in range(3000)) >= 4  # the heading and three more
