"""A job that is submitted to a Ray cluster ends SUCCEEDED; the acceptance test of the same name runs it in full."""

from pathlib import Path

import pytest

from cmcgns.run_folder import RunFolder
from tests.ray_head import RayHead
from tests.submission import check_submission

pytestmark = pytest.mark.ray

SHORT = ("--train.stage1_steps=3", "--train.stage2_steps=0", "--train.warmup_steps=1", "--data.phantom_studies=200")


def test_a_submitted_job_succeeds(ray_head: RayHead, tmp_path: Path) -> None:
    check_submission(ray_head, tmp_path, "--config", "jobs/configs/phantom-tiny.yaml", *SHORT)


def test_a_run_folder_in_a_jobs_copy_of_the_working_directory_is_known_to_pass_away() -> None:
    copy = "/somewhere/session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    assert RunFolder(f"{copy}/runs", "run", resumed=False).is_temporary
    assert not RunFolder("/data/runs", "run", resumed=False).is_temporary
    assert not RunFolder("s3://bucket/runs", "run", resumed=False).is_temporary
