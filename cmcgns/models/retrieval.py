"""Retrieval between films and reports: recall in both directions, and the rank of each query's first hit.

By the embeddings of whole films and reports, by parts (each sentence finds itself on a film), and by both together.

N studies, D embedding.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

DEPTHS = (1, 5)
PARTS_WEIGHT = 0.2
"""Parts alone find less than whole films. Of 0.1, 0.2, 0.3, 0.5 and 1 on 512 validation films of the phantom, the two least were
ahead of whole films alone, within the noise; 0.5 and 1 were behind."""


def recall(image_ND: Tensor, report_ND: Tensor, report_hash_N: Tensor, chunk: int = 1024) -> dict[str, float]:
    """Recall at 1 and 5 in both directions, chance at 1, and the number of distinct reports.

    A hit is any item whose report has the same text; chance accounts for duplicates.
    """
    number = len(report_hash_N)
    scores = recall_of(first_hits(image_ND, report_ND, report_hash_N, chunk))
    _, count_n = report_hash_N.unique(return_counts=True)
    return scores | {
        "chance_recall_at_1": float((count_n**2).sum()) / max(number, 1) ** 2,
        "studies": number,
        "distinct_reports": len(count_n),
    }


def recall_of(hits: Mapping[str, Tensor], kind: str = "") -> dict[str, float]:
    """Recall at ``DEPTHS`` from the ranks of first hits by direction, such as `i2t_recall_at_1`."""
    return {
        f"{direction}_{kind}recall_at_{depth}": float((rank_N < depth).sum()) / max(len(rank_N), 1)
        for direction, rank_N in hits.items()
        for depth in DEPTHS
    }


def first_hits(image_ND: Tensor, report_ND: Tensor, report_hash_N: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
    """Rank of each query's first hit, (N): the number of wrong items that are at least as similar. ``i2t``: films query reports,
    ``t2i``: reports query films. Ties count as misses, so that identical features retrieve nothing."""
    ranks: dict[str, list[Tensor]] = {"i2t": [], "t2i": []}
    for start in range(0, len(report_hash_N), chunk):
        rows = slice(start, start + chunk)
        right_cN = report_hash_N[rows].unsqueeze(1) == report_hash_N
        for direction, query_ND, item_ND in (("i2t", image_ND, report_ND), ("t2i", report_ND, image_ND)):
            ranks[direction].append(_first_hit(query_ND[rows] @ item_ND.T, right_cN))
    return {direction: torch.cat(parts) if parts else report_hash_N for direction, parts in ranks.items()}


def first_hits_by_score(score_RF: Tensor, report_hash_N: Tensor) -> dict[str, Tensor]:
    """``first_hits`` by a matrix of scores whose rows are reports and whose columns are films."""
    right_NN = report_hash_N.unsqueeze(1) == report_hash_N
    return {"i2t": _first_hit(score_RF.T, right_NN), "t2i": _first_hit(score_RF, right_NN)}


def _first_hit(similarity_cN: Tensor, right_cN: Tensor) -> Tensor:
    best_c1 = similarity_cN.masked_fill(~right_cN, -torch.inf).amax(1, keepdim=True)
    # not `>=`: NaN features must retrieve nothing either
    return (~(similarity_cN < best_c1) & ~right_cN).sum(1)


def mean_over_sentences(score_nF: Tensor, report_of_n: Tensor, reports: int) -> Tensor:
    """Scores of reports on films, (R, F), from those of their sentences; ``report_of_n`` is the report of each sentence."""
    total_RF = score_nF.new_zeros(reports, score_nF.shape[1]).index_add_(0, report_of_n, score_nF)
    # not bincount: on a GPU it waits for the largest index
    count_R = score_nF.new_zeros(reports).index_add_(0, report_of_n, torch.ones_like(report_of_n, dtype=score_nF.dtype))
    return total_RF / count_R.clamp(min=1).unsqueeze(1)


def centred(score_RF: Tensor) -> Tensor:
    """Scores without what a report has in common with all films: else some reports would be the best of most films."""
    return score_RF - score_RF.mean(1, keepdim=True)


def with_global(centred_RF: Tensor, image_FD: Tensor, report_RD: Tensor) -> Tensor:
    """Cosines of films and reports plus ``PARTS_WEIGHT`` times the scores by parts, each divided by its standard deviation."""
    cosine_RF = report_RD @ image_FD.T
    by_parts_RF = PARTS_WEIGHT * centred_RF / centred_RF.std().clamp(min=1e-12)
    return by_parts_RF + cosine_RF / cosine_RF.std().clamp(min=1e-12)
