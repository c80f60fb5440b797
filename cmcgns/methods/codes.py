"""Balanced codes of films among prototypes, and the swapped prediction of them (SwAV, Caron et al., NeurIPS 2020).

G studies on all ranks, B on this one, V views, K prototypes.
"""

import math

import torch
from torch import Tensor

from cmcgns import distributed


def sinkhorn(scores_GK: Tensor, epsilon: float, rounds: int) -> Tensor:
    """Codes (G, K): each study's sum to 1, and after enough rounds each prototype has G / K of all studies.

    Computed with logarithms: the published exponentials overflow, or leave a prototype without any study.
    """
    studies, prototypes = scores_GK.shape
    log_GK = scores_GK / epsilon
    for _ in range(rounds):
        log_GK = log_GK - log_GK.logsumexp(dim=0, keepdim=True) - math.log(prototypes)
        log_GK = log_GK - log_GK.logsumexp(dim=1, keepdim=True) - math.log(studies)
    return (log_GK + math.log(studies)).exp()


@torch.no_grad()
def balanced_codes(scores_ABK: Tensor, queued_AQK: Tensor | None, epsilon: float, rounds: int) -> Tensor:
    """Codes (A, B, K) of this rank's studies by their views, balanced for each view over the studies of all ranks. Collective.

    ``queued_AQK``: scores of earlier studies, the same on every rank, which are balanced with them.
    """
    views, size = scores_ABK.shape[:2]
    # one collective for all views
    gathered_GAK = distributed.all_gather(scores_ABK.transpose(0, 1).contiguous())
    own, codes = slice(distributed.rank() * size, (distributed.rank() + 1) * size), []
    for view in range(views):
        scores_GK = gathered_GAK[:, view]
        if queued_AQK is not None:
            scores_GK = torch.cat([scores_GK, queued_AQK[view]])
        codes.append(sinkhorn(scores_GK, epsilon, rounds)[own])
    return torch.stack(codes)


def swapped_loss(scores_VBK: Tensor, codes_ABK: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy between the code of each of the first views and what every other view predicts."""
    log_VBK = (scores_VBK / temperature).log_softmax(dim=-1)
    losses = []
    for view, codes_BK in enumerate(codes_ABK):
        of_others = [other for other in range(len(scores_VBK)) if other != view]
        losses.append(torch.stack([-(codes_BK * log_VBK[other]).sum(1).mean() for other in of_others]).mean())
    return torch.stack(losses).mean()
