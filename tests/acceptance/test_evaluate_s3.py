"""An evaluation of a run in a bucket, into a bucket: all that a local one leaves lies there, and the second reads no film."""

import json
from pathlib import Path

import pytest

from tests.evaluate.test_embed_job import write_run
from tests.evaluate.test_evaluate_job import QUICK
from tests.jobs import Job
from tests.s3 import S3Server
from tests.small import small_config

pytestmark = [pytest.mark.ray, pytest.mark.s3]


def test_a_run_in_a_bucket_is_evaluated_into_a_bucket(s3_server: S3Server, tmp_path: Path) -> None:
    write_run(tmp_path / "run", small_config(data__phantom_studies=160))
    bucket = s3_server.make_bucket("evaluated")
    s3_server.upload(tmp_path / "run", f"{bucket}/runs/pretrained")
    said = []
    for name, compared in (("first", ""), ("second", f"{bucket}/evaluations/first")):
        job = Job(
            tmp_path, f"--run.storage={bucket}/evaluations", f"--run.name={name}", *QUICK,
            f"--evaluate.run={bucket}/runs/pretrained", f"--evaluate.compare=[{compared}]", config=None, job="jobs/evaluate.py",
        )  # fmt: skip
        said.append(job.wait())
        assert job.process.returncode == 0, said[-1][-3000:]
    listed = s3_server.client().list_objects_v2(Bucket="evaluated", Prefix="evaluations/")["Contents"]
    names = {found["Key"].removeprefix("evaluations/") for found in listed}
    assert {"first/evaluation.json", "first/evaluation.csv", "first/report.html", "first/scores.parquet"} <= names
    written = s3_server.client().get_object(Bucket="evaluated", Key="evaluations/second/evaluation.json")["Body"].read()
    gaps = [
        gap
        for gap in json.loads(written)["differences"]
        if gap["encoder"] == "pretrained"
        and gap["against"] == "pretrained in first"
        and gap["task"] == "classification"
    ]
    assert gaps
    assert all(gap["difference"] == 0 for gap in gaps)
    features = [found for found in listed if "features/" in found["Key"]]
    first = next(found for found in listed if found["Key"] == "evaluations/first/evaluation.json")
    assert features
    assert all(found["LastModified"] <= first["LastModified"] for found in features)  # the second has made none
