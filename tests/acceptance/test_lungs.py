"""Real films with lung masks and boxes: segmentation and detection by frozen encoders, split by group."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.jobs import Job

pytestmark = pytest.mark.ray


def test_lungs_are_found_by_heads_on_frozen_encoders(realdata: Path, tmp_path: Path) -> None:
    pretraining = Job(tmp_path, config=None)
    pretraining.wait()
    assert pretraining.process.returncode == 0, pretraining.text()[-3000:]
    job = Job(
        tmp_path, "--run.name=lungs", "--evaluate.corpus=false", f"--evaluate.sets={{masked: {realdata}}}",
        "--evaluate.draw_splits=true", "--evaluate.segmentation_fractions=[1.0]",
        config=None, job="jobs/evaluate.py",
    )  # fmt: skip
    said = job.wait()
    print(f"\n{said}")
    assert job.process.returncode == 0, said[-3000:]
    scores = pd.DataFrame(json.loads((tmp_path / "lungs" / "evaluation.json").read_text())["scores"])
    assert set(scores["task"]) == {"segmentation", "detection"}
    ours = scores[scores["encoder"] == "pretrained"].set_index("metric")
    # lungs are large: a box over the middle of every film would have about 0.5
    assert ours.loc["mean Dice where present", "value"] > 0.6
    assert ours["low"].notna().all()
