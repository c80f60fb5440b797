"""Preparing into a bucket: the same films as JPEG and DICOM, a faulty server, a deleted bucket."""

import threading
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from cmcgns import storage
from cmcgns.data.manifest import read_manifest
from cmcgns.phantom import PhantomCorpus, write_mimic_cxr, write_mimic_cxr_jpg
from cmcgns.storage import errors as faults
from cmcgns.storage import s3
from tests.data.prepare.sets import files, prepare_here, rows
from tests.faulty_proxy import NO_BUCKET, Faults, running_proxy
from tests.ray_head import RayHead, connected
from tests.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3]


def forget_clients(monkeypatch: pytest.MonkeyPatch, endpoint: str | None = None) -> None:
    """Drop clients of other endpoints; ``endpoint`` is the current one."""
    for cache in (s3._arrow_filesystem, s3._client, s3._profile_value):
        cache.cache_clear()
    if endpoint is not None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)


def test_the_same_corpus_as_jpeg_and_as_dicom_gives_the_same_set(
    ray_head: RayHead, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_server.make_bucket("twins")
    forget_clients(monkeypatch)
    corpus = PhantomCorpus(40, seed=6, height=320, width=384)
    write_mimic_cxr_jpg(corpus, tmp_path / "jpg")
    write_mimic_cxr(corpus, tmp_path / "dicom")
    with connected(ray_head):
        for name in ("jpg", "dicom"):
            assert prepare_here(tmp_path / name, f"{bucket}/{name}") == 0
    difference = []
    for one, other in zip(rows(f"{bucket}/jpg"), rows(f"{bucket}/dicom"), strict=True):
        for column in ("patient_id", "study_id", "image_id", "view", "split", "report", "sentences", "labels"):
            assert one[column] == other[column]
        films = [cv2.imdecode(np.frombuffer(row["image"], np.uint8), cv2.IMREAD_UNCHANGED) for row in (one, other)]
        height, width = films[1].shape
        same_size = cv2.resize(films[0], (width, height), interpolation=cv2.INTER_AREA)
        difference.append(np.abs(same_size.astype(int) - films[1]).mean())
    print(f"{len(difference)} films differ by {np.mean(difference):.2f} grey levels on average")
    assert np.mean(difference) <= 2
    assert storage.clear_leftovers(f"{bucket}/jpg") == 0


def test_a_faulty_server_gives_the_same_set_and_retries_are_counted(
    ray_head: RayHead,
    s3_server: S3Server,
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket = s3_server.make_bucket("rough")
    s3_server.upload(raw, f"{bucket}/raw")
    with running_proxy(s3_server.endpoint, seed=1) as proxy:
        forget_clients(monkeypatch, proxy.endpoint)
        proxy.faults = Faults(errors=0.10, cuts=0.02)
        with connected(ray_head):
            assert prepare_here(f"{bucket}/raw", f"{bucket}/set") == 0
            assert prepare_here(raw, tmp_path / "set") == 0
        proxy.faults = Faults()
        assert read_manifest(f"{bucket}/set").content_hash == read_manifest(str(tmp_path / "set")).content_hash
        said = capsys.readouterr().out
        assert int(said.split(" requests retried")[-2].split()[-1]) == 0  # the last shard of the local set
        retries = max(int(part.split()[-1]) for part in said.split(" requests retried")[:-1])
        assert retries > 0
        print(f"{proxy.counts}; {retries} retries told by tasks")
        # only the set is there
        assert files(f"{bucket}/set") == files(str(tmp_path / "set"))
        assert storage.clear_leftovers(f"{bucket}/set") == 0


def test_a_bucket_deleted_during_the_run_is_one_error_in_time(
    ray_head: RayHead,
    s3_server: S3Server,
    raw: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket = s3_server.make_bucket("passing")
    s3_server.upload(raw, f"{bucket}/raw")
    with running_proxy(s3_server.endpoint) as proxy:
        forget_clients(monkeypatch, proxy.endpoint)
        monkeypatch.setenv(faults.RETRY_LIMIT_VARIABLE, "10")
        gone: list[float] = []

        def take_away() -> None:
            listed = partial(s3_server.client().list_objects_v2, Bucket="passing", Prefix="set/train")
            while not listed().get("Contents"):
                time.sleep(0.05)
            proxy.faults = Faults(refusal=NO_BUCKET)
            gone.append(time.monotonic())

        thread = threading.Thread(target=take_away)
        thread.start()
        with connected(ray_head):
            try:
                assert prepare_here(f"{bucket}/raw", f"{bucket}/set") == 1
            finally:
                thread.join()
        said = capsys.readouterr().out
    assert time.monotonic() - gone[0] < 30
    assert said.count("bucket does not exist") == 1, said
    assert "run the same command again" in said
