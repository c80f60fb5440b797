"""Names, dates and record numbers in reports: what the rules find of made-up ones, and what they leave of the findings."""

import random

import pytest

from cmcgns.data.reports import parse_report
from cmcgns.data.scrub import REMOVED, identifiers, scrub
from cmcgns.phantom import PhantomCorpus

FIRST = ["Anna", "John", "Mary-Jane", "Ludwig", "Aoife", "Jose", "D'Arcy", "Wei"]
LAST = ["Smith", "O'Brien", "Meier", "van Dyke", "Garcia-Lopez", "MacDonald", "Nguyen", "LEE"]
MONTHS = ["January", "Feb", "march", "April", "May", "June", "Jul", "August", "Sept.", "October", "Nov", "December"]


def made_up(seed: int) -> list[tuple[str, list[str]]]:
    """Sentences with identifiers, as radiologists dictate them, and the words of each that must go."""
    draw = random.Random(seed)
    first, last, month = draw.choice(FIRST), draw.choice(LAST), draw.choice(MONTHS)
    day, year, number = draw.randint(1, 28), draw.randint(1995, 2026), draw.randint(10_000, 99_999_999)
    surname = last.replace("van ", "")
    return [
        (f"Comparison is made to the film of {day}/{draw.randint(1, 12)}/{year}.", [str(year)]),
        (f"Comparison: {year}-{draw.randint(1, 12):02d}-{day:02d}.", [str(year)]),
        (f"Compared with {month} {day}, {year} there is no change.", [str(year)]),
        (f"Unchanged since {day} {month} {year}.", [str(year)]),
        (f"Unchanged since {month} {year}.", [str(year)]),
        (f"MRN {number}. The lungs are clear.", [str(number)]),
        (f"Accession number A{number}.", [str(number)]),
        (f"Telephone (617) 555-{draw.randint(1000, 9999)}.", ["555", "617"]),
        (f"Findings were discussed with Dr. {surname} by telephone.", [surname]),
        (f"Findings were discussed with Dr. {first} {surname} at 3:15 pm.", [first, surname]),
        (f"Mrs. {surname} was called.", [surname]),
        (f"Patient name: {surname}, {first}", [surname, first]),
        (f"Dictated by: {first} {surname}, MD", [surname, first]),
        (f"{first} {surname}, M.D.", [surname, first]),
        (f"Reported by {first} {surname}", [surname, first]),
        (f"Send questions to {first.lower().replace(chr(39), '')}@hospital.org.", ["hospital"]),
    ]


def test_nearly_all_made_up_identifiers_are_removed(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [pair for seed in range(100) for pair in made_up(seed)]
    words = [(text, word) for text, gone in pairs for word in gone]
    missed = [(text, scrub(text)) for text, word in words if word in scrub(text)]
    with capsys.disabled():
        print(f"\nrecall {1 - len(missed) / len(words):.4f} of {len(words)} words; missed {missed[:3]}")
    assert len(missed) <= 0.01 * len(words), missed[:20]


def test_reports_without_identifiers_stay_as_they_are() -> None:
    corpus = PhantomCorpus(300, seed=3)
    for i in range(300):
        report = corpus.study(i).report
        assert scrub(report) == report
        assert not list(identifiers(report))


@pytest.mark.parametrize(
    "text",
    [
        "There is a 2.5 x 3.1 cm nodule in the left upper lobe.",
        "The nodule measures 12 mm, previously 10 mm.",
        "Fractures of ribs 5-7. T12 and L1 are normal.",
        "The heart size is at the upper limit, 1/2 of the thorax.",
        "The tip of the PICC may lie in the SVC. C5/C6 fusion.",
        "PA AND LATERAL CHEST: The lungs are clear.",
        "At 10:30 the tube was repositioned, 3 to 4 cm above the carina.",
    ],
)
def test_measures_and_findings_are_kept(text: str) -> None:
    assert scrub(text) == text


def test_a_scrubbed_report_is_parsed_as_if_the_names_had_never_been_there() -> None:
    text = (
        "FINDINGS: Compared with 03/14/2024 the lungs are clear. Discussed with Dr. Anna Smith.\nIMPRESSION: No change."
    )
    assert REMOVED in scrub(text)
    words = " ".join(parse_report(scrub(text)).sentences)
    assert "2024" not in words
    assert "smith" not in words
    assert "lungs are clear" in words
