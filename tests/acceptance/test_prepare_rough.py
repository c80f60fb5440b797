"""A proxy that fails 10 % of the requests and cuts 2 %: prepare ends with the content hash of an undisturbed one, retries
counted.

A bucket that goes away in mid-run is in tests/data/prepare/test_prepare_s3.py.
"""

from pathlib import Path

import pytest

from cmcgns.data.manifest import read_manifest
from cmcgns.phantom import PhantomCorpus, write_pairs_csv
from tests.data.prepare.sets import files, run
from tests.faulty_proxy import Faults, running_proxy
from tests.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3]

STUDIES = 1_500


def test_a_rough_road_leads_to_the_same_set(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_server.make_bucket("rough1500")
    write_pairs_csv(PhantomCorpus(STUDIES, seed=3, height=320, width=320), tmp_path / "raw", workers=2)
    s3_server.upload(tmp_path / "raw", f"{bucket}/raw")
    settings = ["--prepare.image_size=256"]
    done = run(*settings, f"--data.uri={bucket}/raw", f"--prepare.out={bucket}/smooth")
    assert done.returncode == 0, done.stdout + done.stderr
    with running_proxy(s3_server.endpoint, seed=7) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.faults = Faults(errors=0.10, cuts=0.02)
        done = run(*settings, f"--data.uri={bucket}/raw", f"--prepare.out={bucket}/rough")
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    assert done.returncode == 0, done.stdout + done.stderr
    retries = [
        int(line.split(" requests retried")[0].split()[-1])
        for line in done.stdout.splitlines()
        if "tried again" in line
    ]
    print(f"\n{dict(proxy.counts)}; {max(retries)} retries told")
    assert max(retries) > 100
    assert read_manifest(f"{bucket}/rough").content_hash == read_manifest(f"{bucket}/smooth").content_hash
    assert files(f"{bucket}/rough") == files(f"{bucket}/smooth")
