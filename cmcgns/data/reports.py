"""Normalised sentences of a report for the model, from the text of its file."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cmcgns.data.repairs import note
from cmcgns.data.text import unescaped
from cmcgns.errors import BadRow

MIN_SENTENCE_WORDS = 2
MIN_REPORT_WORDS = 3
NEARBY = 48
"""Characters to look at around a possible end of a sentence."""


def _words(line: str) -> frozenset[str]:
    return frozenset(line.split())


# Names that start a section, in upper or lower case, and the normalised name of the section.
SECTION_NAMES = {
    "addendum": "addendum",
    "clinical history": "history",
    "clinical indication": "indication",
    "clinical information": "history",
    "comparison": "comparison",
    "comparisons": "comparison",
    "conclusion": "impression",
    "conclusions": "impression",
    "description": "findings",
    "end of impression": "end of impression",
    "exam": "examination",
    "examination": "examination",
    "final impression": "impression",
    "finding": "findings",
    "findings": "findings",
    "findings and impression": "findings and impression",
    "findings impression": "findings and impression",
    "history": "history",
    "impression": "impression",
    "impression and findings": "findings and impression",
    "impression and recommendation": "impression",
    "impression and recommendations": "impression",
    "impressions": "impression",
    "indication": "indication",
    "indications": "indication",
    "interpretation": "impression",
    "medical condition": "history",
    "notification": "notification",
    "notifications": "notification",
    "observations": "findings",
    "opinion": "impression",
    "procedure": "examination",
    "reason for exam": "indication",
    "reason for examination": "indication",
    "reason for study": "indication",
    "reason for this examination": "indication",
    "recommendation": "recommendation",
    "recommendations": "recommendation",
    "study": "examination",
    "summary": "summary",
    "technique": "technique",
    "type of examination": "examination",
    "wet read": "wet read",
}

# Substrings that decide the section of an unlisted header in capitals; the first match wins.
NAME_PARTS = (
    ("impression", "impression"),
    ("conclusion", "impression"),
    ("finding", "findings"),
    ("history", "history"),
    ("comparison", "comparison"),
    ("addendum", "addendum"),
    ("indication", "indication"),
    ("technique", "technique"),
)

# A header of only these words ("PA AND LATERAL CHEST") starts the findings.
VIEW_WORDS = _words(
    "a ap an and chest cxr erect film films for frontal image images lateral of one pa portable radiograph "
    "radiographs ray semi semierect semiupright single supine the three two upright view views x xray"
)

# Sub-headers inside the findings ("LUNGS: clear"): their words are part of the text.
ANATOMY_WORDS = _words(
    "abdomen airways and aorta bone bones cardiac cardiomediastinal diaphragm heart hila hilum left line lines lung "
    "lungs mediastinal mediastinum osseous other pleura pleural pulmonary right silhouette size skeleton soft spaces "
    "structures support tissue tissues tubes upper vessels"
)

_WRONG_WORD = r"[A-Za-z]{5,16}"
"""What may be a misspelt name of a section."""
SPELLINGS = {
    "impression": 2, "impressions": 2, "findings": 2, "recommendation": 2, "recommendations": 2, "finding": 1,
    "conclusion": 1, "conclusions": 1, "comparison": 1, "comparisons": 1, "indication": 1, "indications": 1, "technique": 1,
    "history": 1, "examination": 1, "addendum": 1, "interpretation": 1, "observations": 1,
}  # fmt: skip
"""Names of sections that are recognised when misspelt, with the most letters that may be wrong, missing, surplus or swapped."""
OTHER_WORDS = _words(
    "binding bindings compression compressions depression ending endings expression expressions fending filings filling fillings "
    "firings funding fundings induration landing landings lining linings occlusion occlusions oppression paintings "
    "pending refining repression suppression winding windings"
)
"""Words of English that are near the name of a section."""

_DIVIDER = re.compile(r"^[ \t]*_{8,}[ \t]*$", re.MULTILINE)
_CAPITAL_HEADER = r"(?:^|(?<=\n))[ \t\xa0]*(?P<capital>[A-Z][A-Z0-9 ()/,&#'-]{2,78}?)[ \t]*:(?!\d)"
_KNOWN = "|".join(
    re.escape(name).replace(r"\ and\ ", r"[ \t]*(?:and|&|/)[ \t]*").replace(r"\ ", "[ \t]+")
    for name in sorted(SECTION_NAMES, key=len, reverse=True)
)

_KNOWN_HEADER = rf"(?:^|(?<=\n))[ \t\xa0]*(?P<known>(?i:{_KNOWN}))[ \t]*:"

# Headers within a line (a report that lost its line ends): in capitals, or capitalised after the end of a sentence.
_INLINE_NAMES = (
    "Findings and impression", "Findings", "Impression", "Conclusion",
    "Comparison", "Indication", "Technique", "History",
)  # fmt: skip

_INLINE_CAPITALS = "|".join(name.upper() for name in _INLINE_NAMES)
_INLINE_TITLE = "|".join(_INLINE_NAMES)
_INLINE_HEADER = rf"(?<=\s)(?P<inline>{_INLINE_CAPITALS})[ \t]*:|(?<=[.!?:]\s)(?P<title>{_INLINE_TITLE})[ \t]*:"
# a name without its colon stands alone on its line, in capitals
_BARE_HEADER = r"(?:^|(?<=\n))[ \t\xa0]*(?P<bare>[A-Z]{7,13})[ \t\xa0]*[;.\-\u2013\u2014]?[ \t\xa0]*(?=\n|$)"
_WRONG_HEADER = (
    rf"(?:^|(?<=\n))[ \t\xa0]*(?P<wrong>{_WRONG_WORD})[ \t\xa0]*[:;](?!\d)"
    rf"|(?<=\s)(?P<wrong_inline>[A-Z]{{5,16}})[ \t]*:(?!\d)"
)
UNSURE = {
    "wrong": frozenset(SPELLINGS),
    "wrong_inline": frozenset(SPELLINGS),
    "bare": _words("conclusion conclusions findings impression impressions"),
}
"""Groups of ``_HEADER`` that start a section only if they are, perhaps misspelt, one of these names."""
_HEADER = re.compile(f"{_KNOWN_HEADER}|{_CAPITAL_HEADER}|{_INLINE_HEADER}|{_BARE_HEADER}|{_WRONG_HEADER}")
# All patterns take linear time: what a run of characters may start is only looked for at its first one.
_DEIDENTIFIED = re.compile(r"_{2,}|X{4,}|\[\*\*(?:(?!\[\*\*).)*?\*\*\]", re.DOTALL)
_LIST_ITEM = re.compile(r"(?<!\S)\(?(?P<number>\d{1,2})[.)](?=\s+[^\s\d]|[A-Z])")
_BREAK = re.compile(r"\n\s*\n|(?:^|\n)\s*[-*•·]\s+")
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+[\"')\]]*(?=\s|$)|(?<=[a-z]{2})\.(?=[A-Z][a-z])")
_LAST_TOKEN = re.compile(r"[A-Za-z.]+$")
_INITIALISM = re.compile(r"\b(?:[A-Za-z]\.){2,}(?:[A-Za-z]\b)?")
_WORD = re.compile(r"\d+(?:\.\d+)+|[^\W_]+(?:'[^\W_]+)*")
ABBREVIATIONS = _words("al approx ca cf dept dr drs e.g eg fig figs hosp i.e ie mr mrs ms pt resp st vs")


@dataclass(frozen=True)
class ParsedReport:
    """A report as the model sees it."""

    sentences: list[str]
    """Normalised words joined by one space, impression first."""
    sentence_hashes: list[int]
    report_hash: int
    """Hash of all words of all sentences; equal hashes mean equal text."""


def parse_report(text: str) -> ParsedReport:
    """Normalised sentences and their hashes; ``BadRow`` if the report is too short."""
    words = [normalised_words(sentence) for sentence in sentences(report_text(text))]
    words = [sentence for sentence in words if len(sentence) >= MIN_SENTENCE_WORDS]
    everything = [word for sentence in words for word in sentence]
    if len(everything) < MIN_REPORT_WORDS:
        raise BadRow(
            f"report has {len(everything)} words in sentences of {MIN_SENTENCE_WORDS} or more, "
            f"fewer than {MIN_REPORT_WORDS}"
        )
    return as_parsed([" ".join(sentence) for sentence in words])


def as_parsed(sentences: Sequence[str]) -> ParsedReport:
    """The result of ``parse_report``, rebuilt from its ``sentences``."""
    # words are joined by one space, in a sentence as in a report
    return ParsedReport(list(sentences), [_hash(sentence) for sentence in sentences], _hash(" ".join(sentences)))


def report_text(text: str) -> str:
    """Impression then findings; otherwise the last paragraph, other sections, the comparison, or the full text."""
    contents = sections(text)
    parts = [contents[name] for name in ("impression", "findings") if name in contents]
    if parts:
        return "\n\n".join(parts)
    for name in ("last_paragraph", "full report", "wet read"):
        if name in contents:
            return contents[name]
    known = set(SECTION_NAMES.values()) | {name for _, name in NAME_PARTS} | {"preamble"}
    others = [content for name, content in contents.items() if name not in known]
    return "\n\n".join(others) or contents.get("comparison") or contents.get("addendum") or contents.get("preamble", "")


def sections(text: str) -> dict[str, str]:
    """The report's sections by normalised name; ``full report`` if it has no header."""
    text = unescaped(text).replace("\r\n", "\n").replace("\r", "\n")
    contents: dict[str, str] = {}
    for block in _DIVIDER.split(text):
        pieces = list(_split_at_headers(block))
        # a later block is the report, an earlier one its addendum: the later one wins
        contents.update(_collect(pieces))
    if "impression" in contents or "findings" in contents:
        return contents
    # one line with "History: ..." in the middle is not split into sections
    if "\n" not in text.strip() or not set(contents) - {"preamble"}:
        full = "\n".join(_DIVIDER.split(text)).strip()
        return {"full report": full} if full else {}
    return {**contents, **_last_paragraph(contents)}


