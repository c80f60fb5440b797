"""Retrieval on a split that a model has not seen: does a film find its report among all others, and the report its film.

N studies.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmcgns.evaluate.exported import PretrainedRun, open_run
from cmcgns.evaluate.pairs import Pairs, SplitName, embed_pairs
from cmcgns.evaluate.scores import Resampling, Score
from cmcgns.models.vision_language import VisionLanguageModel
from cmcgns.train.metrics import first_hits, recall

WAYS = {"i2t": "film to report", "t2i": "report to film"}
DEPTHS = (1, 5, 10)


def retrieval(uri: str, split: SplitName) -> dict[str, Any]:
    """``recall`` over ``split`` of the corpus of the finished run in the folder ``uri``, by its export; runs on one CPU."""
    run = open_run("run", uri)
    return model_retrieval(run.load_model(), run, split)


def model_retrieval(model: VisionLanguageModel, run: PretrainedRun, split: SplitName) -> dict[str, Any]:
    """The same by ``model``, with the settings and the vocabulary of ``run``."""
    return recall(*_tensors(embed_pairs(model, run, split)))


def retrieval_scores(pairs: Pairs, encoder: str, images: str, resamples: int, seed: int) -> list[Score]:
    """Recall at each of ``DEPTHS`` both ways, with intervals over the queries; a hit is any item with the same report."""
    resampling, scores = Resampling.of(list(pairs.group_N), resamples, seed), []
    for way, rank_N in first_hits(*_tensors(pairs)).items():
        for depth in DEPTHS:
            hit_N = (rank_N < depth).numpy().astype(np.float64)
            scores.append(
                Score(
                    "retrieval",
                    images,
                    WAYS[way],
                    f"recall@{depth}",
                    encoder,
                    float(hit_N.mean()),
                    len(hit_N),
                    resampling.mean(hit_N),
                )
            )
    return scores


def _tensors(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    image_ND, report_ND, hash_N = pairs.image_ND, pairs.report_ND, pairs.report_hash_N
    return torch.from_numpy(image_ND), torch.from_numpy(report_ND), torch.from_numpy(hash_N)
