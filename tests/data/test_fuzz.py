"""Mutated inputs are one film, one report, or one bad row with its reason: no other error, no minute, no heap of memory."""

from pathlib import Path

from tests.data.fuzzing import MOST_BYTES, fuzz, outcome, sound


def test_every_mutated_input_is_read_or_refused(tmp_path: Path) -> None:
    for kind, data in sound():
        if kind != "table":
            assert outcome(kind, data, lambda table: None) == "read"
    found = fuzz(range(600), tmp_path)
    assert all(
        found.outcomes[f"{kind} {what}"] for kind in ("dicom", "picture", "table") for what in ("read", "refused")
    )
    assert found.slowest[0] < 60, f"seed {found.slowest[1]}"
    assert found.largest[0] < MOST_BYTES, f"seed {found.largest[1]}"
