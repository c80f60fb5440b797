"""Every variant of every method on a fake accelerator with 1, 8 and 512 ranks: one device, nothing read back, budgets kept."""

from typing import Any

import pytest

from tests.methods.fake_device import OTHERS
from tests.methods.test_fake_device import on_fake_device
from tests.methods.test_ranks import CONFIGS

RANKS = [1, 8, 512]
MOST_OPERATORS = 1200
"""Of the losses of one microbatch on 8 ranks; each is a launch on a GPU."""
GROWTH = 1.5
"""Bytes of the losses may grow by this factor times the number of ranks: features of all ranks are compared with own ones."""


@pytest.fixture(scope="module", name="found")
def fixture_found() -> dict[tuple[str, int], dict[str, Any]]:
    rows = on_fake_device([*CONFIGS, *OTHERS], RANKS)
    for row in rows:
        parts = ", ".join(f"{name} {part['operators']}" for name, part in row["parts"].items())
        mib = row["parts"]["losses"]["bytes"] / 2**20 if "losses" in row["parts"] else 0.0
        print(f"{row['name']} on {row['ranks']} ranks: operators {parts}; losses allocate {mib:.2f} MiB")
    return {(row["name"], row["ranks"]): row["parts"] for row in rows}


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_the_host_reads_nothing(found: dict[tuple[str, int], dict[str, Any]], name: str) -> None:
    own = [parts for (each, _), parts in found.items() if each == name]
    assert len(own) == (1 if name in OTHERS else len(RANKS))
    assert all(part["host_reads"] == {} for parts in own for part in parts.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_operators_and_bytes_stay_within_their_budgets(found: dict[tuple[str, int], dict[str, Any]], name: str) -> None:
    losses = {ranks: found[name, ranks]["losses"] for ranks in RANKS}
    assert losses[8]["operators"] <= MOST_OPERATORS
    assert losses[512]["operators"] == losses[8]["operators"]  # none for each rank
    assert losses[512]["bytes"] <= GROWTH * 512 / 8 * losses[8]["bytes"]
