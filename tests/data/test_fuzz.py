"""Mutated inputs are one film, one report, or one bad row with its reason: no other error, and none that takes a minute."""

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from cmcgns.data.readers import open_source
from tests.data.fuzzing import case, outcome, sound

INPUTS = int(os.environ.get("CMCGNS_FUZZ_INPUTS", "600"))
FIRST = int(os.environ.get("CMCGNS_FUZZ_FIRST", "0"))


def test_every_mutated_input_is_read_or_refused(tmp_path: Path) -> None:
    def read_table(data: bytes) -> object:
        (tmp_path / "pairs.csv").write_bytes(data)
        return open_source(str(tmp_path), format="pairs-csv").index()

    for kind, data in sound():
        assert outcome(kind, data, read_table) == "read"
    found: Counter[str] = Counter()
    for seed in range(FIRST, FIRST + INPUTS):
        kind, data = case(seed)
        began = time.perf_counter()
        try:
            found[f"{kind} {outcome(kind, data, read_table)}"] += 1
        except Exception as error:
            pytest.fail(f"seed {seed} ({kind}): {error!r}")
        assert time.perf_counter() - began < 60, f"seed {seed} ({kind})"
    assert all(found[f"{kind} read"] and found[f"{kind} refused"] for kind in ("dicom", "picture", "table"))
