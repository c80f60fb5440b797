"""kill -9 of prepare at three random moments: continued, the same content hash, no stray objects left in the bucket."""

import random
import threading
import time
from pathlib import Path

import pytest

from cmcgns.data import storage
from cmcgns.data.manifest import read_manifest
from cmcgns.data.phantom import PhantomCorpus, write_pairs_csv
from tests.prepare.sets import files, kill_when, run, shards
from tests.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3]

STUDIES, SIDE = 1_500, 320


@pytest.mark.parametrize("seed", [0, 1])
def test_a_prepare_killed_three_times_ends_as_an_undisturbed_one(
    seed: int, s3_server: S3Server, tmp_path: Path
) -> None:
    bucket = s3_server.make_bucket(f"killed{seed}")
    write_pairs_csv(PhantomCorpus(STUDIES, seed=3, height=SIDE, width=SIDE), tmp_path / "raw", workers=2)
    settings = [f"--data.uri={tmp_path / 'raw'}", "--prepare.image_size=256"]
    began = time.monotonic()
    done = run(*settings, f"--prepare.out={bucket}/undisturbed")
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    out, moments = f"{bucket}/set", random.Random(seed)
    for _ in range(3):
        end = threading.Event()
        timer = threading.Timer(moments.uniform(0.35, 0.9) * seconds, end.set)
        timer.start()
        killed = kill_when(end.is_set, *settings, f"--prepare.out={out}")
        timer.cancel()
        print(f"\nkilled: {killed}, with {len(shards(out))} shards there")
    done = run(*settings, f"--prepare.out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_manifest(out).content_hash == read_manifest(f"{bucket}/undisturbed").content_hash
    assert files(out) == files(f"{bucket}/undisturbed")
    assert storage.clear_leftovers(out) == 0
    assert run("--check", f"--prepare.out={out}").returncode == 0
