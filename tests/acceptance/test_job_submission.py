"""The README's commands for a Ray cluster as they are typed: `ray start --head`, then `ray job submit`, ends SUCCEEDED."""

import pytest

from tests.ray_head import RayHead
from tests.submission import check_succeeded, submit

pytestmark = pytest.mark.ray


def test_the_default_job_is_submitted_and_succeeds(ray_head: RayHead) -> None:
    done = submit(ray_head)
    check_succeeded(ray_head, done)
    assert "is deleted with the cluster" in done.output  # as typed, the run lies in Ray's copy of the folder
    print("\n" + "\n".join(done.output.splitlines()[-12:]))
