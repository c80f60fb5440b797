"""ZeRO 0-3 beside the plain engine over 20 steps: fixed centroids to 1e-4, live clustering to 1e-2."""

from tests.train.test_engine import fixture_one_rank, test_every_zero_stage_trains_like_plain_torch
from tests.train.test_live_clustering import (
    fixture_runs,
    test_every_zero_stage_follows_plain_torch_with_live_clustering,
)

__all__ = [
    "fixture_one_rank",
    "fixture_runs",
    "test_every_zero_stage_follows_plain_torch_with_live_clustering",
    "test_every_zero_stage_trains_like_plain_torch",
]
