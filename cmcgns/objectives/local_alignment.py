"""Losses 2 and 3: patches against what they read in the report, sentences against what they see in the film.

B studies, P patches, n sentences of this rank, N sentences of all ranks, K centroids, D embedding.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.clustering.negatives import (
    SentenceClusters,
    hard_negative_counts,
    nearest_two,
    negative_masks,
    same_text_mask,
)
from cmcgns.config import ObjectiveConfig
from cmcgns.distributed import all_reduce, ragged_all_gather


def patch_alignment_loss(
    patches_BPD: Tensor, attended_BPD: Tensor, predicted_patches_BPD: Tensor, predicted_attended_BPD: Tensor
) -> Tensor:
    """SimSiam over patches: -(1/2)[cos(p(x), sg(y)) + cos(p(y), sg(x))], mean over patches, then studies."""
    forward_BP = F.cosine_similarity(predicted_patches_BPD, attended_BPD.detach(), dim=-1)
    backward_BP = F.cosine_similarity(predicted_attended_BPD, patches_BPD.detach(), dim=-1)
    return -(forward_BP + backward_BP).mean() / 2


class SentenceLoss(NamedTuple):
    """The local report loss and what it was made of, each scaled so that the mean over ranks is the global value."""

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
    config: ObjectiveConfig,
) -> SentenceLoss:
    """InfoNCE of each sentence against the attended features of all ranks' sentences, guided by the centroids.

    ``z1_nD`` and ``z2_nD`` are normalised. Without centroids it is the plain InfoNCE. With them each row also faces the
    second-nearest centroid of every sentence, its own raised by ``hard_negative_logit``, and sentences of its own
    cluster are pulled by the margin loss, left out, or both.
    """
    total, per_rank = sum(rank_sentences), 1 / sum(rank_sentences) * len(rank_sentences)
    offset = sum(rank_sentences[: distributed.rank()])
    z2_ND = ragged_all_gather(z2_nD, rank_sentences, with_grad=True)
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
    similarity_nK: Tensor, own: SentenceClusters, everyone: SentenceClusters, config: ObjectiveConfig
) -> Tensor:
    """Logits whose sum of exponentials equals that of the N hard-negative columns, (n, K + 1); the last is the own one."""
    exclude = config.false_negatives != "margin"
    counts_nK = hard_negative_counts(own, everyone, similarity_nK.shape[1], exclude)
    scaled_nK = similarity_nK / config.sentence_temperature
    own_n1 = scaled_nK.gather(1, own.second.unsqueeze(1)) + config.hard_negative_logit
    return torch.cat([scaled_nK + counts_nK.to(scaled_nK.dtype).log(), own_n1], dim=1)


def margin_penalty(cosine_nN: Tensor, positive_n: Tensor, false_negative_nN: Tensor, config: ObjectiveConfig) -> Tensor:
    """Bidirectional margin of each false negative, 0 elsewhere: relu(d + alpha) + relu(-d - beta), d = cos - positive."""
    gap_nN = cosine_nN - positive_n.unsqueeze(1)
    penalty_nN = F.relu(gap_nN + config.margin_alpha) + F.relu(-gap_nN - config.margin_beta)
    return penalty_nN * false_negative_nN
