"""InfoNCE through the whole job: a run without clustering actors and decoder, its export, evaluation and a sweep."""

import json
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from tests.jobs import Job, checkpoints, result, rows

INFONCE = ("--method.name=infonce", "--train.stage2_steps=0")
ACTORS = ("BankActor", "BankCoordinator")


def test_infonce_pretrains_exports_evaluates_and_sweeps(tmp_path: Path) -> None:
    job = Job(tmp_path, *INFONCE, "--train.stage1_steps=60", "--run.name=run")
    job.wait_for(lambda: bool(rows(tmp_path / "run")))
    assert not [name for name in ACTORS if job.processes(name)]
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    run = tmp_path / "run"
    *_, last = checkpoints(run)
    names = load_file(last / "weights_0.safetensors").keys()
    assert not [name for name in names if "decoder" in name or "cross_attention" in name]
    assert not (last / "clustering.safetensors").exists()
    for part in ("image_encoder", "text_encoder"):
        AutoModel.from_pretrained(run / "export" / part)
    AutoTokenizer.from_pretrained(run / "export" / "tokenizer")

    quick = ("--evaluate.resamples=100", "--evaluate.draws=1", "--evaluate.fractions=[0.1]", "--evaluate.head_steps=20")
    measured = Job(
        tmp_path, f"--evaluate.run={run}", *quick, "--run.name=measured", config=None, job="jobs/evaluate.py"
    )
    said = measured.wait()
    assert measured.process.returncode == 0, said[-3000:]
    found = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    tasks = {score["task"] for score in found["scores"]}
    assert tasks == {"retrieval", "zeroshot", "classification", "segmentation", "detection"}

    sweep = Job(
        tmp_path, *INFONCE, "--train.stage1_steps=20", "--sweep.trials=2", "--sweep.search=random", "--run.name=sweep",
        "--sweep.scheduler=none", "--sweep.finalists=1", "--sweep.repeats=0", job="jobs/sweep.py",
    )  # fmt: skip
    said = sweep.wait()
    assert sweep.process.returncode == 0, said[-3000:]
    answer = result(tmp_path / "sweep")
    assert list(answer["finalists"][0]["drawn"]) == ["objective.temperature"]
    print(
        f"recall@1 {result(run)['metrics']['i2t_recall_at_1']:.3f} after 60 steps; tasks {', '.join(sorted(tasks))}; "
        f"best trial {answer['best']} of 2"
    )
