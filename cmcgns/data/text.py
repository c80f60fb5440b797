"""Text as its author wrote it: from bytes in any usual encoding, and without the escapes of programs that exported it."""

import codecs
import html
import re
import unicodedata
from collections.abc import Callable

from cmcgns.data.repairs import note

# the longer marks first: that of UTF-32 starts like that of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SAMPLE = 4096
"""Bytes from which UTF-16 without a mark is recognised."""


def decode_text(data: bytes) -> str:
    """``data`` decoded as its byte order mark says, otherwise as UTF-8, each line that is not UTF-8 as Windows-1252."""
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None) or _utf16_without_mark(data)
    if encoding is not None:
        if encoding != "utf-8-sig":
            note("text in UTF-16 or UTF-32")
        # a byte too many, or a half of a pair, costs that character and not the text
        return data.decode(encoding, "replace").removeprefix("\ufeff")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(_decode_line(line) for line in data.splitlines(keepends=True))


def _utf16_without_mark(data: bytes) -> str | None:
    """UTF-16 if nearly every other byte is zero, as in Latin text."""
    even, odd = data[:SAMPLE:2], data[1:SAMPLE:2]
    if len(even) < 2 or b"\0" not in data[:SAMPLE]:
        return None
    zeros = [part.count(0) / len(part) for part in (even, odd)]
    if max(zeros) < 0.7 or min(zeros) > 0.05:
        return None
    return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"


def _decode_line(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        note("lines in Windows-1252")
    try:
        return line.decode("cp1252")
    except UnicodeDecodeError:  # five bytes have no meaning there
        return line.decode("latin-1")


def unescaped(text: str) -> str:
    """``text`` without escapes of Excel, HL7, HTML and programming languages, accents composed; each rule is noted once."""
    for rule, needed, apply in _RULES:
        if needed is None or any(sign in text for sign in needed):
            changed = apply(text)
            if changed != text:
                note(rule)
                text = changed
    return text


_EXCEL = re.compile(r"_x([0-9A-Fa-f]{4})_")


def _without_excel(text: str) -> str:
    """``_x000D_`` and its like, as Office Open XML writes characters that XML cannot hold; ``_x005F_`` is an underscore."""
    lines = re.sub(r"_x000[dD]_(?:_x000[aA]_|\r?\n)?|_x000[aA]_", "\n", text)
    return _EXCEL.sub(lambda match: chr(int(match[1], 16)), lines)


_HL7 = re.compile(r"\\(?:\.(?:br|sp|ce|in|ti|sk|nf|fi)[+-]?\d*|[FSTREHN]|X(?:[0-9A-Fa-f]{2})+)\\")
_HL7_SIGNS = {"F": "|", "S": "^", "T": "&", "R": "~", "E": "\\", "H": "", "N": ""}


def _without_hl7(text: str) -> str:
    r"""The escapes of HL7 version 2 (chapter 2.7): ``\.br\``, ``\T\``, ``\X0D\``."""

    def meaning(match: re.Match[str]) -> str:
        name = match.group()[1:-1]
        if name.startswith("X"):
            return decode_text(bytes.fromhex(name[1:])).replace("\r\n", "\n").replace("\r", "\n")
        if name.startswith("."):
            return "\n" if name[1:3] in ("br", "sp", "ce") else " "
        return _HL7_SIGNS[name]

    text = _HL7.sub(meaning, text)
    # a repeated field: "FINDINGS:~The lungs are clear.~~IMPRESSION:"; "~5 cm" stays
    return re.sub(r"~(?!\s?\d)", "\n", text) if re.search(r"[.:]\s?~(?!\s?\d)|~~", text) else text


# not between letters: "left\right" and "apical\nodular" are words with a stroke
_LINE_END = r"(?:\\+r\\+n|\\+n|\\+r)"
_CLEAR_LINE_END = re.compile(rf"{_LINE_END}(?![a-z])|(?:(?<=[\s.:;,!?)\"'])|^){_LINE_END}")
_ANY_LINE_END = re.compile(r"\\+r\\+n|\\+n|\\+r(?![a-z])")


def _without_literals(text: str) -> str:
    r"""A backslash and an n, as programs write line ends. One that cannot be a word makes all of them line ends."""
    if not _CLEAR_LINE_END.search(text):
        return text
    return re.sub(r"\\t(?![a-z])", " ", _ANY_LINE_END.sub("\n", text)).replace('\\"', '"')


_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_BLOCK_TAG = re.compile(
    r"\s*</?(?:br|p|div|li|ul|ol|tr|table|tbody|h[1-6]|hr|pre|body|html|section)\b[^<>\n]{0,200}>\s*", re.I
)
_OTHER_TAG = re.compile(
    r"</?(?:b|i|u|em|strong|span|font|td|th|a|sup|sub|small|big|tt|code|o:p|s|center)(?:\s[^<>\n]{0,200})?/?>", re.I
)


def _without_html(text: str) -> str:
    """Entities, also if they were escaped twice, and the tags that format text; ``<`` and ``>`` between words stay."""
    for _ in range(2):
        text = _ENTITY.sub(lambda match: html.unescape(match.group()).replace("\xa0", " "), text)
    text = _BLOCK_TAG.sub(
        lambda match: "\n\n" if match.group().strip().lower().startswith(("</p", "<p")) else "\n", text
    )
    return _OTHER_TAG.sub("", text).replace("\r\n", "\n").replace("\r", "\n")


_FOREIGN = re.compile(r"[^\x00-\x7f]{2,}")


def _without_mojibake(text: str) -> str:
    """UTF-8 that was once read as Windows-1252; no text in any language has such pairs of letters."""

    def meaning(match: re.Match[str]) -> str:
        try:
            data = b"".join(_byte(letter) for letter in match.group())
            return data.decode("utf-8")
        except UnicodeError:
            return match.group()

    return _FOREIGN.sub(meaning, text)


def _byte(letter: str) -> bytes:
    try:
        return letter.encode("cp1252")
    except UnicodeEncodeError:
        return letter.encode("latin-1")


_INVISIBLE = dict.fromkeys(map(ord, "\0\xad\u200b\u200c\u200d\u2060\ufeff"))
_LINE_SIGNS = dict.fromkeys(map(ord, "\x0b\x0c\x85\u2028\u2029"), "\n")
_LIGATURES = dict(zip(map(ord, "ﬀﬁﬂﬃﬄﬅﬆ"), ("ff", "fi", "fl", "ffi", "ffl", "st", "st"), strict=True))
_SIGNS = _INVISIBLE | _LINE_SIGNS | _LIGATURES

_RULES: tuple[tuple[str, tuple[str, ...] | None, Callable[[str], str]], ...] = (
    ("Excel escapes (_x000D_)", ("_x",), _without_excel),
    (r"HL7 escapes (\.br\)", ("\\", "~"), _without_hl7),
    (r"line ends written as \n", ("\\n", "\\r"), _without_literals),
    ("HTML tags and entities", ("&", "<"), _without_html),
    ("UTF-8 read as Windows-1252", ("Ã", "Â", "â", "Ä", "Å", "Ð", "ã", "Î"), _without_mojibake),
    ("invisible signs, ligatures and line signs", tuple(map(chr, _SIGNS)), lambda text: text.translate(_SIGNS)),
    ("decomposed accents", None, lambda text: text if text.isascii() else unicodedata.normalize("NFC", text)),
)
"""Name, signs of which the text has one if the rule matters, and the rule."""
