"""Runs that cannot go on: they end by themselves, with status 1 and one message, and nothing already done is lost."""

import csv
from pathlib import Path

import pytest

from cmcgns.data.phantom import PhantomCorpus, write_pairs_csv
from tests.jobs import Job, checkpoints, result, rows

pytestmark = pytest.mark.ray

QUICK = ("--run.name=run", "--train.log_every=1", "--train.checkpoint_every=5", "--train.warmup_steps=0")


def check_failed(job: Job, folder: Path, *words: str) -> str:
    """The job ended with status 1 and says why once, as its result.json does."""
    said = job.wait()
    assert job.process.returncode == 1, said[-3000:]
    assert "Traceback" not in said
    failure = str(result(folder)["failure"])
    for word in words:
        assert word in failure, failure
        assert word in said
    assert result(folder)["status"] == "failed"
    return said


def test_a_loss_that_is_not_finite_ends_the_run_without_a_restart(tmp_path: Path) -> None:
    job = Job(tmp_path, *QUICK, "--train.learning_rate=1e30", "--train.gradient_clip=0")
    said = check_failed(job, tmp_path / "run", "is not finite", "the weights are those of step")
    assert "goes on after" not in said
    done = rows(tmp_path / "run")
    assert all(row["loss"] == row["loss"] for row in done)


def test_too_many_bad_rows_end_the_run_with_their_number_and_first_reasons(tmp_path: Path) -> None:
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
