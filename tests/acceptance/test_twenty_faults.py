"""A run that loses a process twenty times, at random moments: every step is there once, with the losses of an undisturbed run."""

import os
import random
import time
from pathlib import Path

import pytest

from tests.faults import ENDED, REPLACED, DisturbedRun
from tests.survival import compare, run_undisturbed

pytestmark = pytest.mark.ray
SEED = int(os.environ.get("CMCGNS_FAILURE_SEED", "0"))
FAULTS, LENGTH, LONGEST_S = 20, 300, 4.0
"""A fault comes within so many seconds of the first step after the last one."""
SETTINGS = (
    "--train.stage1_steps=220", "--train.stage2_steps=80", "--train.max_failures=-1", "--data.phantom_studies=130",
    "--train.log_every=1", "--train.checkpoint_every=5", "--clustering.refresh_every=10", "--train.warmup_steps=2",
)  # fmt: skip


def test_a_run_survives_twenty_faults_at_random_moments(tmp_path: Path) -> None:
    undisturbed = run_undisturbed(tmp_path / "undisturbed", *SETTINGS)
    draw = random.Random(SEED)
    run = DisturbedRun(tmp_path / "disturbed", *SETTINGS)
    for fault in range(1, FAULTS + 1):
        run.wait_for("the next step", lambda: run.step() > 0)
        time.sleep(draw.uniform(0, LONGEST_S))
        kind, step = draw.choice([*REPLACED, *ENDED]), run.step()
        run.kill(kind, draw)
        print(f"{fault}: {kind} killed after step {step}")
    run.finish(LENGTH)
    compare(run.folder, undisturbed)
