"""`jobs/evaluate.py` as a user runs it: all tasks on the phantom, unreadable inputs, and the same result twice."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cmcgns.cli import run_job
from cmcgns.evaluate.config import TASKS, EvaluateJobConfig
from cmcgns.evaluate.run import EvaluateJob
from cmcgns.job import run
from cmcgns.library.runs import last_run
from cmcgns.run_folder import EXPORT_HASHES, automatic_name
from cmcgns.storage.integrity import write_hashes
from tests.evaluate.test_embed_job import write_run
from tests.jobs import run_here
from tests.small import small_config

QUICK = (
    "--evaluate.cpus_per_worker=0.5", "--evaluate.draws=2", "--evaluate.fractions=[0.1]", "--evaluate.resamples=100",
    "--evaluate.head_steps=10", "--evaluate.segmentation_fractions=[1.0]",
)  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the export of an untrained model."""
    folder = tmp_path_factory.mktemp("evaluated") / "pretrained"
    write_run(folder, small_config(data__phantom_studies=160, data__max_bad_fraction=0.5))
    return folder


def job(cwd: Path, *settings: str) -> "subprocess.CompletedProcess[str]":
    return run_here(cwd, "evaluate", *QUICK, *settings)


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_every_task_is_measured_and_what_cannot_be_is_told(pretrained: Path, tmp_path: Path) -> None:
    """One evaluation with a missing set, another kind of encoder, and an unreadable folder among its encoders."""
    other = f"{pretrained}/export/image_encoder"
    done = job(
        tmp_path, f"--evaluate.run={pretrained}/export", "--run.name=e", f"--evaluate.beside=[random, {other}]",
        "--evaluate.sets={rsna: nowhere}",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "failed: evaluate.sets rsna" in done.stdout
    folder = tmp_path / "runs" / "e"
    found = result(folder)
    assert len(found["failures"]) == 1
    scores = pd.DataFrame(found["scores"])
    assert set(scores["task"]) == set(TASKS)
    assert set(scores["encoder"]) == {"pretrained", "random", "image_encoder"}
    without_reports = set(scores.loc[scores["encoder"] == "image_encoder", "task"])
    assert without_reports == {"classification", "segmentation", "detection"}
    assert ((scores["low"] <= scores["high"]) | scores["low"].isna()).all()
    assert (pd.read_csv(folder / "evaluation.csv")["value"] - scores["value"]).abs().max() < 1e-6
    test = found["sets"]["phantom"]["splits"]["test"]
    in_table = scores[(scores["task"] == "retrieval") & (scores["encoder"] == "pretrained")]
    assert set(in_table["number"]) == {test["images"]}  # the whole test split

    features = sorted((tmp_path / "runs" / "features").iterdir())
    made = [path.stat().st_mtime_ns for path in features]
    shutil.rmtree(pretrained / "export" / "tokenizer")
    (pretrained / "export" / EXPORT_HASHES).unlink()
    write_hashes(pretrained / "export", EXPORT_HASHES)  # left out on purpose, not lost
    again = job(
        tmp_path, f"--evaluate.run={pretrained}", "--run.name=again", f"--evaluate.beside=[{other}]",
        f"--evaluate.compare=[{folder}]", "--evaluate.tasks=[classification, retrieval]",
    )  # fmt: skip
    assert again.returncode == 1, again.stdout + again.stderr
    assert "has no tokenizer folder" in again.stdout
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs" / "features").iterdir())] == made
    beside = pd.DataFrame(result(tmp_path / "runs" / "again")["scores"]).query("task == 'classification'")
    values = {name: rows["value"].tolist() for name, rows in beside.groupby("encoder")}
    assert values["pretrained"] == pytest.approx(values["pretrained in e"])  # the same features, draws and resamples
    gaps = pd.DataFrame(result(tmp_path / "runs" / "again")["differences"])
    own = gaps[(gaps["encoder"] == "pretrained") & (gaps["against"] == "pretrained in e")]
    assert len(own)
    assert all(interval == [0.0, 0.0] for interval in own["interval"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "has no finished run with an automatic name"),
        (["--evaluate.run=gone"], "is not a run folder: it has no config.yaml"),
        (["--evaluate.run={run}", "--evaluate.tasks=[retreival]"], "evaluate.tasks"),
        (["--evaluate.run={run}", "--evaluate.fractions=[0.0]"], "evaluate.fractions 0.0 is not a fraction"),
        (["--evaluate.run={run}", "--evaluate.beside=[nobody]"], "evaluate.beside nobody is neither `random`"),
        (["--evaluate.run={run}", "--evaluate.prompts=none.yaml"], "none.yaml"),
        (["--evaluate.run={run}", "--evaluate.compare=[{run}]"], "contains no evaluation"),
        (["--evaluate.runs={run}"], "did you mean evaluate.run?"),
        (
            ["--evaluate.run={run}", "--evaluate.findings={{a: {{}}}}"],
            "evaluate.findings a: no such set in evaluate.sets",
        ),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_message(
    arguments: list[str], words: str, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(run=pretrained) for word in arguments]
    assert (
        run_job(lambda config: run(EvaluateJob(config)), EvaluateJobConfig, None, [*given, f"--run.storage={tmp_path}"])
        == 2
    )
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    assert words in said.err
    assert not any(tmp_path.iterdir())


def test_without_a_name_the_last_finished_run_is_evaluated(pretrained: Path, tmp_path: Path) -> None:
    latest = automatic_name("pretrain")
    for name in ("pretrain-20260101-000000", "pretrain-20260102-000000-0a1b", latest, "mine"):
        shutil.copytree(pretrained, tmp_path / name)
    (tmp_path / "pretrain-29991231-235959-0a1b").mkdir()  # has not finished
    assert last_run(str(tmp_path)) == str(tmp_path / latest)
