"""Validation: losses and retrieval over the whole validation split, and a picture of the reconstruction.

B studies, N validation studies, D embedding. Nothing here moves weights, statistics or centroids.
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
    """Numbers of one validation, and films for the picture where there was a reconstruction."""

    scores: dict[str, Any]
    picture_1HW: Tensor | None = None

    @property
    def mean_recall(self) -> float:
        """Mean of both directions' recall at 1, by which checkpoints are ranked."""
        return measure(MEAN_RECALL, self.scores)


@dataclass
class _Found:
    """What one rank gathers on its way through the split."""

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
    found = _Found()
    for batch, real, whole in batches:
        outputs = engine(batch, stage)
        losses = method.losses(outputs, batch, centroids, stage, step)
        # a round with padding would count its padded rows
        (found.values if whole else found.partial).append(torch.cat([losses.terms, losses.statistics]))
        found.images.append(outputs.image_BD[:real].float())
        found.reports.append(outputs.report_BD[:real].float())
        found.hashes.append(batch.report_hash_B[:real])
        if found.picture_1HW is None:
            found.picture_1HW = method.picture(outputs, batch)
    engine.module.train()
    return Validation(_scores(found, (*method.terms(stage), *method.statistics)), found.picture_1HW)


def _scores(found: _Found, names: Sequence[str]) -> dict[str, Any]:
    values = torch.stack(found.values or found.partial).mean(0)
    means = (distributed.all_reduce(values) / distributed.world_size()).tolist()
    scores = dict(zip(names, means, strict=True))
    image_nD, report_nD, hash_n = (torch.cat(parts) for parts in (found.images, found.reports, found.hashes))
    counts = [count for (count,) in distributed.exchange([len(hash_n)])]
    image_ND, report_ND, hash_N = (
        distributed.ragged_all_gather(rows, counts) for rows in (image_nD, report_nD, hash_n)
    )
    return scores | recall(image_ND, report_ND, hash_N)
