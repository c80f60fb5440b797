"""CM-CGNS behind the seam for methods trains as before it, bit for bit: the same rows of metrics as the commit before."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.earlier import environment, working_tree
from tests.jobs import REPOSITORY

BEFORE = "d9f039299e21c026c8b630ca0e9979b4c1f63f92"
TIMES = ("studies_per_s", "data_wait_s", "pool_wait_s", "step_s")
RUNS = {
    # 60 steps of the tiny phantom: both stages, clusters from step 20
    "tiny": ("--config", "jobs/configs/phantom-tiny.yaml"),
    # 40 steps of that commit's default, with both stages and clusters in them
    "default": (
        "--train.stage1_steps=25", "--train.stage2_steps=15", "--train.warmup_steps=5", "--train.validate_every=20",
        "--clustering.start_step=5", "--clustering.refresh_every=5", "--clustering.start_cosine=1.0",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", name="before")
def fixture_before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working tree of the commit before the seam."""
    with working_tree(BEFORE, tmp_path_factory.mktemp("before")) as tree:
        yield tree


def rows_of(tree: Path, folder: Path, settings: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every row of metrics, without times."""
    command = [sys.executable, "jobs/pretrain.py", *settings, f"--run.storage={folder}", "--run.name=run"]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


@pytest.mark.parametrize("name", RUNS)
def test_every_row_equals_that_of_the_commit_before(name: str, before: Path, tmp_path: Path) -> None:
    theirs = rows_of(before, tmp_path / "before", RUNS[name])
    # the settings of that commit: the default has changed since
    config = ("--config", str(before / "jobs/configs/phantom.yaml")) if name == "default" else ()
    ours = rows_of(REPOSITORY, tmp_path / "now", (*config, *RUNS[name]))
    assert len(ours) == len(theirs)
    for now, then in zip(ours, theirs, strict=True):
        assert {key: now.get(key) for key in then} == then
        new = now.keys() - then.keys()  # columns since then
        assert all("_parts_" in key or "_combined_" in key or key == "gradient_norm" for key in new), new
    steps = sum(row["split"] == "train" for row in ours)
    print(f"{name}: {steps} steps and {len(ours) - steps} validations equal, last loss {ours[-1]['loss']!r}")
