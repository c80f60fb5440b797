"""Validation: losses and retrieval over the whole validation split, and a picture of the reconstruction.

B studies, N validation studies, D embedding. Nothing here changes weights, statistics or centroids.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cmcgns import distributed
from cmcgns.config import MEAN_RECALL, measure
from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.base import Method
from cmcgns.models.retrieval import recall
from cmcgns.train.engine import Engine


@dataclass
class Validation:
    """Scores of one validation, and the picture if the method reconstructs films."""

    scores: dict[str, Any]
    picture_1HW: Tensor | None = None

    @property
    def mean_recall(self) -> float:
        """Mean recall at 1 of both directions; checkpoints are ranked by it."""
        return measure(MEAN_RECALL, self.scores)


@dataclass
class _Collected:
    """Embeddings and losses that one rank collects over the split."""

    images: list[Tensor] = field(default_factory=list)
    reports: list[Tensor] = field(default_factory=list)
    hashes: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    partial: list[Tensor] = field(default_factory=list)
    picture_1HW: Tensor | None = None


@torch.no_grad()
def validate(
    engine: Engine,
    method: Method[Any],
    batches: Iterator[tuple[ImageReportBatch, int, bool]],
    centroids: Mapping[str, Tensor | None],
    stage: int,
    step: int,
) -> Validation:
    """Scores over all validation studies, equal on every rank. Collective."""
    engine.module.eval()
    collected = _Collected()
    for batch, real, whole in batches:
        outputs = engine(batch, stage)
        losses = method.losses(outputs, batch, centroids, stage, step)
        # losses of a padded batch include padded rows: they are used only if there is no whole batch
        (collected.values if whole else collected.partial).append(torch.cat([losses.terms, losses.statistics]))
        collected.images.append(outputs.image_BD[:real].float())
        collected.reports.append(outputs.report_BD[:real].float())
        collected.hashes.append(batch.report_hash_B[:real])
        if collected.picture_1HW is None:
            collected.picture_1HW = method.picture(outputs, batch)
    engine.module.train()
    return Validation(_scores(collected, (*method.terms(stage), *method.statistics)), collected.picture_1HW)


def _scores(collected: _Collected, names: Sequence[str]) -> dict[str, Any]:
    values = torch.stack(collected.values or collected.partial).mean(0)
    means = (distributed.all_reduce(values) / distributed.world_size()).tolist()
    scores = dict(zip(names, means, strict=True))
    image_nD, report_nD, hash_n = (
        torch.cat(parts) for parts in (collected.images, collected.reports, collected.hashes)
    )
    counts = [count for (count,) in distributed.exchange([len(hash_n)])]
    image_ND, report_ND, hash_N = (
        distributed.ragged_all_gather(rows, counts) for rows in (image_nD, report_nD, hash_n)
    )
    return scores | recall(image_ND, report_ND, hash_N)
