"""Real films and reports out of a bucket of the real S3 server, through two workers and ZeRO-2, back into the bucket.

Shown: status 0; checkpoints, metrics.jsonl, config.yaml, result.json and export/ lie in the bucket; the mean global
loss of the last 5 of 30 steps is under that of the first 5; filtered views are counted apart from bad rows.
Real DICOMs and Open-I reports through their readers: tests/data/test_dicom.py and tests/data/test_readers.py.
"""

import json
import os
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from cmcgns import storage
from tests.jobs import Job
from tests.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3]

STEPS = 30
FILES = ("config.yaml", "metrics.jsonl", "result.json", "bad_rows.jsonl", "export/heads.safetensors")


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server, realdata: Path) -> str:
    uri = s3_server.make_bucket("hospital")
    s3_server.upload(realdata / "images", f"{uri}/films/images")
    storage.write_bytes(f"{uri}/films/pairs.csv", (realdata / "pairs.csv").read_bytes())
    return uri


@pytest.fixture(scope="module")
def output(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run on the bucket said; the corpus can be had from nowhere else."""
    job = Job(
        tmp_path_factory.mktemp("driver"),
        f"--data.uri={bucket}/films", "--data.format=pairs-csv", "--train.num_workers=2", "--train.zero_stage=2",
        f"--run.storage={bucket}/runs", "--run.name=real", "--train.microbatch_size=8", "--train.global_batch_size=16",
        f"--train.stage1_steps={STEPS}", "--train.stage2_steps=6", "--train.log_every=5", "--train.checkpoint_every=15",
        "--objective.num_clusters=8", "--clustering.refresh_every=5", "--data.resize=112", "--data.image_size=96",
        "--data.max_tokens=256",
        env={name: value for name, value in os.environ.items() if name.startswith("AWS_")},
    )  # fmt: skip
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    return said


def read_json(uri: str) -> Any:
    return json.loads(storage.read_bytes(uri))


def test_everything_lies_in_the_bucket(bucket: str, output: str, s3_server: S3Server) -> None:
    run = f"{bucket}/runs/real"
    files = storage.list_files(run)
    assert not set(FILES) - set(files)
    assert {name.split("/")[1] for name in files if name.startswith("export/")} >= {"image_encoder", "text_encoder"}
    assert any(name.startswith("checkpoint_") and name.endswith("progress.json") for name in files)
    found = read_json(f"{run}/result.json")
    assert found["status"] == "finished"
    assert found["checkpoint"].startswith(f"{run}/checkpoint_")
    assert found["export"] == f"{run}/export"
    print(f"\n{len(files)} files in {run}; {s3_server.gets('hospital/films/images')} films read from the bucket")


def test_the_loss_falls(bucket: str, output: str) -> None:
    lines = [json.loads(line) for line in storage.read_bytes(f"{bucket}/runs/real/metrics.jsonl").decode().splitlines()]
    losses = [row["loss_global"] for row in lines if row["split"] == "train" and row["stage"] == 1]
    first, last = mean(losses[:5]), mean(losses[-5:])
    print(f"\nmean global loss of steps 1-5: {first:.3f}; of steps {STEPS - 4}-{STEPS}: {last:.3f}")
    assert len(losses) == STEPS
    assert last < first


def test_filtered_views_are_counted_apart_from_bad_rows(bucket: str, output: str) -> None:
    assert "6 view L" in output
    assert read_json(f"{bucket}/runs/real/result.json")["bad_rows"] == 0
    assert storage.read_bytes(f"{bucket}/runs/real/bad_rows.jsonl") == b""
