"""A sweep whose folder is in a bucket: the table, the pictures and the winner's settings are there, and the settings run."""

import io
from pathlib import Path

import pandas as pd
import pytest

from cmcgns.cli import load_config
from cmcgns.config import Config
from cmcgns.errors import UserError
from tests.jobs import TINY, Job
from tests.s3 import S3Server
from tests.sweeping import SHORT

pytestmark = [pytest.mark.ray, pytest.mark.s3]


def test_a_sweep_leaves_its_answer_in_a_bucket(s3_server: S3Server, tmp_path: Path) -> None:
    bucket = s3_server.make_bucket("swept")
    one = ("--sweep.space={objective.temperature: {choice: [0.2]}}", "--sweep.search=grid", "--sweep.repeats=0")
    # the later storage counts
    job = Job(
        tmp_path, f"--run.storage={bucket}/runs", "--run.name=sweep", *SHORT, *one, config=TINY, job="jobs/sweep.py"
    )
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert f"--config {bucket}/runs/sweep/best.yaml" in " ".join(said.split())
    listed = s3_server.client().list_objects_v2(Bucket="swept", Prefix="runs/sweep/")["Contents"]
    names = {found["Key"].removeprefix("runs/sweep/") for found in listed}
    assert {"trials.csv", "best.yaml", "sweep.png", "report.html", "sweep.json", "trials/0000/result.json"} <= names
    written = s3_server.client().get_object(Bucket="swept", Key="runs/sweep/trials.csv")["Body"].read()
    assert pd.read_csv(io.BytesIO(written))["status"].tolist() == ["finished"]

    settings = load_config([f"--config={bucket}/runs/sweep/best.yaml"], Config, None)
    assert settings.objective.temperature == 0.2
    with pytest.raises(UserError, match=r"--config s3://swept/worst\.yaml: no such file"):
        load_config([f"--config={bucket}/worst.yaml"], Config, None)
