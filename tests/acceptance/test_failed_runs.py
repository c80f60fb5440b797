"""Runs that fail by themselves, with status 1 and one message: broken films, a loss that is not finite, a full disk."""

import csv
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmcgns.phantom import PhantomCorpus, write_pairs_csv
from tests.jobs import Job, check_failed, checkpoints, result, rows

pytestmark = pytest.mark.ray

QUICK = ("--run.name=run", "--train.log_every=1", "--train.checkpoint_every=5", "--train.warmup_steps=0")


def test_too_many_bad_rows_end_the_run_with_their_number_and_reasons(tmp_path: Path) -> None:
    table = write_pairs_csv(PhantomCorpus(240, seed=0, height=72, width=72), tmp_path / "corpus", workers=1)
    with Path(table).open(newline="") as file:
        broken = [row["image"] for row in csv.DictReader(file) if row["split"] == "train"][:60:2]
    for name in broken:
        (tmp_path / "corpus" / name).write_bytes(b"\x89PNG\r\n\x1a\n and nothing else")
    job = Job(tmp_path, *QUICK, f"--data.uri={tmp_path / 'corpus'}", "--data.max_bad_fraction=0.05")
    check_failed(job, tmp_path / "run", "cannot be used", "data.max_bad_fraction 0.05", "truncated or broken")
    found = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    assert len(found) + 1 > 0.05 * 240
    assert result(tmp_path / "run")["bad_rows"] == len(found)
    assert len(checkpoints(tmp_path / "run")) <= 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 20 MB: room for one checkpoint of the tiny model, and a part of a second one."""
    if os.geteuid():
        pytest.skip("needs root to mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_fails_the_run_keeps_the_last_whole_checkpoint_and_the_run_goes_on_with_more_room(
    small_disk: Path, tmp_path: Path
) -> None:
    plain = ("--method.name=infonce", "--train.stage2_steps=0", "--train.engine=torch", "--train.zero_stage=0")
    storage = ("--run.name=full", f"--run.storage={small_disk}")
    job = Job(tmp_path, *plain, *storage, "--train.stage1_steps=12", "--train.checkpoint_every=5")
    said = job.wait()
    assert job.process.returncode == 1, said[-3000:]
    assert said.count("is full; free some space") == 1
    assert "Traceback" not in said
    assert "--run.resume=full" in said
    run = small_disk / "full"
    [checkpoint] = checkpoints(run)
    assert result(run)["status"] == "failed"
    assert result(run)["checkpoint"] == str(checkpoint)
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    job = Job(tmp_path, "--run.resume=full", f"--run.storage={small_disk}", config=None)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert [row["step"] for row in rows(run)] == list(range(1, 13))


def test_a_loss_that_is_not_finite_on_two_ranks_of_deepspeed_ends_the_run_without_a_restart(tmp_path: Path) -> None:
    job = Job(tmp_path, *QUICK, "--train.learning_rate=1e30", "--train.gradient_clip=0")
    said = check_failed(job, tmp_path / "run", "is not finite", "the weights are those of step")
    assert "resuming after" not in said
    assert all(row["loss"] == row["loss"] for row in rows(tmp_path / "run"))
