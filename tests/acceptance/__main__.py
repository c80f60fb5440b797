"""`python -m tests.acceptance [NAME ...]`: the figures of the last acceptance runs, as rows for the table in README.md."""

import json
import sys
from typing import Any

from tests.acceptance.conftest import FIGURES


def row(name: str, found: dict[str, Any]) -> str:
    """One row: ticked if every test passed; the lines that the tests printed are the figures."""
    tests = found["tests"].values()
    failed = [test for test, each in found["tests"].items() if each["outcome"] != "passed"]
    lines = [" ".join(line.split()) for test in tests for line in test["printed"]]
    facts = [f"{found['seconds']:.0f} s", *(f"{test}: {found['tests'][test]['outcome']}" for test in failed), *lines]
    mark, where = " " if failed else "x", f"{found['date']}, {found['commit']}, {found['machine']}"
    return f"| [{mark}] | `{name}` | {'; '.join(facts).replace('|', '/')} | {where} |"


names = sys.argv[1:] or sorted(path.stem for path in FIGURES.glob("*.json"))
print("| | file | last figures | where |", "|---|---|---|---|", sep="\n")
for name in names:
    print(row(name, json.loads((FIGURES / f"{name}.json").read_text())))
