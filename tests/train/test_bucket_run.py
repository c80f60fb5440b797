"""A run that lives in a bucket: it reads its corpus as a stream and writes everything there."""

import pytest

from tests.ray_head import RayHead
from tests.s3 import S3Server
from tests.streaming import Watched, fill_bucket, watch_run

pytestmark = [pytest.mark.ray, pytest.mark.s3]

STUDIES, STEPS = 500, 6


@pytest.fixture(scope="module")
def watched(ray_head: RayHead, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    scratch = tmp_path_factory.mktemp("corpus")
    uri, films = fill_bucket(s3_server, "streamed", STUDIES, scratch, workers=1)
    return watch_run(ray_head, s3_server, uri, films, tmp_path_factory.mktemp("runs"), STEPS)


def test_the_first_step_comes_before_all_films_have_been_asked_for(watched: Watched) -> None:
    print(
        f"\n{watched.films_before_first_step} of {watched.films} films before the first step; {watched.steady_mib:.0f} MiB"
    )
    assert 0 < watched.share_before_first_step < 1
