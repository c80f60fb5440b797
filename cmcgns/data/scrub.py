"""Removes what may name a patient from the text of a report: rules, not a model.

What the rules find, each replaced by ``___`` as in MIMIC-CXR:
- dates: 03/14/2024, 14.3.24, 2024-03-14, March 14th, 14 March 2024, Jan 2024; clock times beside them stay
- numbers of five and more digits, with separators (record numbers, telephones), and letters with four and more digits
- capitalised names after a title (Dr., Mrs., Prof.) or a role ("dictated by", "patient name:"), and before "MD"
- e-mail addresses and web addresses
- what de-identification has marked already: [**...**], runs of X

They do not find names without a title, places, ages, or rare diseases. Recall on made-up reports: tests/security/test_scrub.py.
"""

import re
from collections.abc import Iterator

REMOVED = "___"

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?"
    r"|dec(?:ember)?)\b\.?"
)
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?"
_YEAR = r"(?:19|20)\d\d"
_NAME = r"(?!(?:Dr|Drs|Mr|Mrs|Ms|Prof)\b)[A-Z](?:[\w'’]*[a-z][\w'’-]*|\.|[A-Z'’-]+)"
_TITLE = r"(?:drs?|mrs?|ms|miss|prof|professor|doctor|sir)\b\.?"
_ROLE = (
    r"(?:patient(?:[ \t]+name)?|name|attending|radiologist|technologist|physician|signed|dictated|read|reported|discussed"
    r"|reviewed)"
)
_NAMES = rf"{_NAME}(?:[ \t]+{_NAME}){{0,3}}"
_INVERTED = rf"{_NAME},[ \t]*{_NAME}(?:[ \t]+[A-Z]\.?)?"
RULES = {
    "date": re.compile(
        rf"\b\d{{1,4}}([-/.])\d{{1,2}}\1\d{{2,4}}\b|\b\d{{1,2}}/\d{{2,4}}\b(?![.\d])"
        rf"|(?i:\b{_MONTH}[ \t]+{_DAY}\b(?:,?[ \t]*{_YEAR})?|\b{_DAY}[ \t]+(?:of[ \t]+)?{_MONTH}(?:,?[ \t]*{_YEAR})?)"
        rf"|(?i:\b{_MONTH},?[ \t]*{_YEAR}\b)|\b{_YEAR}\b"
    ),
    "number": re.compile(
        r"(?<![\w.])[+(]?\d(?:[-() \t./]{0,2}\d){4,}\b(?![.]\d)|(?<![\w-])(?=[\w-]{0,60}\d{4})(?=[\w-]{0,60}[A-Za-z])[\w-]+\b"
    ),
    "name": re.compile(
        rf"(?i:\b{_TITLE}[ \t]+)(?:{_INVERTED}|{_NAMES})"
        rf"|(?i:\b{_ROLE}[ \t]*(?::|by|with)[ \t]*(?:{_TITLE}[ \t]+)?)(?:{_INVERTED}|{_NAMES})"
        rf"|(?:{_INVERTED}|{_NAMES}),?[ \t]+(?:M\.?D\.?|D\.?O\.?|R\.?N\.?|Ph\.?D\.?)(?!\w)"
    ),
    "address": re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+|\b(?:https?://|www\.)\S+"),
    "mark": re.compile(r"\[\*\*(?:(?!\[\*\*).)*?\*\*\]|\bX{4,}\b", re.DOTALL),
}
"""Patterns by kind. Names need capitals, so apply them to the text of a report and not to normalised sentences."""


def scrub(text: str) -> str:
    """``text`` without what ``identifiers`` finds."""
    for rule in RULES.values():
        text = rule.sub(REMOVED, text)
    return text


def identifiers(text: str) -> Iterator[str]:
    """The kind of each date, long number, titled name and address in ``text``; never the text itself."""
    for kind, rule in RULES.items():
        text, found = rule.subn(REMOVED, text)
        if kind != "mark":
            yield from [kind] * found
