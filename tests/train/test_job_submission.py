"""A job that is submitted to a Ray cluster ends SUCCEEDED; the acceptance test of the same name runs it in full."""

from pathlib import Path

import pytest

from tests.ray_head import RayHead
from tests.submission import check_submission

pytestmark = pytest.mark.ray

SHORT = ("--train.stage1_steps=3", "--train.stage2_steps=0", "--train.warmup_steps=1", "--data.phantom_studies=200")


def test_a_submitted_job_succeeds(ray_head: RayHead, tmp_path: Path) -> None:
    check_submission(ray_head, tmp_path, "--config", "jobs/configs/phantom-tiny.yaml", *SHORT)
