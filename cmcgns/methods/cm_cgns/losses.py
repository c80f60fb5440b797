"""The losses of CM-CGNS (arXiv 2506.11674): patch alignment, sentence alignment and reconstruction.

B studies, P patches (g x g), n sentences of this rank, N sentences of all ranks, K centroids, D embedding.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.distributed import all_reduce, ragged_all_gather
from cmcgns.methods.cm_cgns.settings import Settings
from cmcgns.methods.contrastive import same_text_mask

MIN_NEGATIVES = 8
"""If fewer other columns than this remain in a sentence's row, its false negatives stay in the denominator."""


class SentenceClusters(NamedTuple):
    """Nearest and second-nearest centroid of sentences."""

    nearest: Tensor
    """Index of the cluster, int64."""
    second: Tensor
    """Index of the hard negative's centroid, int64."""

    def flat(self) -> Tensor:
        """Both as columns of one int64 tensor, for a single collective."""
        return torch.stack([self.nearest, self.second], dim=1)


def nearest_two(similarity_nK: Tensor) -> SentenceClusters:
    """The two most similar centroids of each row; K is at least 2."""
    index_n2 = similarity_nK.detach().topk(2, dim=1).indices
    return SentenceClusters(index_n2[:, 0], index_n2[:, 1])


class NegativeMasks(NamedTuple):
    """Columns that each sentence of this rank is compared with."""

    denominator_nN: Tensor
    """True for the columns in the softmax, including the positive."""
    false_negative_nN: Tensor
    """M: True for other sentences of the same cluster with a different text."""
    restored_n: Tensor
    """True for rows whose false negatives stay in because too few negatives would remain."""


def negative_masks(
    same_text_nN: Tensor, own: SentenceClusters, everyone: SentenceClusters, offset: int, exclude: bool
) -> NegativeMasks:
    """Masks of the sentence loss; ``exclude`` removes false negatives from the denominator."""
    false_nN = (own.nearest.unsqueeze(1) == everyone.nearest) & ~same_text_nN
    false_nN.narrow(1, offset, own.nearest.shape[0]).fill_diagonal_(False)
    kept_nN = ~same_text_nN
    if not exclude:
        return NegativeMasks(kept_nN, false_nN, torch.zeros_like(own.nearest, dtype=torch.bool))
    others_n = (kept_nN & ~false_nN).sum(1) - 1  # without the positive
    restored_n = (others_n < MIN_NEGATIVES) & false_nN.any(1)
    return NegativeMasks(kept_nN & (~false_nN | restored_n.unsqueeze(1)), false_nN, restored_n)


def hard_negative_counts(own: SentenceClusters, everyone: SentenceClusters, num_clusters: int, exclude: bool) -> Tensor:
    """For each row, how many OTHER sentences have each centroid as hard negative, (n, K).

    The N hard-negative columns of a row contain only K different vectors, so counts replace the columns.
    With ``exclude`` the row's own nearest centroid is not counted.
    """
    total_K = torch.zeros(num_clusters, dtype=torch.float32, device=own.second.device)
    total_K.scatter_add_(0, everyone.second, torch.ones_like(everyone.second, dtype=torch.float32))
    counts_nK = total_K.repeat(own.second.shape[0], 1)
    counts_nK.scatter_add_(1, own.second.unsqueeze(1), counts_nK.new_full((own.second.shape[0], 1), -1.0))
    if exclude:
        counts_nK.scatter_(1, own.nearest.unsqueeze(1), 0.0)
    return counts_nK


def patch_alignment_loss(
    patches_BPD: Tensor, attended_BPD: Tensor, predicted_patches_BPD: Tensor, predicted_attended_BPD: Tensor
) -> Tensor:
    """SimSiam over patches: -(1/2)[cos(p(x), sg(y)) + cos(p(y), sg(x))], mean over patches, then studies."""
    forward_BP = F.cosine_similarity(predicted_patches_BPD, attended_BPD.detach(), dim=-1)
    backward_BP = F.cosine_similarity(predicted_attended_BPD, patches_BPD.detach(), dim=-1)
    return -(forward_BP + backward_BP).mean() / 2


class SentenceLoss(NamedTuple):
    """A loss over sentences and its statistics, scaled so that the mean over ranks is the global value."""

    loss: Tensor
    negatives_per_sentence: Tensor
    rows_restored: Tensor
    mean_cosine: Tensor


