"""Codes of equal partition by Sinkhorn-Knopp (SwAV, Caron et al. 2020) over the studies of all ranks.

B rows of this rank, G rows of all ranks, K prototypes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.distributed import all_gather


@torch.no_grad()
def sinkhorn(score_GK: Tensor, epsilon: float, rounds: int) -> Tensor:
    """Codes (G, K): each row sums to 1, and the columns, the prototypes, have about equal sums."""
    rows, columns = score_GK.shape
    code_GK = ((score_GK - score_GK.max()) / epsilon).exp()  # a common factor cancels
    for _ in range(rounds):
        code_GK = code_GK / (code_GK.sum(0, keepdim=True) * columns)
        code_GK = code_GK / (code_GK.sum(1, keepdim=True) * rows)
    return code_GK * rows


@torch.no_grad()
def codes_of_all_ranks(scores: tuple[Tensor, ...], epsilon: float, rounds: int) -> tuple[Tensor, ...]:
    """For each view's scores (B, K) of this rank the codes (G, K) of the studies of all ranks. Collective."""
    gathered = all_gather(torch.cat([each_BK.detach() for each_BK in scores], dim=1))
    return tuple(sinkhorn(each_GK, epsilon, rounds) for each_GK in gathered.chunk(len(scores), dim=1))


def own_rows(code_GK: Tensor, size: int) -> Tensor:
    """This rank's ``size`` rows of those of all ranks."""
    return code_GK.narrow(0, distributed.rank() * size, size)


def swapped_loss(
    one_BK: Tensor, other_BK: Tensor, one_code_BK: Tensor, other_code_BK: Tensor, temperature: float
) -> Tensor:
    """Each view's scores predict the code of the other, in the mean over both directions and the rows."""
    losses = [
        F.cross_entropy(score_BK / temperature, code_BK)
        for score_BK, code_BK in ((other_BK, one_code_BK), (one_BK, other_code_BK))
    ]
    return torch.stack(losses).mean()
