"""The losses and the clustering's rules against the numbers of the published method."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns.clustering.online_clustering import Centroids, momentum_step, unnormalised_momentum_step
from cmcgns.methods.cm_cgns.losses import (
    SentenceClusters,
    margin_penalty,
    nearest_two,
    negative_masks,
    sentence_alignment_loss,
)
from cmcgns.methods.cm_cgns.settings import Settings
from cmcgns.methods.contrastive import contrastive_loss
from tests.golden import EXACT, golden

PUBLISHED = Settings(
    num_clusters=6, sentence_temperature=1.0, hard_negative_logit=3.0, false_negatives="margin", margin_weight=1e-4
)


@pytest.fixture(name="numbers")
def fixture_numbers() -> dict[str, Tensor]:
    return golden()


def features(numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """z1, z2 and hashes of 14 different texts."""
    return numbers["in.sentences"], F.normalize(numbers["out.image_to_text"], dim=1), torch.arange(14)


def test_global_loss_is_the_published_infonce(numbers: dict[str, Tensor]) -> None:
    report_BD = F.normalize(numbers["out.report_pooled"], dim=1)
    scale = 1 / numbers["in.temperature"].reshape(1)
    loss = contrastive_loss(numbers["in.global_image"], report_BD, torch.arange(4), scale)
    torch.testing.assert_close(loss, numbers["out.global_infonce"], **EXACT)


def test_sentence_loss_without_centroids_is_the_published_infonce(numbers: dict[str, Tensor]) -> None:
    z1_nD, z2_nD, hash_n = features(numbers)
    found = sentence_alignment_loss(z1_nD, z2_nD, hash_n, (14,), None, PUBLISHED)
    torch.testing.assert_close(found.loss, numbers["out.sentence_infonce_no_clusters"], **EXACT)


def test_clusters_hard_and_false_negatives_are_the_published_ones(numbers: dict[str, Tensor]) -> None:
    z1_nD, _, _ = features(numbers)
    own = nearest_two(z1_nD @ numbers["in.centroids"].T)
    assert torch.equal(own.nearest, numbers["out.cluster_index"])
    assert torch.equal(own.second, numbers["out.hard_negative_index"])
    assert torch.equal(numbers["in.centroids"][own.second], numbers["out.hard_negative"])
    same_text_nN = torch.zeros(14, 14, dtype=torch.bool)
    masks = negative_masks(same_text_nN, own, SentenceClusters(*own), 0, exclude=False)
    assert torch.equal(masks.false_negative_nN.double(), numbers["out.false_negative_mask"])


def test_margin_loss_is_the_published_one_over_masked_pairs_only(numbers: dict[str, Tensor]) -> None:
    z1_nD, z2_nD, _ = features(numbers)
    cosine_nN, mask_nN = z1_nD @ z2_nD.T, numbers["out.false_negative_mask"].bool()
    total = margin_penalty(cosine_nN, cosine_nN.diagonal(), mask_nN, PUBLISHED).sum()
    torch.testing.assert_close(total, numbers["out.bml_loss_masked_sum"], **EXACT)
    torch.testing.assert_close(total / mask_nN.sum(), numbers["out.bml_loss_masked_mean"], **EXACT)
    # the release counts every pair, with a constant margin_alpha where there is no false negative
    published = (total + PUBLISHED.margin_alpha * (~mask_nN).double().sum()) / mask_nN.numel()
    torch.testing.assert_close(published, numbers["out.bml_loss_published"], **EXACT)


def test_sentence_loss_adds_the_hard_negatives_as_logits_and_the_margin(numbers: dict[str, Tensor]) -> None:
    found = sentence_alignment_loss(*features(numbers), (14,), numbers["in.centroids"], PUBLISHED)
    expected = numbers["out.sentence_loss_additive"] + 1e-4 * numbers["out.bml_loss_masked_mean"]
    torch.testing.assert_close(found.loss, expected, **EXACT)


def multiplied_loss(numbers: dict[str, Tensor], centroids_KD: Tensor) -> Tensor:
    """The released sentence loss: logits of hard negatives times 3 for the sentence's own one, times 0 for all others."""
    z1_nD, z2_nD, _ = features(numbers)
    centroids_KD = F.normalize(centroids_KD, dim=1)
    own = nearest_two(z1_nD @ centroids_KD.T)
    hard_nN = PUBLISHED.hard_negative_logit * torch.eye(14) * (z1_nD @ centroids_KD[own.second].T)
    return F.cross_entropy(torch.cat([z1_nD @ z2_nD.T, hard_nN], dim=1), torch.arange(14))


