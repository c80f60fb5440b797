"""A run that cannot continue ends with status 1 and one message, and loses nothing that was saved."""

from pathlib import Path

import pytest

from tests.jobs import Job, check_failed, rows
from tests.ray_head import RayHead

pytestmark = pytest.mark.ray

QUICK = ("--run.name=run", "--train.log_every=1", "--train.checkpoint_every=5", "--train.warmup_steps=0")


def test_a_loss_that_is_not_finite_ends_the_run_without_a_restart(ray_head: RayHead, tmp_path: Path) -> None:
    job = Job(
        tmp_path, *QUICK, "--train.learning_rate=1e30", "--train.gradient_clip=0", "--method.name=infonce",
        "--data.phantom_studies=130", "--train.stage2_steps=0", "--train.num_workers=1", "--train.engine=torch",
        "--train.zero_stage=0", "--train.threads_per_worker=1", env=ray_head.environment,
    )  # fmt: skip
    said = check_failed(job, tmp_path / "run", "is not finite", "the weights are those of step")
    assert "resuming after" not in said
    done = rows(tmp_path / "run")
    assert all(row["loss"] == row["loss"] for row in done)
