"""A run that loses a process twenty times, at random moments over its whole length: every step is there once, with the losses of
an undisturbed run."""

import os
import random
import time
from pathlib import Path

import pytest

from tests.faults import ENDED, REPLACED, DisturbedRun
from tests.survival import compare, run_undisturbed

pytestmark = pytest.mark.ray
SEED = int(os.environ.get("CMCGNS_FAILURE_SEED", "0"))
FAULTS, LENGTH, LONGEST_S = 20, 300, 0.5
"""A fault comes at most so many seconds after a step that is drawn."""
SETTINGS = (
    "--train.stage1_steps=220", "--train.stage2_steps=80", "--train.max_failures=-1", "--data.phantom_studies=130",
    "--train.log_every=1", "--train.checkpoint_every=5", "--clustering.refresh_every=10", "--train.warmup_steps=2",
)  # fmt: skip


def test_a_run_survives_twenty_faults_at_random_moments(tmp_path: Path) -> None:
    undisturbed = run_undisturbed(tmp_path / "undisturbed", *SETTINGS)
    draw = random.Random(SEED)
    run = DisturbedRun(tmp_path / "disturbed", *SETTINGS)
    for fault, moment in enumerate(sorted(draw.sample(range(1, LENGTH - 5), FAULTS)), start=1):
        run.wait_for(f"step {moment}", lambda moment=moment: run.step() >= moment)
        time.sleep(draw.uniform(0, LONGEST_S))
        kind, step = draw.choice([*REPLACED, *ENDED]), run.step()
        run.kill(kind, draw)
        print(f"{fault}: {kind} killed after step {step}")
    run.finish(LENGTH)
    compare(run.folder, undisturbed)