def sentence_alignment_loss(
    z1_nD: Tensor,
    z2_nD: Tensor,
    hash_n: Tensor,
    rank_sentences: tuple[int, ...],
    centroids_KD: Tensor | None,
    config: Settings,
    wire_dtype: torch.dtype = torch.float32,
) -> SentenceLoss:
    """InfoNCE of each sentence against the attended features of all ranks' sentences, with negatives chosen by the centroids.

    ``z1_nD`` and ``z2_nD`` are normalised. Without centroids it is plain InfoNCE. With centroids each row has the
    second-nearest centroid of every sentence as additional negatives, ``hard_negative_logit`` is added to the logit of its own,
    and sentences of its own cluster are pulled closer by the margin loss, excluded from the denominator, or both.
    """
    total, per_rank = sum(rank_sentences), 1 / sum(rank_sentences) * len(rank_sentences)
    offset = sum(rank_sentences[: distributed.rank()])
    z2_ND = ragged_all_gather(z2_nD, rank_sentences, with_grad=True, wire_dtype=wire_dtype)
    same_text_nN = same_text_mask(hash_n, ragged_all_gather(hash_n, rank_sentences), offset)
    cosine_nN = z1_nD @ z2_ND.T
    positive_n = cosine_nN.diagonal(offset)
    margin = torch.zeros_like(positive_n[:1]).sum()
    if centroids_KD is None:
        denominator_nN, restored = ~same_text_nN, torch.zeros_like(positive_n)
        extra_nM = cosine_nN[:, :0]
    else:
        similarity_nK = z1_nD @ centroids_KD.to(z1_nD.dtype).T
        own = nearest_two(similarity_nK)
        everyone = SentenceClusters(*ragged_all_gather(own.flat(), rank_sentences).unbind(1))
        masks = negative_masks(same_text_nN, own, everyone, offset, exclude=config.false_negatives != "margin")
        denominator_nN, restored = masks.denominator_nN, masks.restored_n
        extra_nM = hard_negative_logits(similarity_nK, own, everyone, config)
        if config.false_negatives != "exclude":
            pulls = margin_penalty(cosine_nN, positive_n, masks.false_negative_nN, config).sum()
            pairs = all_reduce(masks.false_negative_nN.sum()).clamp(min=1)
            margin = config.margin_weight * len(rank_sentences) * pulls / pairs
    logits_nN = (cosine_nN / config.sentence_temperature).masked_fill(~denominator_nN, -torch.inf)
    nll_n = torch.logsumexp(torch.cat([logits_nN, extra_nM], dim=1), dim=1) - logits_nN.diagonal(offset)
    return SentenceLoss(
        loss=per_rank * nll_n.sum() + margin,
        negatives_per_sentence=per_rank * (denominator_nN.sum() - len(z1_nD)),
        rows_restored=len(rank_sentences) * restored.sum().to(nll_n.dtype),
        mean_cosine=per_rank * cosine_nN.detach().sum() / total,
    )


def hard_negative_logits(
    similarity_nK: Tensor, own: SentenceClusters, everyone: SentenceClusters, config: Settings
) -> Tensor:
    """Logits whose sum of exponentials equals that of the N hard-negative columns, (n, K + 1); the last is the row's own one."""
    exclude = config.false_negatives != "margin"
    counts_nK = hard_negative_counts(own, everyone, similarity_nK.shape[1], exclude)
    scaled_nK = similarity_nK / config.sentence_temperature
    own_n1 = scaled_nK.gather(1, own.second.unsqueeze(1)) + config.hard_negative_logit
    return torch.cat([scaled_nK + counts_nK.to(scaled_nK.dtype).log(), own_n1], dim=1)


def margin_penalty(cosine_nN: Tensor, positive_n: Tensor, false_negative_nN: Tensor, config: Settings) -> Tensor:
    """Bidirectional margin of each false negative, 0 elsewhere: relu(d + alpha) + relu(-d - beta), d = cos - positive."""
    gap_nN = cosine_nN - positive_n.unsqueeze(1)
    penalty_nN = F.relu(gap_nN + config.margin_alpha) + F.relu(-gap_nN - config.margin_beta)
    return penalty_nN * false_negative_nN


def reconstruction_loss(
    reconstruction_B1HW: Tensor, image_B1HW: Tensor, masked_BP: Tensor, only_masked: bool
) -> Tensor:
    """Mean absolute error in units of the [-1, 1] range, over the pixels of masked patches or over all pixels."""
    error_B1HW = (reconstruction_B1HW - image_B1HW).abs()
    if not only_masked:
        return error_B1HW.mean()
    grid = int(masked_BP.shape[1] ** 0.5)
    error_BP = F.avg_pool2d(error_B1HW, error_B1HW.shape[-1] // grid).flatten(1)
    # every study masks the same number of patches of one size, so the mean over patches is the mean over pixels
    return (error_BP * masked_BP).sum() / masked_BP.sum()


LEAST_LEVEL = 1e-3
"""A loss below this counts as this, so that a loss near 0 does not take over."""
SHIFTS = {"loss_local_image": 1.0}
"""Added to losses that may be negative: the patch loss is a negative cosine."""


def by_logarithm(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Terms whose mean over ranks is log(L) and whose gradient is that of L divided by L, with L the mean over ranks.

    Uncertainty weights (Kendall et al. 2018) learn a variance v for each loss: L / v + log v is least for v = L, where its
    gradient is the one here. Nothing has to be learned then, and nothing lags behind.
    """
    shifted = {name: term + SHIFTS.get(name, 0.0) for name, term in terms.items()}
    local_L = torch.stack([term.detach() for term in shifted.values()])
    levels = (all_reduce(local_L) / distributed.world_size()).clamp(min=LEAST_LEVEL).unbind()
    return {name: term / level - 1 + level.log() for (name, term), level in zip(shifted.items(), levels, strict=True)}
