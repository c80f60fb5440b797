"""Every method on a fake accelerator: all tensors of a step are on one device, and the host reads nothing back.

A guard for GPUs that needs none. ``tests/acceptance/test_fake_device.py`` runs every variant on 1, 8 and 512 ranks.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.jobs import REPOSITORY

SOME = ["films", "gloria", "siglip", "xdc", "images100m", "crops, views and masks", "dense head"]
"""The methods with most of their own operators."""


def on_fake_device(names: list[str], ranks: list[int]) -> list[dict[str, Any]]:
    """What ``tests.methods.fake_device`` prints; an operator between two devices, or one that needs numbers, ends it."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.methods.fake_device",
        "--ranks",
        *map(str, ranks),
        "--",
        *names,
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module", name="found")
def fixture_found() -> dict[str, dict[str, Any]]:
    """Operators, bytes and host reads of each part of a step."""
    return {each["name"]: each["parts"] for each in on_fake_device(SOME, [8])}


@pytest.mark.parametrize("name", SOME)
def test_a_step_stays_on_the_device(found: dict[str, dict[str, Any]], name: str) -> None:
    assert [part["host_reads"] for part in found[name].values()] == [{}] * len(found[name])
    assert all(part["operators"] > 5 for part in found[name].values())
