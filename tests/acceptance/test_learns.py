"""Every method learns: its config on the phantom beats an untrained encoder in probes at 10 % of the labels beyond the paired
interval, and in retrieval if it aligns films and reports.

Some eight minutes a method on two cores: make accept ONLY=learns runs all, `pytest tests/acceptance/test_learns.py -k clip` one.
"""

import json
from pathlib import Path

import pytest

from cmcgns.config import METHODS, MethodConfig
from tests.jobs import REPOSITORY, Job

pytestmark = pytest.mark.ray
ALIGNED = [name for name in METHODS if name not in ("xdc", "images100m")]
"""Methods that compare films with reports: `xdc` matches clusters, `images100m` reads no report."""
PROBES = ("classification", "linear, 10% of labels", "mean AUC")
RETRIEVAL = [("retrieval", direction, "recall@1") for direction in ("film to report", "report to film")]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_beats_an_untrained_encoder_beyond_the_interval(name: str, tmp_path: Path) -> None:
    recipe = "phantom" if name == MethodConfig().name else f"phantom-{name}"
    pretraining = Job(tmp_path, "--run.name=run", config=REPOSITORY / "jobs" / "configs" / f"{recipe}.yaml")
    said = pretraining.wait()
    assert pretraining.process.returncode == 0, said[-3000:]
    job = Job(
        tmp_path, f"--evaluate.run={tmp_path / 'run'}", "--evaluate.tasks=[retrieval, classification]",
        "--evaluate.fractions=[0.1]", "--run.name=measured", config=None, job="jobs/evaluate.py",
    )  # fmt: skip
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    differences = json.loads((tmp_path / "measured" / "evaluation.json").read_text())["differences"]
    gains = {}
    for wanted in [PROBES, *(RETRIEVAL if name in ALIGNED else [])]:
        [gap] = [
            each for each in differences if (each["task"], each["setting"], each["metric"]) == wanted
            and (each["encoder"], each["against"]) == ("pretrained", "random")
        ]  # fmt: skip
        low, high = gap["interval"]
        print(f"{name}: {wanted[1]}, {wanted[2]}: {gap['difference']:+.3f} ({low:+.3f} to {high:+.3f})")
        gains[wanted] = low
    assert min(gains.values()) > 0, gains
