"""Which centroids are current: the same on every rank, at every step, and after resuming from a checkpoint."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.clustering.bank import RefreshRequest, recluster
from cmcgns.clustering.kmeans import farthest_point_seeds, kmeans, numpy_assign
from cmcgns.clustering.online_clustering import Centroids, LocalPool, OnlineClustering
from cmcgns.clustering.rows import RowArray
from cmcgns.config import ClusteringConfig
from tests.ranks import run_on_ranks

ROWS, DIM, CLUSTERS = 120, 16, 6
"""120 sentences a step: the bank is full enough (1024) after 9 steps, and drops its oldest from step 13 on."""


def config_of(**values: object) -> ClusteringConfig:
    return ClusteringConfig.model_validate({"bank_size": 1500, "refresh_every": 4, "momentum": 0.05, **values})


def guide_of(config: ClusteringConfig) -> OnlineClustering:
    return OnlineClustering(config, Centroids(CLUSTERS, DIM, "cpu", config.momentum), LocalPool(config))


def sentences(step: int) -> Tensor:
    """z2 of all ranks at ``step``, around a few directions that drift."""
    source = torch.Generator().manual_seed(step)
    centres_KD = torch.randn(CLUSTERS, DIM, generator=torch.Generator().manual_seed(0))
    member_N = torch.randint(0, CLUSTERS, (ROWS,), generator=source)
    return F.normalize(centres_KD[member_N] + 0.5 * torch.randn(ROWS, DIM, generator=source) + 0.02 * step, dim=1)


def advance(guide: OnlineClustering, step: int, may_start: bool = True, mean_cosine: float = 0.3) -> str:
    """Run one step like the trainer, in two ragged microbatches per rank. Returns the digest of the centroids."""
    counts = {1: [ROWS], 2: [50, 70], 3: [50, 30, 40]}[distributed.world_size()]
    own_nD = sentences(step).split(counts)[distributed.rank()]
    halves = own_nD.split(len(own_nD) // 2)
    for half in halves:
        guide.centroids.observe(half)
    guide.push(step, halves, counts)
    guide.refresh(step, may_start, torch.tensor(mean_cosine))
    return guide.centroids.digest()


def run(momentum: float, steps: int = 24) -> list[tuple[int, str]]:
    guide = guide_of(config_of(momentum=momentum))
    found = []
    for step in range(1, steps + 1):
        digest = advance(guide, step)
        found.append((guide.centroids.version, digest))
    return found


def run_both() -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    return run(0.05), run(0.0)


@pytest.mark.distributed
def test_every_rank_holds_the_same_centroids_at_every_step() -> None:
    ranks = run_on_ranks(2, run_both)
    assert ranks[0] == ranks[1]
    # requested at 12, 16, 20; adopted one interval later
    assert [version for version, _ in ranks[0][0]] == [0] * 15 + [1] * 4 + [2] * 4 + [3]
    # without the online move (whose order of summation differs) they equal those of one rank bit for bit
    assert ranks[0][1] == run(0.0)


def test_a_refresh_is_kmeans_over_the_bank_at_the_step_of_its_request() -> None:
    guide = guide_of(config_of(momentum=0.0))
    rows = {step: sentences(step).half() for step in range(1, 21)}
    for step in range(1, 17):
        advance(guide, step)
    first = RowArray(torch.cat([rows[step] for step in range(1, 13)]).numpy()[-1500:], assign=numpy_assign)
    expected_KD = kmeans(first, farthest_point_seeds(first, CLUSTERS), 20, 1e-4).centroids_KD
    torch.testing.assert_close(guide.centroids.rows_KD, torch.from_numpy(expected_KD), rtol=0, atol=1e-6)
    for step in range(17, 21):
        advance(guide, step)
    # requested at 16, from the centroids of that step, over the 1500 rows before it
    second = RowArray(torch.cat([rows[step] for step in range(1, 17)]).numpy()[-1500:], assign=numpy_assign)
    warm_KD = kmeans(second, expected_KD, 20, 1e-4).centroids_KD
    torch.testing.assert_close(guide.centroids.rows_KD, torch.from_numpy(warm_KD), rtol=0, atol=1e-6)


def test_a_version_comes_with_the_members_of_each_centroid_in_the_bank() -> None:
    guide = guide_of(config_of(momentum=0.0))
    assert guide.centroids.counts_K.tolist() == [0.0] * CLUSTERS
    rows = [sentences(step).half().float() for step in range(1, 17)]
    for step in range(1, 17):
        advance(guide, step)
    bank_ND = torch.cat(rows[:12])[-1500:]  # requested at 12
    nearest_N = (bank_ND @ guide.centroids.rows_KD.T).argmax(1)
    assert guide.centroids.counts_K.tolist() == torch.bincount(nearest_N, minlength=CLUSTERS).tolist()


def test_a_bank_without_a_start_statistic_is_clustered_at_the_step_that_fills_it() -> None:
    guide, versions = guide_of(config_of(start_step=1000)), list[int]()
    for step in range(1, 17):
        guide.push(step, [sentences(step)], [ROWS])
        guide.refresh(step, False, None)
        versions.append(guide.centroids.version)
    # 1080 rows at step 9; the second version is requested at 12 and adopted at 16
    assert versions == [0] * 8 + [1] * 7 + [2]
    rows = RowArray(torch.cat([sentences(step).half() for step in range(1, 10)]).numpy(), assign=numpy_assign)
    first = guide_of(config_of(momentum=0.0))
    for step in range(1, 10):
        first.push(step, [sentences(step)], [ROWS])
        first.refresh(step, False, None)
    expected_KD = kmeans(rows, farthest_point_seeds(rows, CLUSTERS), 20, 1e-4).centroids_KD
    torch.testing.assert_close(first.centroids.rows_KD, torch.from_numpy(expected_KD), rtol=0, atol=1e-6)
    assert first.centroids.started_at == 9


def test_a_first_clustering_that_fails_is_tried_again_at_the_next_interval(caplog: pytest.LogCaptureFixture) -> None:
    guide = guide_of(config_of())
    for step in range(1, 13):
        rows_nD = sentences(0)[:3].repeat(40, 1) if step < 11 else sentences(step)
        guide.push(step, [rows_nD], [ROWS])
        guide.refresh(step, False, None)
    assert caplog.text.count("need 6 distinct rows") == 1  # at step 9, and not at 10 and 11
    assert guide.centroids.started_at == 12


def test_the_state_of_an_earlier_version_has_no_members_and_resumes() -> None:
    guide, again = guide_of(config_of()), guide_of(config_of())
    for step in range(1, 19):
        advance(guide, step)
    state = {key: value for key, value in guide.state_dict(18).items() if "counts_K" not in key}
    again.load_state_dict(state, 18)
    assert again.centroids.counts_K.tolist() == [0.0] * CLUSTERS
    for step in range(19, 25):
        assert advance(again, step) == advance(guide, step)
    assert again.centroids.counts_K.tolist() == guide.centroids.counts_K.tolist() != [0.0] * CLUSTERS


@pytest.mark.parametrize("stop", [6, 13, 16, 18, 21])  # no bank yet, in flight, just adopted, in flight and moving
def test_resuming_from_its_state_matches_the_uninterrupted_one(stop: int) -> None:
    expected = run(0.05)
    first = guide_of(config_of())
    for step in range(1, stop + 1):
        advance(first, step)
    state = {key: value.clone() for key, value in first.state_dict(stop).items()}
    second = guide_of(config_of())
    second.load_state_dict(state, stop)
    assert second.pushed == ROWS * stop
    for guide in (first, second):  # reading the state changes nothing either
        found = [(advance(guide, step), guide.centroids.version) for step in range(stop + 1, 25)]
        assert [(version, digest) for digest, version in found] == expected[stop:]


def go_on(state: dict[str, Tensor], stop: int) -> list[tuple[int, str]]:
    guide = guide_of(config_of(momentum=0.0))
    guide.load_state_dict(state, stop)
    found = []
    for step in range(stop + 1, 25):
        digest = advance(guide, step)
        found.append((guide.centroids.version, digest))
    return found


@pytest.mark.distributed
def test_a_state_resumes_the_same_way_on_another_number_of_ranks() -> None:
    guide = guide_of(config_of(momentum=0.0))
    for step in range(1, 19):
        advance(guide, step)
    for rank in run_on_ranks(3, go_on, guide.state_dict(18), 18):
        assert rank == run(0.0)[18:]


@pytest.mark.parametrize(
    ("config", "step_arguments"),
    [
        ({"start_cosine": 0.25}, {}),
        ({"start_step": 30}, {}),
        ({}, {"may_start": False}),
        ({"refresh_every": 30}, {}),
    ],
)
def test_clustering_does_not_start_before_all_its_conditions_hold(
    config: dict[str, object], step_arguments: dict[str, bool]
) -> None:
    guide = guide_of(config_of(**config))
    for step in range(1, 21):
        advance(guide, step, mean_cosine=0.3, **step_arguments)
    assert guide.centroids.current is None
    assert guide.centroids.started_at is None


def test_clustering_does_not_start_before_the_bank_holds_1024_rows() -> None:
    guide = guide_of(config_of(refresh_every=1))
    started = [advance(guide, step) and guide.centroids.started for step in range(1, 13)]
    assert started.index(True) + 1 == 10  # requested at step 9 with 1080 rows, adopted one interval later


def test_once_started_it_continues_even_if_the_cosine_rises_again() -> None:
    guide = guide_of(config_of())
    for step in range(1, 25):
        advance(guide, step, may_start=step < 14, mean_cosine=0.3 if step < 14 else 0.9)
    assert guide.centroids.version == 3


def test_too_few_distinct_rows_give_a_warning_and_no_centroids(caplog: pytest.LogCaptureFixture) -> None:
    guide = guide_of(config_of())
    same_nD = sentences(0)[:3].repeat(40, 1)
    for step in range(1, 18):
        guide.push(step, [same_nD], [ROWS])
        guide.refresh(step, True, torch.tensor(0.3))
    assert guide.centroids.current is None
    assert "6 clusters need 6 distinct rows; there are 3 among 1440" in caplog.text


def test_an_emptied_bank_keeps_the_centroids_and_drops_the_refresh_in_flight() -> None:
    guide = guide_of(config_of(momentum=0.0))
    for step in range(1, 18):
        advance(guide, step)
    digest = guide.centroids.digest()
    guide.empty_bank(17)
    assert guide.pushed == 0
    versions = []
    for step in range(18, 33):
        advance(guide, step)
        versions.append(guide.centroids.version)
        if guide.centroids.version == 1:
            assert guide.centroids.digest() == digest
    # the bank has enough rows again after 9 steps, at 26: requested at 28, adopted at 32
    assert versions == [1] * 14 + [2]


def test_the_cosine_is_read_on_the_host_only_until_the_start() -> None:
    guide = guide_of(config_of())
    for step in range(1, 17):
        advance(guide, step)
    guide.push(17, [sentences(17)], [ROWS])
    guide.refresh(20, True, torch.empty((), device="meta"))  # a tensor that cannot be read
    assert guide.centroids.started


def test_a_completely_lost_bank_gives_a_reason_and_no_centroids() -> None:
    request = RefreshRequest(step=1, version=1, num_clusters=4, first_ordinal=0, stop_ordinal=9, start_KD=None)
    answer = recluster(RowArray(np.empty((0, 8), np.float32), assign=numpy_assign), request, config_of())
    assert answer.rows_KD is None
    assert "no rows" in answer.report
