"""Reports in every layout seen or imagined."""

import contextlib
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from cmcgns.data.reports import normalised_words, parse_report, report_text, sections, sentences, text_hash
from cmcgns.errors import BadRow
from cmcgns.phantom import PhantomCorpus
from cmcgns.phantom.canvas import Draws
from cmcgns.phantom.writers import report_file
from tests.data.reference_sections import reads, reference_sections

GOLDEN = yaml.safe_load(Path(__file__).with_name("golden_reports.yaml").read_text())


@pytest.mark.parametrize("golden", GOLDEN, ids=[golden["name"] for golden in GOLDEN])
def test_golden_report(golden: dict[str, Any]) -> None:
    assert sections(golden["text"]) == golden["sections"]
    assert parse_report(golden["text"]).sentences == golden["sentences"]


def test_there_are_at_least_sixty_golden_reports() -> None:
    assert len({golden["text"] for golden in GOLDEN}) >= 60


def test_sections_match_the_reference_parser() -> None:
    """The golden reports in MIMIC's own layout, and 200 generated ones as files."""
    texts = [golden["text"] for golden in GOLDEN if reads(golden["text"])]
    corpus = PhantomCorpus(200, seed=11)
    texts += [report_file(corpus.study(number).report, Draws(number)) for number in range(200)]
    compared = 0
    for text in texts:
        theirs, ours = reference_sections(text), sections(text)
        found = [name for name in ("impression", "findings") if name in theirs]
        compared += len(found)
        for name in found:
            assert ours[name].split() == theirs[name].split(), text
    assert compared >= 300


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends_do_not_change_a_report(line_end: str) -> None:
    for golden in GOLDEN:
        text = golden["text"].replace("\r\n", "\n")
        assert parse_report(text.replace("\n", line_end)) == parse_report(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A 2.5 cm nodule. No effusion.", ["A 2.5 cm nodule.", "No effusion."]),
        ("Seen by Dr. Smith today. Stable.", ["Seen by Dr. Smith today.", "Stable."]),
        ("Called at 3 a.m. on Monday. Stable.", ["Called at 3 a.m. on Monday.", "Stable."]),
        ("Called at 3 p.m. The tube was moved.", ["Called at 3 p.m.", "The tube was moved."]),
        ("T.I.P.S in place. Clear lungs.", ["T.I.P.S in place.", "Clear lungs."]),
        ("Clip No. 3 is gone. No effusion.", ["Clip No. 3 is gone.", "No effusion."]),
        ("Is there one? No. Two are seen!", ["Is there one?", "No.", "Two are seen!"]),
        ("Hepatitis C. No ascites.", ["Hepatitis C.", "No ascites."]),
        ("Read with J. Smith. Stable.", ["Read with J. Smith.", "Stable."]),
        ("No effusion.The heart is large.", ["No effusion.", "The heart is large."]),
        ("lungs are clear. no effusion.", ["lungs are clear.", "no effusion."]),
        ("Fluid vs. atelectasis, e.g. scarring.", ["Fluid vs. atelectasis, e.g. scarring."]),
        ("(1) Clear lungs (2) Normal heart", ["Clear lungs", "Normal heart"]),
        ("- Clear lungs\n- Normal heart", ["Clear lungs", "Normal heart"]),
        ("Clear lungs\n\nNormal heart", ["Clear lungs", "Normal heart"]),
        ("Wrapped\nline of text.", ["Wrapped line of text."]),
        ("At T12. 2. Not a list.", ["At T12.", "Not a list."]),
        ("___ . XXXX.", []),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_words_are_lower_cased_without_punctuation() -> None:
    assert normalised_words("The Patient’s 2.5-cm (left) a.m. T.I.P.S!") == (
        ["the", "patient's", "2.5", "cm", "left", "am", "tips"]
    )


def test_impression_comes_before_findings() -> None:
    assert report_text(" FINDINGS: Clear.\n IMPRESSION: Normal.") == "Normal.\n\nClear."


@pytest.mark.parametrize("text", ["", " \n ", "Normal.", "Normal chest.", "IMPRESSION: ___", "One. Two. Three. Four."])
def test_a_report_under_three_words_is_a_bad_row(text: str) -> None:
    with pytest.raises(BadRow, match="words"):
        parse_report(text)


def test_same_words_have_the_same_hash_and_it_fits_a_signed_int64() -> None:
    one, other = parse_report("IMPRESSION: No effusion seen."), parse_report("No  EFFUSION, seen!")
    assert one.report_hash == other.report_hash == text_hash(["no", "effusion", "seen"])
    assert one.sentence_hashes == other.sentence_hashes
    assert one.report_hash != parse_report("No effusion was seen.").report_hash
    hashes = [text_hash([str(number)]) for number in range(200)]
    assert all(-(2**63) <= value < 2**63 for value in hashes)
    assert min(hashes) < 0 < max(hashes)
    # pinned: prepared data and checkpoints contain these
    assert text_hash(["no", "effusion", "seen"]) == 4244251876518465775


@pytest.mark.parametrize("piece", ["\n", " ", "_", "x. ", "1. ", "(1) ", "a.b.", "- \n", "FINDINGS:", "A "])
def test_a_huge_report_takes_no_longer_for_each_letter(piece: str) -> None:
    start = time.perf_counter()
    with contextlib.suppress(BadRow):
        parse_report(piece * (100_000 // len(piece)))
    assert time.perf_counter() - start < 6.0  # a quadratic step takes 15 s and more


def test_real_open_i_reports_keep_every_section(realdata: Path) -> None:
    for path in sorted((realdata / "reports_openi").glob("*.xml")):
        parts = {
            str(part.get("Label")).lower(): " ".join((part.text or "").split())
            for part in ElementTree.parse(path).getroot().iter("AbstractText")
        }
        written = {name: text for name, text in parts.items() if text}
        joined = "\n".join(f"{name.upper()}: {text}" for name, text in written.items())
        assert sections(joined) == written