def _split_at_headers(block: str) -> Iterator[tuple[str, str]]:
    """(normalised name, content) in order; text before the first header is ``preamble``."""
    name, start = "preamble", 0
    for header in _HEADER.finditer(block):
        words = header.group(header.lastgroup or 0)
        if header.lastgroup in UNSURE and _respelt(words.lower()) not in UNSURE[header.lastgroup]:
            continue
        following = _section_name(words)
        if following == "anatomy" and name in ("findings", "impression", "findings and impression"):
            continue
        yield name, block[start : header.start()].strip()
        if following == "anatomy":
            name, start = "findings", header.start()
        else:
            name, start = following, header.end()
    yield name, block[start:].strip()


def _section_name(header: str) -> str:
    name = " ".join(re.sub(r"[^a-z0-9]+", " ", header.lower().replace("&", " and ").replace("/", " and ")).split())
    name = " ".join(_respelt(word) for word in name.split())
    if name in SECTION_NAMES:
        return SECTION_NAMES[name]
    if "finding" in name and "impression" in name:
        return "findings and impression"
    for part, normalised in NAME_PARTS:
        if part in name:
            return normalised
    if name and all(word in VIEW_WORDS or word.isdigit() for word in name.split()):
        return "findings"
    if name and all(word in ANATOMY_WORDS for word in name.split()):
        return "anatomy"
    return name


