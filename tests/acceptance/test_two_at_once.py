"""Two jobs of one name at the same moment, then two resumes of one run, in a folder and in a bucket: one goes on each time."""

import itertools
import random
import re
import time
from pathlib import Path

import pytest

from tests.jobs import Job, rows
from tests.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3]
ROUNDS, STEPS = 5, 60
QUICK = (
    f"--train.stage1_steps={STEPS}", "--train.stage2_steps=0", "--train.warmup_steps=1", "--train.checkpoint_every=4",
    "--train.log_every=1", "--train.num_workers=1", "--train.threads_per_worker=1", "--data.phantom_studies=130",
    "--data.validation_studies=16", "--method.name=infonce", "--train.engine=torch", "--train.zero_stage=0",
)  # fmt: skip


def test_twenty_times_two_at_once_never_mix_a_run(tmp_path: Path, s3_server: S3Server) -> None:
    chance = random.Random(0)
    for number, where in itertools.product(range(ROUNDS), ("folder", "bucket")):
        home = tmp_path / f"{where}-{number}"
        storage = str(home) if where == "folder" else s3_server.make_bucket(f"round-{number}")
        one_starts(home, storage, chance)
        one_resumes(home, storage, chance)
        if where == "bucket":
            s3_server.client().download_file(f"round-{number}", "run/metrics.jsonl", str(home / "metrics.jsonl"))
        found = rows(home / "run" if where == "folder" else home)
        assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    print(f"{4 * ROUNDS} pairs of jobs, half of them in a bucket: one of each pair went on, the other was told")


def one_starts(home: Path, storage: str, chance: random.Random) -> None:
    """Two runs of one name: one is refused, the other is killed after a checkpoint."""
    jobs = [Job(home / str(place), *QUICK, f"--run.storage={storage}", "--run.name=run") for place in range(2)]
    refused = first_to_end(jobs)
    assert refused.process.returncode == 2, refused.text()[-3000:]
    assert "is in use by another job" in refused.text() or "run.name run is taken" in refused.text()
    other = jobs[1 - jobs.index(refused)]
    steps = chance.randint(5, 20)
    # what it shows is a look at the run now and then, not every step
    other.wait_for(lambda: any(int(step) >= steps for step in re.findall(rf"step (\d+)/{STEPS}", other.text())))
    other.kill()


def one_resumes(home: Path, storage: str, chance: random.Random) -> None:
    """Two resumes of the run that was killed: one ends it."""
    resume = (f"--run.storage={storage}", "--run.resume=run")
    jobs = [Job(home / str(place), *resume, config=None) for place in range(2)]
    refused = first_to_end(jobs)
    assert refused.process.returncode == 2, refused.text()[-3000:]
    assert "is in use by another job" in refused.text()
    other = jobs[1 - jobs.index(refused)]
    said = other.wait()
    assert other.process.returncode == 0, said[-3000:]


def first_to_end(jobs: list[Job]) -> Job:
    """The job that ends first."""
    while all(job.process.poll() is None for job in jobs):
        time.sleep(0.1)
    return next(job for job in jobs if job.process.poll() is not None)
