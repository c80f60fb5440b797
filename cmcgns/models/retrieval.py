"""Retrieval between films and reports: recall both ways, and the rank of each first hit.

N studies, D embedding.
"""

import torch
from torch import Tensor


def recall(image_ND: Tensor, report_ND: Tensor, report_hash_N: Tensor, chunk: int = 1024) -> dict[str, float]:
    """Recall at 1 and 5 both ways, chance at 1, and the number of distinct reports.

    A hit is any item whose report has the same text, so chance counts duplicates too.
    """
    number, scores = len(report_hash_N), dict[str, float]()
    for way, rank_N in first_hits(image_ND, report_ND, report_hash_N, chunk).items():
        for most in (1, 5):
            scores[f"{way}_recall_at_{most}"] = float((rank_N < most).sum()) / max(number, 1)
    _, count_n = report_hash_N.unique(return_counts=True)
    return scores | {
        "chance_recall_at_1": float((count_n**2).sum()) / max(number, 1) ** 2,
        "studies": number,
        "distinct_reports": len(count_n),
    }


def first_hits(image_ND: Tensor, report_ND: Tensor, report_hash_N: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
    """For each query, how many wrong items are at least as similar as the best right one, (N): ``i2t`` of films that look for
    reports, ``t2i`` the other way. Equal similarities count against it: features that are all alike find nothing."""
    found: dict[str, list[Tensor]] = {"i2t": [], "t2i": []}
    for start in range(0, len(report_hash_N), chunk):
        rows = slice(start, start + chunk)
        right_cN = report_hash_N[rows].unsqueeze(1) == report_hash_N
        for way, query_ND, item_ND in (("i2t", image_ND, report_ND), ("t2i", report_ND, image_ND)):
            similarity_cN = query_ND[rows] @ item_ND.T
            best_c1 = similarity_cN.masked_fill(~right_cN, -torch.inf).amax(1, keepdim=True)
            # not `>=`: features that are not numbers find nothing either
            found[way].append((~(similarity_cN < best_c1) & ~right_cN).sum(1))
    return {way: torch.cat(ranks) if ranks else report_hash_N for way, ranks in found.items()}