@lru_cache(maxsize=4096)
def _nearest_name(word: str) -> str:
    """The name of a section that ``word`` misspells; otherwise the word."""
    if word in SPELLINGS or word in OTHER_WORDS or len(word) < 5:
        return word
    distances = ((_distance(word, name, most), name) for name, most in SPELLINGS.items())
    # two wrong letters are a misspelling only between the right ends
    found = [
        (distance, name)
        for distance, name in distances
        if distance <= 1 or (distance <= SPELLINGS[name] and (word[0], word[-1]) == (name[0], name[-1]))
    ]
    return min(found)[1] if found else word


def _respelt(word: str) -> str:
    near = _nearest_name(word)
    if near != word:
        note("misspelt section headers")
    return near


def _distance(word: str, name: str, most: int) -> int:
    """Letters changed, added, left out or swapped with the next one, between two words; ``most`` + 1 if more."""
    if abs(len(word) - len(name)) > most:
        return most + 1
    before, row = [0] * (len(name) + 1), list(range(len(name) + 1))
    for i, letter in enumerate(word, start=1):
        earlier, before, row = before, row, [i]
        for j, other in enumerate(name, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == name[j - 2] and word[i - 2] == other:
                cost = min(cost, earlier[j - 2] + 1)
            row.append(cost)
    return min(row[-1], most + 1)


def _collect(pieces: list[tuple[str, str]]) -> dict[str, str]:
    """One content per section name: repeated sections are joined, but only the last impression is kept."""
    parts: dict[str, list[str]] = {}
    for name, content in pieces:
        if content:
            before = parts.pop(name, [])  # each section stands where its last part does
            parts[name] = [] if name == "impression" else before
            parts[name].append(content)
    contents = {name: "\n\n".join(each) for name, each in parts.items()}
    both = contents.pop("findings and impression", None)
    if both is not None:
        # if there is a separate impression, the joint section is the findings
        name = "findings" if "impression" in contents else "impression"
        contents[name] = "\n\n".join(part for part in (both, contents.get(name)) if part)
    # in CheXpert Plus it is a code: "2-ABNORMAL"
    if "impression" not in contents and not re.match(r"\d\s*-", contents.get("summary", "1-")):
        contents = {"impression" if name == "summary" else name: text for name, text in contents.items()}
    return contents


def _last_paragraph(contents: dict[str, str]) -> dict[str, str]:
    """The last section, split at its first blank line: the text after it is a description without a header."""
    name = list(contents)[-1]
    head, *rest = re.split(r"\n[ \t]*\n", contents[name], maxsplit=1)
    if not rest or not rest[0].strip():
        return {}
    return {name: head.strip(), "last_paragraph": rest[0].strip()}


def sentences(text: str) -> list[str]:
    """The sentences of ``text``, each on one line, without list numbers and de-identification tokens."""
    pieces: list[str] = []
    for paragraph in _BREAK.split(text.replace("\r\n", "\n")):
        for item in _split_list(paragraph):
            pieces += _split_sentences(" ".join(_DEIDENTIFIED.sub(" ", item).split()))
    return [sentence for sentence in pieces if _WORD.search(sentence)]


def _split_list(paragraph: str) -> Iterator[str]:
    """The items of a numbered list: it starts with "1." and continues with consecutive numbers."""
    start, expected = 0, 1
    for marker in _LIST_ITEM.finditer(paragraph):
        nearby = paragraph[max(0, marker.start() - NEARBY) : marker.start()]
        before = nearby.rstrip()
        starts_item = not before or before[-1] in ".!?:;" or "\n" in nearby[len(before) :]
        is_reference = re.search(r"(?i)\bno\.$", before) is not None  # as in "No. 3"
        if is_reference or not (starts_item or (expected > 1 and int(marker["number"]) == expected)):
            continue
        yield paragraph[start : marker.start()]
        start, expected = marker.end(), int(marker["number"]) + 1
    yield paragraph[start:]


def _split_sentences(line: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(line):
        before = line[max(start, end.start() - NEARBY) : end.start()]
        if _is_abbreviation(before, line[end.end() : end.end() + NEARBY].lstrip(), end.group()):
            continue
        yield line[start : end.end()].strip()
        start = end.end()
    if line[start:].strip():
        yield line[start:].strip()


def _is_abbreviation(before: str, after: str, stop: str) -> bool:
    """Whether the full stop between ``before`` and ``after`` belongs to a word and does not end a sentence."""
    token = _LAST_TOKEN.search(before)
    if stop != "." or token is None or not after:
        return False
    word = token.group().lower()
    if word in ABBREVIATIONS:
        return True
    if word == "no":
        return after[0].isdigit()
    if "." in word and all(len(letter) <= 1 for letter in word.split(".")):  # a.m., T.I.P.S.
        return not after[0].isupper()
    return len(word) == 1 and _is_initial(before[: token.start()], after)


def _is_initial(before: str, after: str) -> bool:
    """Whether a single letter is an initial ("Dr. J. Smith") and not the end of a name ("hepatitis C.")."""
    return (
        not after[0].isupper() or re.search(r"(?i)(?:^|\b(?:drs?\.|mr\.|mrs\.|ms\.|by|with)\s)\s*$", before) is not None
    )


def normalised_words(sentence: str) -> list[str]:
    """The lower-cased words and numbers of ``sentence`` without punctuation ("a.m." becomes "am", "2.5" stays)."""
    joined = _INITIALISM.sub(lambda match: match.group().replace(".", ""), sentence.replace("’", "'"))
    return _WORD.findall(joined.lower())


def text_hash(words: Sequence[str]) -> int:
    """Signed 64-bit BLAKE2b of the words joined by one space."""
    return _hash(" ".join(words))


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
