"""Writes what each acceptance test found to .cache/acceptance/NAME.json; `python -m tests.acceptance` prints the files.

What it prints is kept where pytest captures it: `make accept` shows it too, with ``--capture=tee-sys``.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
FIGURES = REPOSITORY / ".cache" / "acceptance"
RECORDS: dict[str, dict[str, Any]] = {}
"""By name of the file, as `make accept ONLY=name` has it."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if Path(__file__).parent in item.path.parents:
        record(item, report)
    return report


def record(item: pytest.Item, report: pytest.TestReport) -> None:
    """Add one phase of a test to the record of its file, and write the file: a test cut short stays "not run"."""
    name = item.path.stem.removeprefix("test_")
    wanted = [each.name for each in item.session.items if each.path == item.path]
    blank = {test: {"outcome": "not run", "printed": []} for test in wanted}
    found = RECORDS.setdefault(name, about() | {"seconds": 0.0, "tests": blank})
    found["seconds"] = round(found["seconds"] + report.duration, 1)
    test = found["tests"][item.name]
    if report.outcome != "passed":
        test["outcome"] = report.outcome
    if report.when == "teardown":
        test["outcome"] = "passed" if test["outcome"] == "not run" else test["outcome"]
        test["printed"] = [line for line in report.capstdout.splitlines() if line.strip()]
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / f"{name}.json").write_text(json.dumps(found, indent=1))


def about() -> dict[str, str]:
    """Date, commit and machine of a run."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = models[0].partition(": ")[2] if models else platform.machine()
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "commit": commit, "machine": f"{os.cpu_count()} cores, {processor}"}
