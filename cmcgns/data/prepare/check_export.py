"""Check of an export before it is given away: damaged or additional files, and text that may name a patient or a machine."""

import json
from collections.abc import Iterator
from typing import Any

from cmcgns import storage
from cmcgns.cli import STATUS_FAILED
from cmcgns.data.prepare.check import print_findings
from cmcgns.data.prepare.leaks import Finding
from cmcgns.data.scrub import identifiers
from cmcgns.errors import UserError
from cmcgns.run_folder import EXPORT_HASHES
from cmcgns.storage.integrity import damage
from cmcgns.terminal import console

VOCABULARY = "tokenizer.json"
TEXT_SUFFIXES = (".json", ".txt", ".jinja", ".md", ".yaml")
"""Files that are searched for identifiers; weights are compared with their hashes alone."""
LONG_WORD = 4
"""A word of at least this many characters that has digits may be a date or a record number."""


def export_folder(uri: str) -> str | None:
    """The export at ``uri``, or in the folder of a run there; None if there is none."""
    uri = storage.absolute("prepare.out", uri)
    folders = (uri, storage.join(uri, "export"))
    return next((each for each in folders if storage.exists(storage.join(each, EXPORT_HASHES))), None)


def check_export(uri: str) -> int:
    """Check an export; returns 0 if it passes, 1 if a file is damaged or does not belong. Identifiers do not fail it."""
    findings = check_files(uri) or find_identifiers(uri)
    print_findings(findings)
    faults = sum(finding.is_fault for finding in findings)
    passed = f"{uri} is unchanged" + ("" if findings else " and has no identifier that the rules find")
    console().print(f"{faults} faults" if faults else passed, style="red" if faults else "green", highlight=False)
    return STATUS_FAILED if faults else 0


def check_files(uri: str) -> list[Finding]:
    """A damaged or missing file, or those that are no part of the export."""
    reason = damage(uri, EXPORT_HASHES)
    if reason:
        return [Finding("file", [], reason)]
    known = {EXPORT_HASHES, *json.loads(storage.read_bytes(storage.join(uri, EXPORT_HASHES)))}
    return [Finding("file", [name], "is no part of the export") for name in sorted({*storage.list_files(uri)} - known)]


def find_identifiers(uri: str) -> list[Finding]:
    """Text with identifiers, paths of a machine, and vocabularies with long words that have digits; never the text itself."""
    return [
        Finding("identifier in export", [name], f"has {what}")
        for name in sorted(storage.list_files(uri))
        if name.endswith(TEXT_SUFFIXES) and name != EXPORT_HASHES
        for what in _found_in(name, storage.read_bytes(storage.join(uri, name)))
    ]


def _found_in(name: str, content: bytes) -> Iterator[str]:
    texts = [content.decode(errors="replace")]
    if name.endswith(".json"):
        try:
            values = json.loads(content)
        except ValueError:
            raise UserError(
                f"{name} of the export is not JSON; copy the export again from where the run wrote it"
            ) from None
        if name.endswith(VOCABULARY):
            words = _take_words(values)
            numbered = sum(len(word) >= LONG_WORD and any(map(str.isdigit, word)) for word in words)
            if numbered:
                yield f"{numbered} words with digits among {len(words)}"
        texts = list(_strings(values))
    kinds = sorted({kind for text in texts for kind in identifiers(text)})
    if kinds:
        yield " and ".join(kinds)
    if any(text.startswith("/") or "://" in text for text in texts):
        yield "a path"


def _take_words(tokenizer: Any) -> list[str]:
    """The words of a tokenizers file, which are removed from it: some kinds map words to ids, others list words with scores."""
    model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    vocabulary = model.pop("vocab", ()) if isinstance(model, dict) else ()
    entries = vocabulary if isinstance(vocabulary, dict) else (entry[0] for entry in vocabulary if entry)
    return [str(word).removeprefix("##") for word in entries]


def _strings(value: Any) -> Iterator[str]:
    """All strings below ``value``, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
