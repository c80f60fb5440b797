"""Finding, side and negation of a sentence in a phantom report, parsed from its text."""

import re
from functools import lru_cache
from typing import NamedTuple

from cmcgns.data.reports import normalised_words
from cmcgns.phantom import phrases
from cmcgns.phantom.findings import FINDINGS
from cmcgns.phantom.report_text import LUNG

_HEART_NORMAL = (*phrases.HEART_NORMAL, "The heart size is normal.", "The cardiomediastinal silhouette is normal.")
_CLEAR = (*phrases.CLEAR, *phrases.OTHERWISE_CLEAR, "The lungs are clear without focal consolidation.")
_ADVICE = ("Chest CT is recommended.", "Further evaluation with CT is suggested.")
"""Sentences about a nodule that do not name it."""
_FRAME = frozenset(
    [
        "there",
        "is",
        "no",
        "evidence",
        "of",
        "seen",
        "identified",
        "present",
        "or",
        "the",
        "a",
        "an",
        "are",
        "clear",
        "otherwise",
        "lungs",
        "without",
    ]
)
"""Words in a negation other than the negated findings."""


class SentenceTruth(NamedTuple):
    """A class of sentences."""

    finding: str
    """A name in ``FINDINGS``; if a sentence negates several, all of them, sorted and joined by `+`."""
    laterality: str
    """``right``, ``left``, ``bilateral``, or empty if the sentence names no side."""
    negated: bool


def sentence_truth(sentence: str) -> SentenceTruth | None:
    """Class of ``sentence`` (normalised by ``parse_report``); None if it names no finding."""
    if sentence in _plain(_CLEAR):
        return SentenceTruth("+".join(sorted(LUNG)), "", True)
    if sentence in _plain(_HEART_NORMAL):
        return SentenceTruth("cardiomegaly", "", True)
    denied = _denied(sentence)
    if denied:
        return SentenceTruth("+".join(denied), "", True)
    for name, pattern in _patterns():
        match = pattern.fullmatch(sentence)
        if match is not None:
            return SentenceTruth(name.finding, name.laterality or _side(match["where"] or ""), False)
    return None


def _side(where: str) -> str:
    """The side named in the text of a template's slot for side or place."""
    words = set(where.split())
    return "bilateral" if words & {"both", "bilateral"} else next(iter(words & {"right", "left"}), "")


def _denied(sentence: str) -> list[str]:
    """Findings that a sentence negates; empty if it says more, or negates something else."""
    if "no" not in sentence.split() and "without" not in sentence.split():
        return []
    negated, rest = set(), f" {sentence} "
    terms = [(" ".join(normalised_words(term)), name) for name, listed in phrases.ABSENT.items() for term in listed]
    for term, name in sorted(terms, key=lambda pair: -len(pair[0])):
        if f" {term} " in rest:
            negated.add(name)
            rest = rest.replace(f" {term} ", "  ")
    return sorted(negated) if set(rest.split()) <= _FRAME else []


@lru_cache
def _plain(sentences: tuple[str, ...]) -> frozenset[str]:
    return frozenset(" ".join(normalised_words(sentence)) for sentence in sentences)


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[SentenceTruth, re.Pattern[str]]]:
    """A pattern for each wording of a present finding; laterality is empty if a slot contains it."""
    return [
        (_said(name), _pattern(part))
        for table in (phrases.SENTENCES, phrases.SUMMARIES)
        for name, templates in table.items()
        for template in templates
        for part in template.split("  ")
        if part not in _ADVICE
    ]


def _said(name: str) -> SentenceTruth:
    """Class of the wordings under a name of ``phrases.SENTENCES``, such as "effusion bilateral" or "PICC"."""
    finding, *more = name.split()
    return SentenceTruth(
        finding if finding in FINDINGS else "device", "bilateral" if more == ["bilateral"] else "", False
    )


def _pattern(template: str) -> re.Pattern[str]:
    """Pattern that matches ``template`` with filled slots; group ``where`` is the text in the slot for side or place."""
    marked = re.sub(r"\{(side|place)\}", " wherever ", template, flags=re.IGNORECASE)
    text = " ".join(normalised_words(re.sub(r"\{\w+\}", " whatever ", marked)))
    text = re.sub(r"\ba\b", "an?", text.replace("the wherever", "(?:the )?wherever"))
    if "wherever" not in text:
        text += "(?P<where>)"
    return re.compile(text.replace("wherever", r"(?P<where>\w.*)").replace("whatever", r"\w.*"))