def test_the_release_multiplies_hard_negatives_where_ours_are_added(numbers: dict[str, Tensor]) -> None:
    """13 of 14 columns of each row are then a constant logit of 0: 3.349 instead of 3.915."""
    found = multiplied_loss(numbers, numbers["in.centroids"])
    torch.testing.assert_close(found, numbers["out.sentence_loss_multiplicative_published"], **EXACT)
    assert numbers["out.sentence_loss_additive"] - found > 0.5


def test_the_whole_released_loss_moves_centroids_first_then_multiplies_and_counts_all_pairs(
    numbers: dict[str, Tensor],
) -> None:
    found = multiplied_loss(numbers, numbers["out.centroids_after_step_published"])
    published = found + PUBLISHED.margin_weight * numbers["out.bml_loss_published"]
    torch.testing.assert_close(published, numbers["out.local_report_loss_published"], **EXACT)
    ours = sentence_alignment_loss(*features(numbers), (14,), numbers["in.centroids"], PUBLISHED).loss
    assert ours - published > 0.5


def test_a_momentum_step_moves_centroids_towards_their_members_means(numbers: dict[str, Tensor]) -> None:
    _, z2_nD, _ = features(numbers)
    start_KD = numbers["in.centroids"]
    nearest_n = (z2_nD @ start_KD.T).argmax(1)
    assert torch.equal(nearest_n, numbers["out.z2_cluster_index"])
    sums_KD = torch.zeros_like(start_KD).index_add_(0, nearest_n, z2_nD)
    counts_K = torch.bincount(nearest_n, minlength=6).double()
    assert torch.equal(counts_K, numbers["out.cluster_counts"])
    taken_K = counts_K > 0
    means_KD = sums_KD / counts_K.clamp(min=1).unsqueeze(1)
    moved_KD = torch.where(taken_K.unsqueeze(1), unnormalised_momentum_step(start_KD, means_KD, 0.001), start_KD)
    torch.testing.assert_close(moved_KD, numbers["out.centroids_after_step_mean"], **EXACT)
    ours_KD = momentum_step(start_KD, sums_KD, counts_K, 0.001)
    torch.testing.assert_close(ours_KD, F.normalize(moved_KD, dim=1), **EXACT)
    # the release takes sums for means: a centroid moves as many times as far as it has members
    published_KD = torch.where(taken_K.unsqueeze(1), unnormalised_momentum_step(start_KD, sums_KD, 0.001), start_KD)
    torch.testing.assert_close(published_KD, numbers["out.centroids_after_step_published"], **EXACT)
    assert (published_KD - moved_KD).norm(dim=1).max() > 3e-3


def test_observing_and_moving_is_that_momentum_step(numbers: dict[str, Tensor]) -> None:
    _, z2_nD, _ = features(numbers)
    centroids = Centroids(6, 32, "cpu", 0.001)
    centroids.adopt(numbers["in.centroids"], version=1, step=1)
    for part_nD in z2_nD.split(5):  # microbatches
        centroids.observe(part_nD)
    centroids.move()
    expected_KD = F.normalize(numbers["out.centroids_after_step_mean"], dim=1)
    # centroids are float32
    torch.testing.assert_close(centroids.rows_KD.double(), expected_KD, rtol=0, atol=2e-7)
