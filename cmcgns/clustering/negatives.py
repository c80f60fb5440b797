"""What the centroids say about sentences: their cluster, their hard negative, their false negatives.

n sentences of this rank, N sentences of all ranks, K centroids, D embedding. Plain torch: FAISS stays in the pool.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MIN_NEGATIVES = 8
"""A sentence keeps at least this many other columns, or its false negatives stay in."""


class SentenceClusters(NamedTuple):
    """Nearest and second-nearest centroid of sentences."""

    nearest: Tensor
    """Index of the cluster, int64."""
    second: Tensor
    """Index of the hard negative's centroid, int64."""

    def flat(self) -> Tensor:
        """Both as columns of one int64 tensor, to travel in one collective."""
        return torch.stack([self.nearest, self.second], dim=1)


def nearest_two(similarity_nK: Tensor) -> SentenceClusters:
    """The two most similar centroids of each row; K is at least 2."""
    index_n2 = similarity_nK.detach().topk(2, dim=1).indices
    return SentenceClusters(index_n2[:, 0], index_n2[:, 1])


class NegativeMasks(NamedTuple):
    """Which columns each own sentence is held against."""

    denominator_nN: Tensor
    """True for the columns in the softmax, the positive included."""
    false_negative_nN: Tensor
    """M: True for other sentences of the same cluster with another text."""
    restored_n: Tensor
    """True for rows that would have kept too few negatives and got M back."""


def same_text_mask(own_hash_n: Tensor, hash_N: Tensor, offset: int) -> Tensor:
    """True where another sentence has the same words; never for a sentence itself, which stands at ``offset`` + row."""
    same_nN = own_hash_n.unsqueeze(1) == hash_N
    # narrow, not a scatter: the own columns are one block
    same_nN.narrow(1, offset, own_hash_n.shape[0]).fill_diagonal_(False)
    return same_nN


def negative_masks(
    same_text_nN: Tensor, own: SentenceClusters, everyone: SentenceClusters, offset: int, exclude: bool
) -> NegativeMasks:
    """Masks of the sentence loss under the current centroids; with ``exclude`` false negatives leave the denominator."""
    false_nN = (own.nearest.unsqueeze(1) == everyone.nearest) & ~same_text_nN
    false_nN.narrow(1, offset, own.nearest.shape[0]).fill_diagonal_(False)
    kept_nN = ~same_text_nN
    if not exclude:
        return NegativeMasks(kept_nN, false_nN, torch.zeros_like(own.nearest, dtype=torch.bool))
    others_n = (kept_nN & ~false_nN).sum(1) - 1  # the positive is not another
    restored_n = (others_n < MIN_NEGATIVES) & false_nN.any(1)
    return NegativeMasks(kept_nN & (~false_nN | restored_n.unsqueeze(1)), false_nN, restored_n)


def hard_negative_counts(own: SentenceClusters, everyone: SentenceClusters, num_clusters: int, exclude: bool) -> Tensor:
    """How many OTHER sentences put each centroid into a row's denominator, (n, K).

    The N hard-negative columns of a row are only K different vectors, so counting them replaces writing them out.
    With ``exclude`` a column whose centroid is the row's own nearest is left out.
    """
    total_K = torch.zeros(num_clusters, dtype=torch.float32, device=own.second.device)
    total_K.scatter_add_(0, everyone.second, torch.ones_like(everyone.second, dtype=torch.float32))
    counts_nK = total_K.repeat(own.second.shape[0], 1)
    counts_nK.scatter_add_(1, own.second.unsqueeze(1), counts_nK.new_full((own.second.shape[0], 1), -1.0))
    if exclude:
        counts_nK.scatter_(1, own.nearest.unsqueeze(1), 0.0)
    return counts_nK
