"""Five million rows of 256 numbers in object storage: fitted by two actors within 15 minutes and 3 GB of memory each."""

import json
import time
from pathlib import Path

import pytest

from cmcgns import storage
from tests.clustering.sets import heavy_tailed, write_parquet
from tests.clustering.test_kmeans_job import run
from tests.s3 import S3Server

ROWS, DIM, FILES = 5_000_000, 256, 40
MOST_SECONDS, MOST_MIB = 15 * 60, 3000


@pytest.mark.ray
@pytest.mark.s3
def test_five_million_rows_in_object_storage(s3_server: S3Server, tmp_path: Path) -> None:
    bucket, rows = s3_server.make_bucket("large"), ROWS // FILES
    for number in range(FILES):
        folder = write_parquet(tmp_path / "part", heavy_tailed(rows, DIM, number), [0, rows], row_group_size=25_000)
        s3_server.upload(folder, f"{bucket}/embeddings/{number:02d}")
    begun = time.monotonic()
    done = run(
        tmp_path, f"--data.uri={bucket}/embeddings", f"--run.storage={bucket}/runs", "--run.name=fit",
        "--clustering.num_clusters=256", "--clustering.iterations=10", "--clustering.tolerance=0",
        "--clustering.memory_gib=1",
    )  # fmt: skip
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(storage.read_bytes(f"{bucket}/runs/fit/result.json"))
    print(done.stdout)
    print(f"{result['rows']} rows in {seconds:.0f} s, peak memory of the actors {result['peak_memory_mib']} MiB")
    assert (result["rows"], result["iterations"]) == (ROWS, 10)
    assert seconds < MOST_SECONDS
    assert max(result["peak_memory_mib"]) < MOST_MIB
