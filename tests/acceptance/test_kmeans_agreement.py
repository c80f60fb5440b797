"""Pools of 1, 2, 3 and 7 actors over uneven shards find what one array finds; actors that are killed change nothing."""

from pathlib import Path

import pytest

from tests.clustering.sets import heavy_tailed, write_parquet
from tests.clustering.test_source_pool import check_agreement, check_survival

pytestmark = pytest.mark.usefixtures("local_ray")
ROWS = 30_000


@pytest.mark.parametrize("actors", [1, 2, 3, 7])
def test_a_pool_agrees_with_one_array(actors: int) -> None:
    check_agreement(ROWS, actors)


@pytest.mark.parametrize("lost", [[1], [0, 2]])
def test_killed_actors_change_no_bit(lost: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_survival(write_parquet(tmp_path, heavy_tailed(ROWS), [0, 12_000, ROWS]), lost, caplog)
    print(f"killed {lost}: equal bit for bit")
