"""20,000 mutated films, tables and reports: each is read or one bad row, within a minute and the memory of the decoder."""

from pathlib import Path

from tests.data.fuzzing import MOST_BYTES, fuzz

INPUTS = 20_000
FIRST = 1_000
"""The suite has the seeds before."""


def test_twenty_thousand_mutated_inputs_are_read_or_refused(tmp_path: Path) -> None:
    found = fuzz(range(FIRST, FIRST + INPUTS), tmp_path)
    seconds, slowest = found.slowest
    most, largest = found.largest
    print(", ".join(f"{count} {what}" for what, count in sorted(found.outcomes.items())))
    print(f"slowest {seconds:.2f} s (seed {slowest}), most memory {most / 2**20:.0f} MiB (seed {largest})")
    assert sum(found.outcomes.values()) == INPUTS
    assert seconds < 60
    assert most < MOST_BYTES
