"""Real films and reports: the recipe `openi`, InfoNCE and an untrained model side by side.

Retrieval on the validation films, linear probes of the ten commonest findings there, and transfer to two other collections:
probes of 14 findings, and lungs. Each figure with its interval, and the differences paired.
"""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.jobs import REPOSITORY, Job, result

pytestmark = pytest.mark.ray

RECIPE = REPOSITORY / "jobs" / "configs" / "openi.yaml"
STEPS = 240
"""Shorter than the recipe: both methods and the evaluation in under 25 minutes."""
INFONCE = ("--method.name=infonce", "--train.stage2_steps=0")
PROBLEMS = '{labelled:openi: {column: problems, separator: ";", commonest: 10, unknown: [No Indexing]}}'


@pytest.fixture(scope="module")
def scores(openi: Path, nih128: Path, lungmasks: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """What the evaluation found, a row per score and a column per encoder."""
    storage = tmp_path_factory.mktemp("openi")
    for name, *settings in (("cm-cgns", "--train.stage2_steps=40"), ("infonce", *INFONCE)):
        run = Job(
            storage,
            f"--run.name={name}",
            f"--data.uri={openi}",
            f"--train.stage1_steps={STEPS}",
            *settings,
            config=RECIPE,
        )
        said = run.wait(1800)
        assert run.process.returncode == 0, said[-3000:]
        print(f"\n{name}: {result(storage / name)['metrics']}")
    sets = f"labelled:openi: {openi}, labelled:nih128: {nih128}/labels.csv, masked: {lungmasks}/masked.csv"
    job = Job(
        storage, "--run.name=side-by-side", f"--evaluate.run={storage}/cm-cgns", f"--evaluate.sets={{{sets}}}",
        f"--evaluate.beside=[{storage}/infonce, random]", "--evaluate.split=valid", f"--evaluate.findings={PROBLEMS}",
        "--evaluate.tasks=[retrieval, classification, segmentation]", config=None, job="jobs/evaluate.py",
    )  # fmt: skip
    said = job.wait(1800)
    print(f"\n{said}")
    assert job.process.returncode == 0, said[-3000:]
    return pd.DataFrame(json.loads((storage / "side-by-side" / "evaluation.json").read_text())["scores"])


def of_encoders(scores: pd.DataFrame, images: str, setting: str, metric: str) -> pd.DataFrame:
    """The rows of one score, by encoder."""
    rows = scores.query("images == @images and setting == @setting and metric == @metric").set_index("encoder")
    assert set(rows.index) == {"pretrained", "infonce", "random"}
    assert rows["low"].notna().all()
    return rows


@pytest.mark.parametrize("way", ["film to report", "report to film"])
def test_a_film_and_its_report_find_each_other(scores: pd.DataFrame, way: str) -> None:
    found = of_encoders(scores, "corpus", way, "recall@10")
    chance = float(found.loc["infonce", "note"].removeprefix("chance "))
    assert found.loc["infonce", "low"] > chance
    assert found.loc["pretrained", "value"] > chance


def test_probes_of_the_ten_commonest_findings_beat_random_weights(scores: pd.DataFrame) -> None:
    found = of_encoders(scores, "labelled:openi", "linear, 100% of labels", "mean AUC")
    assert scores.query("images == 'labelled:openi' and setting == 'linear, 100% of labels'")["metric"].nunique() == 11
    assert found.loc["infonce", "value"] > found.loc["random", "value"]


def test_fourteen_findings_of_another_collection_are_probed(scores: pd.DataFrame) -> None:
    few, some, every = (
        of_encoders(scores, "labelled:nih128", f"linear, {share} of labels", "mean AUC")
        for share in ("1%", "10%", "100%")
    )
    assert set(few["number"]) == set(some["number"]) == set(every["number"])
    assert every["low"].min() > 0.5
    # with all labels, a probe of random weights is as good
    assert some.loc["infonce", "value"] > some.loc["random", "value"]


def test_lungs_are_found(scores: pd.DataFrame) -> None:
    assert of_encoders(scores, "masked", "frozen, 10% of labels", "mean Dice of all films")["low"].min() > 0.5
