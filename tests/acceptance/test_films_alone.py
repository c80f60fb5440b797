"""Ten thousand real films without reports, from a folder and from the S3 server: the same run, and a loss that falls."""

import os
from pathlib import Path
from statistics import mean

import pytest

from cmcgns import storage
from tests.jobs import Job, result, rows
from tests.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3]
STEPS = 150
SETTINGS = (
    "--method.name=images100m", "--objective.prototypes=32", "--objective.freeze_steps=5",
    "--data.reports=false", "--data.validation_studies=64", "--data.resize=112", "--data.image_size=96",
    "--model.image_encoder=resnet-tiny-16", "--train.learning_rate=1e-3",
    "--train.num_workers=1", "--train.engine=torch", "--train.zero_stage=0", "--train.microbatch_size=32",
    "--train.global_batch_size=32", f"--train.stage1_steps={STEPS}", "--train.stage2_steps=0", "--train.warmup_steps=5",
)  # fmt: skip


def pretrain(folder: Path, uri: str) -> list[dict[str, float]]:
    """Rows of the run on the films at ``uri``."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    job = Job(folder, f"--data.uri={uri}", "--run.name=run", *SETTINGS, env=environment)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert result(folder / "run")["bad_rows"] == 0
    return rows(folder / "run")


def test_films_without_reports_from_a_folder_and_from_a_bucket(
    nih128: Path, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    here = pretrain(tmp_path_factory.mktemp("here"), str(nih128 / "labels.csv"))
    assert len(here) == STEPS
    losses = [row["loss"] for row in here]
    assert mean(losses[-5:]) < mean(losses[:5])
    bucket = s3_server.make_bucket("films")
    s3_server.upload(nih128 / "images", f"{bucket}/nih/images")
    storage.write_bytes(f"{bucket}/nih/labels.csv", (nih128 / "labels.csv").read_bytes())
    there = pretrain(tmp_path_factory.mktemp("there"), f"{bucket}/nih/labels.csv")
    assert [row["studies_digest"] for row in there] == [row["studies_digest"] for row in here]
    assert [row["loss"] for row in there] == pytest.approx(losses, rel=1e-5)
    print(f"{len(here)} steps: loss {mean(losses[:5]):.3f} to {mean(losses[-5:]):.3f}, the same from a bucket")
