"""InfoNCE between films and reports over all ranks, and the mask of equal texts.

B studies on this rank, G studies on all ranks, D embedding; n and N the same for sentences.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.distributed import all_gather, all_gather_with_grad


def contrastive_loss(image_BD: Tensor, report_BD: Tensor, report_hash_B: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of this rank's studies against the studies of every rank.

    Studies whose reports have the same text are neither negatives nor positives of each other.
    """
    image_GD, report_GD = all_gather_with_grad(torch.cat([image_BD, report_BD], dim=1)).chunk(2, dim=1)
    offset = distributed.rank() * image_BD.shape[0]  # the global rank: labels are columns of all ranks
    same_text_BG = same_text_mask(report_hash_B, all_gather(report_hash_B), offset)
    label_B = torch.arange(offset, offset + image_BD.shape[0], device=image_BD.device)
    image_to_report_BG = (scale * image_BD @ report_GD.T).masked_fill(same_text_BG, -torch.inf)
    report_to_image_BG = (scale * report_BD @ image_GD.T).masked_fill(same_text_BG, -torch.inf)
    return (F.cross_entropy(image_to_report_BG, label_B) + F.cross_entropy(report_to_image_BG, label_B)) / 2


def same_text_mask(own_hash_n: Tensor, hash_N: Tensor, offset: int) -> Tensor:
    """True for other sentences with the same text; False for the sentence itself, which is column ``offset`` + row."""
    same_nN = own_hash_n.unsqueeze(1) == hash_N
    # narrow instead of scatter: this rank's columns are contiguous
    same_nN.narrow(1, offset, own_hash_n.shape[0]).fill_diagonal_(False)
    return same_nN
