"""kill -9 of prepare at three random moments: continued, the same content hash, no stray objects left in the bucket."""

import random
import time
from pathlib import Path

import pytest

from cmcgns import storage
from cmcgns.data.manifest import read_manifest
from cmcgns.phantom import PhantomCorpus, write_pairs_csv
from tests.data.prepare.sets import files, kill_when, run, shards
from tests.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3]

STUDIES, SIDE = 1_500, 320


def after(seconds: float, out: str, made: int) -> bool:
    """True, some seconds after ``made`` shards lie at ``out``."""
    if len(shards(out)) < made:
        return False
    time.sleep(seconds)
    return True


@pytest.mark.parametrize("seed", [0, 1])
def test_a_prepare_killed_three_times_ends_as_an_undisturbed_one(
    seed: int, s3_server: S3Server, tmp_path: Path
) -> None:
    bucket = s3_server.make_bucket(f"killed{seed}")
    write_pairs_csv(PhantomCorpus(STUDIES, seed=3, height=SIDE, width=SIDE), tmp_path / "raw", workers=2)
    settings = [f"--data.uri={tmp_path / 'raw'}", "--prepare.image_size=256"]
    done = run(*settings, f"--prepare.out={bucket}/undisturbed")
    assert done.returncode == 0, done.stdout + done.stderr
    out, moments = f"{bucket}/set", random.Random(seed)
    of = len(shards(f"{bucket}/undisturbed"))
    there = 0
    for wanted in sorted(moments.sample(range(1, of - 4), 3)):
        made = max(wanted, there + 1)  # by this prepare, not by the one before
        assert kill_when(lambda: after(moments.uniform(0, 1), out, made), *settings, f"--prepare.out={out}")  # noqa: B023
        there = len(shards(out))
        print(f"\nkilled with {there} of {of} shards there")
        assert made <= there < of
    done = run(*settings, f"--prepare.out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_manifest(out).content_hash == read_manifest(f"{bucket}/undisturbed").content_hash
    assert files(out) == files(f"{bucket}/undisturbed")
    assert storage.clear_leftovers(out) == 0
    assert run("--check", f"--prepare.out={out}").returncode == 0
