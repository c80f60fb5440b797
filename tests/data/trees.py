"""Small hand-written corpora, and their index as plain rows."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmcgns.data.readers import open_source
from cmcgns.data.record import INDEX_SCHEMA, StudyIndex

REPORT = "FINDINGS: The lungs are clear.\nIMPRESSION: No effusion."


def picture(path: Path, level: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30), level, np.uint8)).save(path, "JPEG" if path.suffix == ".jpg" else "PNG")


def csv_file(path: Path, *lines: str, end: str = "\n", encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (end.join(lines) + end).encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def rows(index: StudyIndex) -> list[dict[str, Any]]:
    assert index.table.schema == INDEX_SCHEMA
    index.table.validate(full=True)
    return index.table.to_pylist()


def index_of(folder: Path, *lines: str, **options: Any) -> StudyIndex:
    csv_file(folder / "pairs.csv", *lines)
    return open_source(str(folder), **options).index()
