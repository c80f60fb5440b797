"""Sections of a report by the rules of MIMIC-CXR's reference parser (MIT-LCP/mimic-cxr).

A header is a line's one leading blank, capitals, a colon and white space; the search goes on from the next line.
"""

import re

from cmcgns.data.reports import NAME_PARTS, SECTION_NAMES

HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")


def reference_sections(text: str) -> dict[str, str]:
    """Sections by normalised name, the last of a name; empty impressions and findings are dropped."""
    found: dict[str, str] = {}
    name, start, position = "preamble", 0, 0
    while (header := HEADER.search(text, position)) is not None:
        found[name] = text[start : header.start()].strip()
        name, start = normalised(header.group(1)), header.end()
        following = text.find("\n", header.end() - 1)
        position = following if following >= 0 else len(text)
    found[name] = text[start:].strip()
    return {each: content for each, content in found.items() if content or each not in ("impression", "findings")}


def normalised(header: str) -> str:
    """The section's name, by table, then by what it contains."""
    name = " ".join(header.lower().split())
    return SECTION_NAMES.get(name) or next((each for part, each in NAME_PARTS if part in name), name)


def reads(text: str) -> bool:
    """Whether ``text`` is of a shape that the reference parser handles: each capital header word and colon is a header to
    it, and none comes twice."""
    headers = re.findall(r"(?im)^[ \t]*(?:findings|impression)s?[^:\n]*:", text)
    seen = [normalised(header.group(1)) for header in HEADER.finditer(text)]
    wanted = [name for name in seen if name in ("findings", "impression")]
    return len(wanted) == len(headers) == len(set(wanted)) > 0 and "____" not in text and "\r" not in text
