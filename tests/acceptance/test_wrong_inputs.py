"""Fourteen wrong inputs: each ends with status 2 and one message that names the key, what was given and what would do."""

from pathlib import Path

import pytest

from tests.s3 import S3Server
from tests.wrong_inputs import check_refused, missing_buckets, wrong_inputs

pytestmark = pytest.mark.s3

LONGEST_S = 60
"""Long before a Ray cluster would be up and a run begun."""


def test_a_wrong_input_ends_with_status_2_and_one_message(s3_server: S3Server, tmp_path: Path) -> None:
    print()
    files = tmp_path / "files"
    files.mkdir()
    wrongs = [*wrong_inputs(files), *missing_buckets()]
    seconds = [check_refused(wrong, tmp_path / f"runs{i}") for i, wrong in enumerate(wrongs)]
    print(f"{len(wrongs)} wrong inputs refused, the slowest after {max(seconds):.1f} s")
    assert max(seconds) < LONGEST_S
