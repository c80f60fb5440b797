"""Clusters mean something: those of the default run follow finding, side and negation in sentences it has never seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from cmcgns.evaluate.exported import open_run
from cmcgns.models.vision_language import build_model
from tests.evaluate.clusters import Agreement, agreement, attended, own_clusters
from tests.jobs import REPOSITORY, Job

LEAST, LEAD = 0.15, 0.1


def run_job(name: str, *settings: str) -> str:
    done = subprocess.run(
        [sys.executable, f"jobs/{name}.py", *settings], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.ray
def test_clusters_follow_what_unseen_sentences_say(tmp_path: Path) -> None:
    job = Job(tmp_path, "--run.name=pretrained", config=None)
    output = job.wait()
    assert job.process.returncode == 0, output[-3000:]
    pretrained, centroids = tmp_path / "pretrained", tmp_path / "pretrained" / "export" / "centroids.safetensors"
    run_job("embed", f"--embed.run={pretrained}", f"--run.storage={tmp_path}", "--run.name=embedded")
    shown = run_job(
        "kmeans", f"--data.uri={tmp_path}/embedded/sentences", "--data.text_column=text", f"--run.storage={tmp_path}",
        "--run.name=clusters", f"--clustering.start_from={centroids}", "--clustering.iterations=0",
        "--clustering.num_clusters=64", "--clustering.cpus_per_actor=0.5",
    )  # fmt: skip
    print(shown)
    sentences = parquet.read_table(tmp_path / "embedded" / "sentences").to_pandas()
    assigned = parquet.read_table(tmp_path / "clusters" / "assignments").to_pandas()
    assert sentences["id"].tolist() == assigned["id"].tolist()

    run, texts = open_run("embed.run", str(pretrained)), sentences["text"].tolist()
    clusters = run.config.objective.num_clusters
    torch.manual_seed(1)
    fresh = build_model(run.config, run.tokenizer.vocabulary_size)
    found = {
        "the run's centroids": agreement(assigned["centroid"].to_numpy(), texts),
        "clusters of its own": agreement(own_clusters(attended(run, run.load_model()), clusters), texts),
        "another study's film": agreement(own_clusters(attended(run, run.load_model(), shift=7), clusters), texts),
        "a random model": agreement(own_clusters(attended(run, fresh), clusters), texts),
    }
    print(f"{len(texts)} sentences of studies never seen")
    for name, each in found.items():
        print(
            f"{name:24} AMI {each.mutual_information:.3f}, purity {each.purity:.3f} (by chance {each.purity_by_chance:.3f})"
        )
    check(found["the run's centroids"], found["another study's film"], found["a random model"])
    print(json.dumps({name: each._asdict() for name, each in found.items()}))


def check(trained: Agreement, *controls: Agreement) -> None:
    assert trained.mutual_information >= LEAST
    assert trained.purity > trained.purity_by_chance
    for control in controls:
        assert trained.mutual_information >= control.mutual_information + LEAD
