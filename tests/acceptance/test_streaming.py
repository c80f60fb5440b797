"""Streaming is streaming: a corpus ten times as large takes no more memory, and the first step waits for few films.

Shown on a bucket of the real S3 server and a Ray cluster with an object store of 512 MB: the steady memory of a run on
20,000 studies is within 10 % of that on 2,000, and the first step comes before 5 % of the films have been asked for.
"""

import pytest

from tests.ray_head import running_head
from tests.s3 import S3Server
from tests.streaming import Watched, fill_bucket, watch_run

pytestmark = [pytest.mark.ray, pytest.mark.s3]

STUDIES = {"small": 2_000, "large": 20_000}
STEPS = 120
OBJECT_STORE_MIB = 512


@pytest.fixture(scope="module")
def runs(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Watched]:
    found = {}
    for name, studies in STUDIES.items():
        uri, films = fill_bucket(s3_server, name, studies, tmp_path_factory.mktemp(name))
        # a cluster for each: a store keeps the pages that it has once used
        with running_head(object_store_mib=OBJECT_STORE_MIB) as head:
            found[name] = watch_run(head, s3_server, uri, films, tmp_path_factory.mktemp("runs"), STEPS)
        seen = found[name]
        print(
            f"\n{studies} studies, {films} films: {seen.films_before_first_step} films "
            f"({seen.share_before_first_step:.1%}) before the first step, {seen.steady_mib:.0f} MiB, {seen.seconds:.0f} s"
        )
    return found


def test_ten_times_the_studies_take_the_same_memory(runs: dict[str, Watched]) -> None:
    assert runs["large"].steady_mib == pytest.approx(runs["small"].steady_mib, rel=0.1)


def test_the_first_step_comes_before_a_twentieth_of_the_films_has_been_asked_for(runs: dict[str, Watched]) -> None:
    assert runs["large"].share_before_first_step < 0.05
