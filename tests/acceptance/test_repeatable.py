"""`train.deterministic`: two runs on two workers with live clustering give the same bits; what it costs on this machine."""

from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.jobs import Job, rows

pytestmark = pytest.mark.ray
TIMES = ("studies_per_s", "data_wait_s", "pool_wait_s", "step_s")


def run(storage: Path, name: str, *settings: str) -> list[dict[str, Any]]:
    """All rows of a run of the tiny phantom."""
    job = Job(storage, f"--run.name={name}", *settings)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    return [*rows(storage / name), *rows(storage / name, "val")]


def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def test_two_runs_are_equal_bit_for_bit(tmp_path: Path) -> None:
    first = run(tmp_path, "first", "--train.deterministic=true")
    plain = run(tmp_path, "plain")
    second = run(tmp_path, "second", "--train.deterministic=true")
    assert len(first) == 62
    assert without_times(first) == without_times(second)
    step_s = {name: median(row["step_s"] for row in found if row["split"] == "train") for name, found in
              {"first": first, "plain": plain, "second": second}.items()}  # fmt: skip
    same = without_times(first) == without_times(plain)
    print(f"62 rows equal; median step {step_s} s; equal to the run without the setting: {same}")
