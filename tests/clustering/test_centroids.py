"""The current centroids: online moves, empty clusters, and their state in checkpoints."""

import pytest
import torch
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.clustering.online_clustering import Centroids
from tests.ranks import run_on_ranks


def started(momentum: float = 0.1) -> Centroids:
    centroids = Centroids(4, 8, "cpu", momentum)
    centroids.adopt(F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1), 3, step=12)
    return centroids


def sentences(number: int) -> torch.Tensor:
    return F.normalize(torch.randn(number, 8, generator=torch.Generator().manual_seed(1)), dim=1)


def test_members_pull_their_centroid_and_empty_ones_stay() -> None:
    centroids, rows_nD = started(), sentences(5)
    before_KD = centroids.rows_KD.clone()
    centroids.observe(rows_nD[:2])
    centroids.observe(rows_nD[2:])
    centroids.move()
    for k in range(4):
        members = [row for row in rows_nD if int((before_KD @ row).argmax()) == k]
        if members:
            expected_D = F.normalize(0.9 * before_KD[k] + 0.1 * torch.stack(members).mean(0), dim=0)
            torch.testing.assert_close(centroids.rows_KD[k], expected_D, rtol=0, atol=1e-6)
        else:
            assert torch.equal(centroids.rows_KD[k], before_KD[k])
    moved_KD = centroids.rows_KD.clone()
    centroids.move()  # observations count once
    assert torch.equal(centroids.rows_KD, moved_KD)
    assert centroids.version == 3


def test_before_clustering_starts_there_are_no_centroids_and_nothing_moves() -> None:
    centroids = Centroids(4, 8, "cpu", 0.1)
    centroids.observe(sentences(5))
    centroids.move()
    assert centroids.current is None
    assert not centroids.rows_KD.any()


def test_a_later_version_keeps_the_step_of_the_start() -> None:
    centroids = started()
    centroids.adopt(sentences(4), 4, step=20)
    assert (centroids.version, centroids.started_at) == (4, 12)


def test_restored_state_has_the_same_digest() -> None:
    centroids, other = started(), Centroids(4, 8, "cpu", 0.1)
    other.load_state_dict(centroids.state_dict())
    assert other.digest() == centroids.digest()
    assert (other.version, other.started_at) == (3, 12)
    other.observe(sentences(5))
    other.move()
    assert other.digest() != centroids.digest()
    fresh = Centroids(4, 8, "cpu", 0.1)
    fresh.load_state_dict(Centroids(4, 8, "cpu", 0.1).state_dict())
    assert not fresh.started


def move_with_own_share() -> torch.Tensor:
    centroids, rank, world = started(), distributed.rank(), distributed.world_size()
    bounds = [0, 4, 9] if world == 2 else [0, 9]
    centroids.observe(sentences(9)[bounds[rank] : bounds[rank + 1]])
    centroids.move()
    return centroids.rows_KD


@pytest.mark.distributed
def test_ranks_move_together_by_the_mean_over_all_members() -> None:
    alone_KD, (first_KD, second_KD) = move_with_own_share(), run_on_ranks(2, move_with_own_share)
    assert torch.equal(first_KD, second_KD)
    torch.testing.assert_close(first_KD, alone_KD, rtol=0, atol=1e-6)
