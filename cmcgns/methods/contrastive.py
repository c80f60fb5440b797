"""InfoNCE between films and reports over all ranks, and the mask of equal texts.

B studies on this rank, G studies on all ranks, D embedding; n and N the same for sentences.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.distributed import all_gather, all_gather_with_grad


def contrastive_loss(
    image_BD: Tensor,
    report_BD: Tensor,
    report_hash_B: Tensor | None,
    scale: Tensor,
    film_weight: float = 0.5,
    wire_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Symmetric InfoNCE of this rank's studies against the studies of every rank.

    Studies whose reports have the same text are neither negatives nor positives of each other. ``film_weight``: the share of the
    direction in which each film has to find its report.
    """
    film_loss, report_loss = directed_losses(image_BD, report_BD, report_hash_B, scale, wire_dtype)
    return film_weight * film_loss + (1 - film_weight) * report_loss


def directed_losses(
    image_BD: Tensor,
    report_BD: Tensor,
    report_hash_B: Tensor | None,
    scale: Tensor,
    wire_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """InfoNCE of films among the reports of every rank, and of reports among the films.

    Without hashes every other study is a negative.
    """
    image_GD, report_GD = all_gather_with_grad(torch.cat([image_BD, report_BD], dim=1), wire_dtype).chunk(2, dim=1)
    offset = distributed.rank() * image_BD.shape[0]  # the global rank: labels are columns of all ranks
    label_B = torch.arange(offset, offset + image_BD.shape[0], device=image_BD.device)
    film_to_report_BG = scale * image_BD @ report_GD.T
    report_to_film_BG = scale * report_BD @ image_GD.T
    if report_hash_B is not None:
        same_text_BG = same_text_mask(report_hash_B, all_gather(report_hash_B), offset)
        film_to_report_BG = film_to_report_BG.masked_fill(same_text_BG, -torch.inf)
        report_to_film_BG = report_to_film_BG.masked_fill(same_text_BG, -torch.inf)
    return F.cross_entropy(film_to_report_BG, label_B), F.cross_entropy(report_to_film_BG, label_B)


def same_text_mask(own_hash_n: Tensor, hash_N: Tensor, offset: int) -> Tensor:
    """True for other sentences with the same text; False for the sentence itself, which is column ``offset`` + row."""
    same_nN = own_hash_n.unsqueeze(1) == hash_N
    # narrow instead of scatter: this rank's columns are contiguous
    same_nN.narrow(1, offset, own_hash_n.shape[0]).fill_diagonal_(False)
    return same_nN
