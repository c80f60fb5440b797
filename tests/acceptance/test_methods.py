"""Every method but the default through the whole job: it pretrains, plain transformers loads its export, and it is evaluated."""

import json
from pathlib import Path

import pytest
from transformers import AutoModel

from cmcgns.config import METHODS, MethodConfig, method_settings
from tests.jobs import Job, result, rows

NAMES = [name for name in METHODS if name != MethodConfig().name]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_pretrains_exports_and_evaluates(name: str, tmp_path: Path) -> None:
    steps = {1: (6, 0), 3: (2, 2, 2)}[method_settings(name).stages]
    lengths = [f"--train.stage{stage}_steps={each}" for stage, each in enumerate(steps, start=1)]
    short = (*lengths, "--train.warmup_steps=1")
    job = Job(tmp_path, f"--method.name={name}", *short, "--run.name=run")
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    run = tmp_path / "run"
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    for part in ("image_encoder", "text_encoder"):
        AutoModel.from_pretrained(run / "export" / part)
    measured = Job(
        tmp_path, f"--evaluate.run={run}", "--evaluate.tasks=[retrieval, zeroshot]", "--evaluate.resamples=100",
        "--run.name=measured", config=None, job="jobs/evaluate.py",
    )  # fmt: skip
    said = measured.wait()
    assert measured.process.returncode == 0, said[-3000:]
    scores = json.loads((tmp_path / "measured" / "evaluation.json").read_text())["scores"]
    assert {(score["task"], score["encoder"]) for score in scores} == {
        (task, encoder) for task in ("retrieval", "zeroshot") for encoder in ("pretrained", "random")
    }
    losses = [row["loss"] for row in rows(run)]
    print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, recall@1 {result(run)['metrics']['i2t_recall_at_1']:.3f}")
