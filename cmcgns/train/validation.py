"""Validation: losses and retrieval over the whole validation split, and a picture of the reconstruction.

B studies, N validation studies, D embedding. Nothing here moves weights, statistics or centroids.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cmcgns import distributed
from cmcgns.config import MEAN_RECALL, measure
from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.cm_cgns.objective import LOSS_TERMS, STATISTICS, Objective
from cmcgns.models.retrieval import recall
from cmcgns.models.vision_language import Outputs
from cmcgns.train.engine import Engine

PICTURE_STUDIES = 4


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
    objective: Objective,
    batches: Iterator[tuple[ImageReportBatch, int, bool]],
    centroids_KD: Tensor | None,
    reconstruct: bool,
) -> Validation:
    """Scores over all validation studies, equal on every rank. Collective."""
    engine.module.eval()
    found = _Found()
    for batch, real, whole in batches:
        outputs = engine(batch, reconstruct)
        losses = objective(outputs, batch, centroids_KD)
        # a round with padding would count its padded rows
        (found.values if whole else found.partial).append(torch.cat([losses.terms, losses.statistics]))
        found.images.append(outputs.image_BD[:real].float())
        found.reports.append(outputs.report_BD[:real].float())
        found.hashes.append(batch.report_hash_B[:real])
        if outputs.reconstruction_B1HW is not None and found.picture_1HW is None:
            found.picture_1HW = contact_sheet(batch, outputs)
    engine.module.train()
    return Validation(_scores(found, reconstruct), found.picture_1HW)


def _scores(found: _Found, reconstruct: bool) -> dict[str, Any]:
    values = torch.stack(found.values or found.partial).mean(0)
    means = (distributed.all_reduce(values) / distributed.world_size()).tolist()
    scores = dict(zip((*LOSS_TERMS, *STATISTICS), means, strict=True))
    if not reconstruct:
        scores.pop("loss_reconstruction")
    image_nD, report_nD, hash_n = (torch.cat(parts) for parts in (found.images, found.reports, found.hashes))
    counts = [count for (count,) in distributed.exchange([len(hash_n)])]
    image_ND, report_ND, hash_N = (
        distributed.ragged_all_gather(rows, counts) for rows in (image_nD, report_nD, hash_n)
    )
    return scores | recall(image_ND, report_ND, hash_N)


def contact_sheet(batch: ImageReportBatch, outputs: Outputs) -> Tensor:
    """Some films in three rows, input over masked over reconstructed, in [0, 1], shape (1, 3H, nW)."""
    assert outputs.reconstruction_B1HW is not None
    image_n1HW = batch.image_B1HW[:PICTURE_STUDIES].float()
    rebuilt_n1HW = outputs.reconstruction_B1HW[:PICTURE_STUDIES].float()
    masked_n1HW = pixel_mask(batch.masked_BP[:PICTURE_STUDIES], image_n1HW.shape[-1])
    hidden_n1HW = image_n1HW.masked_fill(masked_n1HW, -1.0)
    rows = [torch.cat(list(row), dim=2) for row in (image_n1HW, hidden_n1HW, rebuilt_n1HW)]
    return ((torch.cat(rows, dim=1) + 1) / 2).clamp(0, 1).cpu()


def pixel_mask(masked_BP: Tensor, side: int) -> Tensor:
    """Hidden patches as hidden pixels, bool (B, 1, side, side)."""
    grid = int(masked_BP.shape[1] ** 0.5)
    cell = side // grid
    mask_Bgg = masked_BP.unflatten(1, (grid, grid))
    return mask_Bgg.repeat_interleave(cell, 1).repeat_interleave(cell, 2).unsqueeze(1)
