"""Balanced codes of films among prototypes, and the swapped prediction of them (SwAV, Caron et al., NeurIPS 2020).

G studies on all ranks, B on this one, V views, K prototypes.
"""

import math

import torch
from torch import Tensor, nn

from cmcgns import distributed
from cmcgns.models.attention import unit


class Prototypes(nn.Module):
    """K learned directions. They are normalised here and not overwritten: ZeRO keeps parts of them elsewhere."""

    def __init__(self, number: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(number, dim) / dim**0.5)

    def forward(self) -> Tensor:
        """Unit rows (K, D), at least float32."""
        return unit(self.weight if self.weight.dtype == torch.float64 else self.weight.float())


def frozen_until(rows_KD: Tensor, first_steps: int, step: int) -> Tensor:
    """The rows, with a gradient of zero in the first steps: ZeRO expects a gradient of every parameter."""
    return rows_KD if step > first_steps else rows_KD.detach() + 0.0 * rows_KD


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
def codes_of_all_ranks(scores_ABK: Tensor, queued_AQK: Tensor | None, epsilon: float, rounds: int) -> Tensor:
    """Codes (A, G, K) of the studies of all ranks by their views, balanced for each view. Collective.

    ``queued_AQK``: scores of earlier studies, the same on every rank, which are balanced with them.
    """
    # one collective for all views
    gathered_AGK = distributed.all_gather(scores_ABK.detach().transpose(0, 1).contiguous()).transpose(0, 1)
    studies = gathered_AGK.shape[1]
    joined_AXK = gathered_AGK if queued_AQK is None else torch.cat([gathered_AGK, queued_AQK], dim=1)
    return torch.stack([sinkhorn(scores_XK, epsilon, rounds)[:studies] for scores_XK in joined_AXK])


def own_rows(codes_AGK: Tensor, size: int) -> Tensor:
    """This rank's ``size`` rows of those of all ranks, (A, size, K)."""
    return codes_AGK.narrow(1, distributed.rank() * size, size)


def swapped_loss(scores_VBK: Tensor, codes_ABK: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy between the code of each of the first views and what every other view predicts."""
    log_VBK = (scores_VBK / temperature).log_softmax(dim=-1)
    losses = []
    for view, codes_BK in enumerate(codes_ABK):
        of_others = [other for other in range(len(scores_VBK)) if other != view]
        losses.append(torch.stack([-(codes_BK * log_VBK[other]).sum(1).mean() for other in of_others]).mean())
    return torch.stack(losses).mean()
