"""Contrast inside one study: each patch, word or sentence picks what it attended to among those of the same study.

B studies, L parts of a study (patches, words or sentences; padded), D embedding.
"""

import torch
from torch import Tensor


def within_study_losses(
    own_BLD: Tensor,
    attended_BLD: Tensor,
    weight_BL: Tensor,
    scale: Tensor | float,
    mask_BL: Tensor | None = None,
    target_LL: Tensor | None = None,
    left_out_BLL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies over the parts of each study: each part among what all attended to, and each attended among all parts.

    Both are summed with ``weight_BL`` and averaged over studies. ``target_LL``: the right answers of each part, rows that sum to
    1; by default the part itself. Padded parts (``mask_BL``) and pairs in ``left_out_BLL`` are in no denominator.
    """
    logits_BLL = scale * own_BLD @ attended_BLD.mT
    left_out_BLL = torch.zeros_like(logits_BLL, dtype=torch.bool) if left_out_BLL is None else left_out_BLL
    losses = []
    for each_BLL, gone_BLL in ((logits_BLL, left_out_BLL), (logits_BLL.mT, left_out_BLL.mT)):
        if mask_BL is not None:
            # a padded part keeps some column: its weight is 0, but not its gradient if it had none
            gone_BLL = (gone_BLL & mask_BL.unsqueeze(2)) | ~mask_BL.unsqueeze(1)
        right_BL = each_BLL.diagonal(dim1=1, dim2=2) if target_LL is None else (target_LL * each_BLL).sum(-1)
        nll_BL = each_BLL.masked_fill(gone_BLL, -torch.inf).logsumexp(-1) - right_BL
        losses.append((weight_BL * nll_BL).sum(1).mean())
    return losses[0], losses[1]


def equal_weights(mask_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """The same weight for each real part of a study, with sum 1; 0 where padded."""
    weight_BL = mask_BL.to(dtype)
    return weight_BL / weight_BL.sum(1, keepdim=True).clamp(min=1)


def same_sentences(hash_n: Tensor, row_n: Tensor, mask_BS: Tensor) -> Tensor:
    """True for two different sentences of one report that have the same words, (B, S, S)."""
    flat_BS = torch.zeros_like(mask_BS, dtype=hash_n.dtype)
    hash_BS = flat_BS.flatten().index_copy(0, row_n, hash_n).view_as(flat_BS)
    both_BSS = mask_BS.unsqueeze(1) & mask_BS.unsqueeze(2)
    itself_SS = torch.eye(mask_BS.shape[1], dtype=torch.bool, device=mask_BS.device)
    return (hash_BS.unsqueeze(1) == hash_BS.unsqueeze(2)) & both_BSS & ~itself_SS
