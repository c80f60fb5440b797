"""A run whose films turn out to be broken ends by itself, with status 1 and one message."""

import csv
from pathlib import Path

import pytest

from cmcgns.phantom import PhantomCorpus, write_pairs_csv
from tests.jobs import Job, check_failed, checkpoints, result, rows
from tests.train.test_failed_runs import QUICK

pytestmark = pytest.mark.ray


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


def test_a_loss_that_is_not_finite_on_two_ranks_of_deepspeed_ends_the_run_without_a_restart(tmp_path: Path) -> None:
    """The twin in ``make test`` has one rank of plain torch."""
    job = Job(tmp_path, *QUICK, "--train.learning_rate=1e30", "--train.gradient_clip=0")
    said = check_failed(job, tmp_path / "run", "is not finite", "the weights are those of step")
    assert "resuming after" not in said
    assert all(row["loss"] == row["loss"] for row in rows(tmp_path / "run"))
