"""A phantom MIMIC-CXR-JPG tree and its DICOM twin, 5,000 studies of 768 x 640 each, prepared to the S3 server.

Shown: same reports, same splits, pictures equal within 2 grey levels on average; pretraining from each, raw or prepared,
gives the same first 5 losses within 1 %.
"""

import os
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from cmcgns import storage
from cmcgns.data.manifest import read_manifest
from cmcgns.phantom import PhantomCorpus, write_mimic_cxr, write_mimic_cxr_jpg
from cmcgns.storage import parquet
from tests.data.prepare.sets import run
from tests.jobs import Job
from tests.jobs import rows as metric_rows
from tests.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3]

STUDIES, HEIGHT, WIDTH = 5_000, 640, 768
STEPS = 5
SAME = ("patient_id", "study_id", "image_id", "view", "split", "report", "sentences", "labels")
TREES = {"jpg": write_mimic_cxr_jpg, "dicom": write_mimic_cxr}


@pytest.fixture(scope="module")
def corpora(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """URIs of both trees and of both prepared sets."""
    bucket, folder = s3_server.make_bucket("twins5000"), tmp_path_factory.mktemp("trees")
    corpus = PhantomCorpus(STUDIES, seed=12, height=HEIGHT, width=WIDTH)
    found = {}
    for name, write in TREES.items():
        found[name] = str(write(corpus, folder / name, workers=2))
        found[f"prepared {name}"] = f"{bucket}/{name}"
        done = run(f"--data.uri={folder / name}", f"--prepare.out={bucket}/{name}", "--data.group_studies=256")
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout[-600:])
    return found


def test_reports_splits_and_pictures_are_the_same(corpora: dict[str, str]) -> None:
    jpg, dicom = (read_manifest(corpora[f"prepared {name}"]) for name in TREES)
    assert [shard.name for shard in jpg.shards] == [shard.name for shard in dicom.shards]
    levels, films = 0.0, 0
    for shard in jpg.shards:
        tables = [
            parquet.read(storage.join(corpora[f"prepared {name}"], shard.name), pq.ParquetFile.read) for name in TREES
        ]
        for column in SAME:
            assert tables[0][column].equals(tables[1][column]), column
        for pair in zip(*(table["image"].to_pylist() for table in tables), strict=True):
            one_HW, other_HW = (cv2.imdecode(np.frombuffer(film, np.uint8), cv2.IMREAD_UNCHANGED) for film in pair)
            if one_HW.shape != other_HW.shape:  # a border that differs by a line
                one_HW = cv2.resize(one_HW, other_HW.shape[::-1], interpolation=cv2.INTER_AREA)
            levels, films = levels + float(np.abs(one_HW.astype(int) - other_HW).mean()), films + 1
    print(f"\n{films} films differ by {levels / films:.2f} grey levels on average")
    assert levels / films <= 2


def test_the_first_five_losses_are_the_same_raw_or_prepared(corpora: dict[str, str], tmp_path: Path) -> None:
    losses = {}
    for number, (name, uri) in enumerate(corpora.items()):
        job = Job(
            tmp_path, f"--data.uri={uri}", f"--run.name=run{number}", f"--train.stage1_steps={STEPS}",
            "--train.stage2_steps=0", "--train.warmup_steps=0", "--train.log_every=1", "--data.validation_studies=32",
            "--data.resize=128", "--data.image_size=96",
            env={key: value for key, value in os.environ.items() if key.startswith("AWS_")},
        )  # fmt: skip
        said = job.wait()
        assert job.process.returncode == 0, said[-3000:]
        losses[name] = [row["loss"] for row in metric_rows(tmp_path / f"run{number}")]
    for name, found in losses.items():
        print(name, [round(loss, 4) for loss in found])
        assert len(found) == STEPS
        assert found == pytest.approx(losses["jpg"], rel=0.01)
