"""Through Ray Train: 2 workers, 3 pool actors, 60 steps, one actor's passes delayed by 0-3 s at random."""

from pathlib import Path

import pytest

from tests.clustering.delayed_actor import DelayedActor
from tests.clustering.pool_run import settings
from tests.clustering.test_pool import check


@pytest.mark.ray
def test_centroids_agree_on_every_rank_and_losses_equal_the_twin(local_ray: None, tmp_path: Path) -> None:
    check(tmp_path, settings(60), DelayedActor)
