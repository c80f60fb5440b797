"""The study index: one Arrow table that says what a corpus holds and where, without its pixels."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

FILM_TYPE = pa.struct([pa.field("image_id", pa.string()), pa.field("path", pa.string()), pa.field("view", pa.string())])
INDEX_SCHEMA = pa.schema(
    [
        pa.field("study_id", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("group", pa.string()),  # what splits keep together: patient unless the data say more
        pa.field("split", pa.string()),  # train, valid or test
        pa.field("films", pa.list_(FILM_TYPE)),  # at least one
        pa.field("report", pa.string()),  # the text itself, or null when it lies at report_path
        pa.field("report_path", pa.string()),
        pa.field("labels", pa.map_(pa.string(), pa.float32())),  # 1, 0, -1 uncertain; may be empty
    ]
)


@dataclass(frozen=True)
class StudyIndex:
    """Every usable study of a corpus, and how many rows were set aside before any pixel was read."""

    table: pa.Table
    """``INDEX_SCHEMA``, in the corpus's own fixed order."""
    filtered: dict[str, int] = field(default_factory=dict)
    """Films left out on purpose, by reason (``view LATERAL``: 120). Not bad rows."""
    bad_rows: list[dict[str, str]] = field(default_factory=list)
    """Studies that cannot be used, each with ``source`` and ``reason``."""

    def split(self, name: str) -> pa.Table:
        """The studies of one split (train, valid or test), in index order."""
        import pyarrow.compute as pc

        return self.table.filter(pc.equal(self.table["split"], name))


def index_table(rows: list[dict[str, Any]]) -> pa.Table:
    """``rows`` as a table of ``INDEX_SCHEMA``."""
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
