"""The README's commands for a Ray cluster: `ray start --head --num-cpus=2`, then `ray job submit`, ends SUCCEEDED."""

from pathlib import Path

import pytest

from tests.ray_head import RayHead
from tests.submission import check_submission

pytestmark = pytest.mark.ray


def test_a_submitted_job_succeeds(ray_head: RayHead, tmp_path: Path) -> None:
    check_submission(ray_head, tmp_path, "--config", "jobs/configs/phantom-tiny.yaml")
