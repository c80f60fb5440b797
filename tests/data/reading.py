"""What the package on PYTHONPATH reads: one line for each film, study and report, for a comparison of two commits.

`python tests/data/reading.py FILM... [--set FOLDER]...` prints JSON: what came out by name. No text of a report is in it.
It imports only what the commits of 2026-11-29 and later have.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmcgns.data.decode import decode_image
from cmcgns.data.readers import open_source
from cmcgns.data.reports import sections
from cmcgns.errors import BadRow

COLUMNS = ("study_id", "patient_id", "group", "split", "films", "labels")
"""Of an index row, beside the text."""


def digest(*parts: Any) -> str:
    found = hashlib.blake2b(digest_size=10)
    for part in parts:
        found.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode())
    return found.hexdigest()


def outcome(read: Callable[[], str]) -> str:
    try:
        return read()
    except BadRow as error:
        return f"bad row: {error}"


def film(path: Path) -> str:
    grey_HW = decode_image(path.read_bytes(), path.name).grey_HW
    return f"{grey_HW.shape} {digest(grey_HW.tobytes())}"


def read_set(folder: str) -> dict[str, str]:
    """Rows of the index, films after cropping, texts, sections and sentences of reports."""
    source = open_source(folder)
    found = {}
    for row in source.index().table.to_pylist():
        path = row["films"][0]["path"]
        name = f"{Path(folder).name}/{row['study_id']}"

        def pixels(path: str = path) -> str:
            image = source.read_image(path)
            return f"{image.grey_HW.shape} {digest(image.grey_HW.tobytes())}"

        def sentences(row: dict[str, Any] = row, path: str = path) -> str:
            return digest(source.read_sentences(row, path).sentences)

        found[f"{name} row"] = digest([row.get(column) for column in COLUMNS])
        found[f"{name} film"] = outcome(pixels)
        found[f"{name} sentences"] = outcome(sentences)
        found[f"{name} sections"] = outcome(lambda row=row: digest(sections(source.read_report(row))))  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("films", nargs="*", type=Path)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    found = {str(path): outcome(lambda path=path: film(path)) for path in args.films}  # type: ignore[misc]
    for folder in args.set:
        found |= read_set(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
