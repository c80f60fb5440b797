"""Loss 1: films against reports, over all ranks.

B studies on this rank, G studies on all ranks, D embedding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.distributed import all_gather, all_gather_with_grad
from cmcgns.methods.cm_cgns.losses import same_text_mask


def contrastive_loss(image_BD: Tensor, report_BD: Tensor, report_hash_B: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of this rank's studies against the studies of every rank.

    Studies whose reports have the same text are neither each other's negatives nor each other's positives.
    """
    image_GD, report_GD = all_gather_with_grad(torch.cat([image_BD, report_BD], dim=1)).chunk(2, dim=1)
    offset = distributed.rank() * image_BD.shape[0]  # the global rank: labels are columns of all ranks
    same_text_BG = same_text_mask(report_hash_B, all_gather(report_hash_B), offset)
    label_B = torch.arange(offset, offset + image_BD.shape[0], device=image_BD.device)
    image_to_report_BG = (scale * image_BD @ report_GD.T).masked_fill(same_text_BG, -torch.inf)
    report_to_image_BG = (scale * report_BD @ image_GD.T).masked_fill(same_text_BG, -torch.inf)
    return (F.cross_entropy(image_to_report_BG, label_B) + F.cross_entropy(report_to_image_BG, label_B)) / 2
