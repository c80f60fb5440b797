"""Retrieval between films and reports: recall in both directions, and the rank of each query's first hit.

N studies, D embedding.
"""

import torch
from torch import Tensor


def recall(image_ND: Tensor, report_ND: Tensor, report_hash_N: Tensor, chunk: int = 1024) -> dict[str, float]:
    """Recall at 1 and 5 in both directions, chance at 1, and the number of distinct reports.

    A hit is any item whose report has the same text; chance accounts for duplicates.
    """
    number, scores = len(report_hash_N), dict[str, float]()
    for direction, rank_N in first_hits(image_ND, report_ND, report_hash_N, chunk).items():
        for depth in (1, 5):
            scores[f"{direction}_recall_at_{depth}"] = float((rank_N < depth).sum()) / max(number, 1)
    _, count_n = report_hash_N.unique(return_counts=True)
    return scores | {
        "chance_recall_at_1": float((count_n**2).sum()) / max(number, 1) ** 2,
        "studies": number,
        "distinct_reports": len(count_n),
    }


def first_hits(image_ND: Tensor, report_ND: Tensor, report_hash_N: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
    """Rank of each query's first hit, (N): the number of wrong items that are at least as similar. ``i2t``: films query reports,
    ``t2i``: reports query films. Ties count as misses, so that identical features retrieve nothing."""
    ranks: dict[str, list[Tensor]] = {"i2t": [], "t2i": []}
    for start in range(0, len(report_hash_N), chunk):
        rows = slice(start, start + chunk)
        right_cN = report_hash_N[rows].unsqueeze(1) == report_hash_N
        for direction, query_ND, item_ND in (("i2t", image_ND, report_ND), ("t2i", report_ND, image_ND)):
            similarity_cN = query_ND[rows] @ item_ND.T
            best_c1 = similarity_cN.masked_fill(~right_cN, -torch.inf).amax(1, keepdim=True)
            # not `>=`: NaN features must retrieve nothing either
            ranks[direction].append((~(similarity_cN < best_c1) & ~right_cN).sum(1))
    return {direction: torch.cat(parts) if parts else report_hash_N for direction, parts in ranks.items()}
