"""`python jobs/evaluate.py` after the default pretraining: all tasks on the phantom in under 10 minutes; pretraining helps."""

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cmcgns.evaluate.config import TASKS
from tests.jobs import Job

pytestmark = pytest.mark.ray

MOST_MINUTES = 10


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """evaluation.json of the run that the default config leaves."""
    storage = tmp_path_factory.mktemp("default")
    pretraining = Job(storage, config=None)
    pretraining.wait()
    assert pretraining.process.returncode == 0, pretraining.text()[-3000:]
    began = time.monotonic()
    job = Job(storage, "--run.name=evaluation", config=None, job="jobs/evaluate.py")
    said = job.wait()
    minutes = (time.monotonic() - began) / 60
    print(f"\n{said}\n{minutes:.1f} minutes")
    assert job.process.returncode == 0, said[-3000:]
    assert minutes < MOST_MINUTES
    evaluation: dict[str, Any] = json.loads((storage / "evaluation" / "evaluation.json").read_text())
    check_files(storage / "evaluation")
    return evaluation


def check_files(folder: Path) -> None:
    assert "data:image/png" in (folder / "report.html").read_text()
    assert len(pd.read_csv(folder / "evaluation.csv")) > 30


def test_every_task_is_measured_on_the_whole_test_split(found: dict[str, Any]) -> None:
    scores = pd.DataFrame(found["scores"])
    assert set(scores["task"]) == set(TASKS)
    test = found["sets"]["phantom"]["splits"]["test"]["images"]
    assert set(scores.query("metric in ('mean AUC', 'mAP', 'recall@1')")["number"]) == {test}


@pytest.mark.parametrize(
    ("task", "setting", "metric"),
    [
        ("classification", "linear, 10% of labels", "mean AUC"),
        ("retrieval", "film to report", "recall@1"),
        ("retrieval", "report to film", "recall@1"),
    ],
)
def test_pretraining_helps_beyond_the_paired_interval(
    found: dict[str, Any], task: str, setting: str, metric: str
) -> None:
    gap = pd.DataFrame(found["differences"]).query(
        "task == @task and setting == @setting and metric == @metric and encoder == 'pretrained' and against == 'random'"
    )
    assert len(gap) == 1
    assert gap.iloc[0]["interval"][0] > 0
