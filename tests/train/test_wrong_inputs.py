"""A wrong input ends with status 2 and one message; the acceptance test of the same name tries all of them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.s3 import S3Server
from tests.wrong_inputs import check_refused, missing_buckets, wrong_inputs


def test_a_wrong_setting_or_file_is_refused_with_one_message(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda wrong: check_refused(wrong, tmp_path / wrong.name), wrong_inputs(files)))


@pytest.mark.s3
def test_a_missing_bucket_is_refused_with_one_message(s3_server: S3Server, tmp_path: Path) -> None:
    check_refused(missing_buckets()[0], tmp_path / "runs")
