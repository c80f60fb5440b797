"""`jobs/kmeans.py` from bucket to bucket. A file of its own: its Ray is joined once the server's keys are in the environment."""

import json
from pathlib import Path

import pytest
from pyarrow import parquet

from cmcgns import storage
from tests.clustering.sets import separated, write_parquet
from tests.jobs import run_here
from tests.s3 import S3Server


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.parametrize("settings", [["--clustering.memory_gib=0"], ["--clustering.batch_rows=4096"]])
def test_embeddings_in_a_bucket_are_clustered_into_a_bucket(
    tmp_path: Path, s3_server: S3Server, local_ray: None, settings: list[str]
) -> None:
    """Rows kept on disk, and rows read for each mini-batch."""
    bucket = s3_server.make_bucket(f"kmeans-{'batch' if 'batch' in settings[0] else 'disk'}")
    s3_server.upload(write_parquet(tmp_path / "set", separated(9000), [0, 4000, 9000]), f"{bucket}/set")
    done = run_here(
        tmp_path, "kmeans", f"--data.uri={bucket}/set", f"--run.storage={bucket}/runs", "--run.name=fit", *settings,
        "--clustering.num_clusters=64", "--clustering.iterations=3", "--clustering.actors=2", "--clustering.cpus_per_actor=0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    files, path = storage.filesystem(f"{bucket}/runs/fit/assignments")
    found = parquet.read_table(path, filesystem=files).to_pandas()
    assert found["id"].tolist() == [f"row-{i}" for i in range(9000)]
    written = set(storage.list_files(f"{bucket}/runs/fit"))
    assert {"centroids.safetensors", "statistics.json", "result.json", "fit.safetensors", "metrics.jsonl"} <= written
    assert json.loads(storage.read_bytes(f"{bucket}/runs/fit/result.json"))["mean_similarity"] > 0.9
