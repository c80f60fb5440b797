"""Trials at the same time: as many as fit completely, so that none waits for resources of another."""

import pytest

from cmcgns.cli import resolve
from cmcgns.config import Config
from cmcgns.errors import UserError
from cmcgns.sweep.admission import TRIAL_CPUS, capacity_for

WORKERS = {
    "train.num_workers": 2,
    "train.cpus_per_worker": 1.0,
    "clustering.actors": 2,
    "clustering.cpus_per_actor": 0.5,
}
LENGTH = {"train.stage1_steps": 4, "train.stage2_steps": 0, "train.warmup_steps": 1, "train.global_batch_size": 32}


def config(**changes: object) -> Config:
    return resolve({}, WORKERS | LENGTH | {key.replace("__", "."): value for key, value in changes.items()}, Config)


def nodes(*cpus: float, gpus: float = 0) -> list[dict[str, float]]:
    return [{"CPU": count, "GPU": gpus} for count in cpus]


@pytest.mark.parametrize(
    ("cluster", "trials"),
    [
        (nodes(4), 1),  # 3 for workers and pool, half a CPU for data
        (nodes(8), 2),
        (nodes(4, 4, 4), 3),
        (nodes(1, 1, 1, 1), 1),  # workers on two nodes, the pool on a third, data on the fourth
        (nodes(3, 0.9), 1),
        (nodes(64), 8),  # no more than requested
    ],
)
def test_trials_fit_completely(cluster: list[dict[str, float]], trials: int) -> None:
    assert capacity_for(config(), cluster, most=8).trials == trials


def test_each_trial_gets_its_share_of_the_cpus_left_for_data() -> None:
    capacity = capacity_for(config(), nodes(8, 8), most=4)
    assert capacity.trials == 4
    assert capacity.share.all == 16
    assert capacity.share.data == pytest.approx(4 - 3 - TRIAL_CPUS)


def test_gpus_limit_trials_too() -> None:
    assert capacity_for(config(train__use_gpu=True), nodes(32, 32, gpus=3), most=8).trials == 3


@pytest.mark.parametrize("cluster", [nodes(3.4), nodes(0.9, 0.9, 0.9, 0.9, 0.9)])
def test_a_cluster_too_small_for_one_trial_is_refused_with_numbers(cluster: list[dict[str, float]]) -> None:
    with pytest.raises(UserError, match=r"not one trial fits: its 2 workers, 2 clustering actors .* need 3\.6"):
        capacity_for(config(), cluster, most=8)
