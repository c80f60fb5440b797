"""Validation: losses and retrieval over the whole validation split, and a picture of the reconstruction.

B studies, N validation studies, n sentences, R reports and F films that are compared by parts, D embedding. Nothing here changes
weights, statistics or centroids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cmcgns import distributed
from cmcgns.data.batch import ImageReportBatch
from cmcgns.measures import MEAN_RECALL, measure
from cmcgns.methods.base import BankCentroids, ComparesParts, Method
from cmcgns.methods.parts import CollectedParts
from cmcgns.models.retrieval import (
    centred,
    first_hits_by_score,
    mean_over_sentences,
    recall,
    recall_of,
    with_global,
)
from cmcgns.train.engine import Engine

PART_STUDIES = 1024
"""Studies that are compared by parts: patches of more would take too much memory."""


@dataclass
class Validation:
    """Scores of one validation, and the picture if the method reconstructs films."""

    scores: dict[str, Any]
    picture_1HW: Tensor | None = None

    @property
    def mean_recall(self) -> float:
        """Mean recall at 1 of both directions; checkpoints are ranked by it. 0 without reports."""
        return measure(MEAN_RECALL, self.scores) if "i2t_recall_at_1" in self.scores else 0.0


@dataclass
class _Collected:
    """Embeddings and losses that one rank collects over the split."""

    studies: int = 0
    images: list[Tensor] = field(default_factory=list)
    reports: list[Tensor] = field(default_factory=list)
    hashes: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    partial: list[Tensor] = field(default_factory=list)
    parts: CollectedParts = field(default_factory=lambda: CollectedParts(PART_STUDIES // distributed.world_size()))
    picture_1HW: Tensor | None = None


@torch.no_grad()
def validate(
    engine: Engine,
    method: Method[Any],
    batches: Iterator[tuple[ImageReportBatch, int, bool]],
    centroids: BankCentroids,
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
        collected.studies += real
        if method.config.data.reports:
            collected.images.append(outputs.image_BD[:real].float())
            collected.reports.append(outputs.report_BD[:real].float())
            collected.hashes.append(batch.report_hash_B[:real])
        if isinstance(method, ComparesParts) and not collected.parts.is_full:
            collected.parts.add(method.parts(outputs, batch), real)
        if collected.picture_1HW is None:
            collected.picture_1HW = method.picture(outputs, batch)
    engine.module.train()
    scores = _scores(collected, (*method.terms(stage), *method.statistics))
    if isinstance(method, ComparesParts):
        scores |= _scores_by_parts(collected, method)
    return Validation(scores, collected.picture_1HW)


def _scores(collected: _Collected, names: Sequence[str]) -> dict[str, Any]:
    values = torch.stack(collected.values or collected.partial).mean(0)
    means = (distributed.all_reduce(values) / distributed.world_size()).tolist()
    scores = dict(zip(names, means, strict=True))
    counts = [count for (count,) in distributed.exchange([collected.studies])]
    if not collected.hashes:  # films without reports
        return scores | {"studies": sum(counts)}
    image_nD, report_nD, hash_n = (
        torch.cat(parts) for parts in (collected.images, collected.reports, collected.hashes)
    )
    image_ND, report_ND, hash_N = (
        distributed.ragged_all_gather(rows, counts) for rows in (image_nD, report_nD, hash_n)
    )
    return scores | recall(image_ND, report_ND, hash_N)


def _scores_by_parts(collected: _Collected, method: ComparesParts) -> dict[str, float]:
    """Recall by parts, and by parts and whole films together, over the studies whose parts were kept. Collective."""
    parts, studies = collected.parts.joined(), collected.parts.studies
    counts = distributed.exchange([len(parts.study_n), studies])
    sentence_counts, film_counts = zip(*counts, strict=True)
    first = sum(film_counts[: distributed.rank()])
    sentences = tuple(distributed.ragged_all_gather(rows, sentence_counts) for rows in parts.sentences)
    report_N = distributed.ragged_all_gather(parts.study_n + first, sentence_counts)
    own_RF = mean_over_sentences(method.part_scores(sentences, parts.films), report_N, sum(film_counts))
    # each rank has the columns of its own films
    centred_RF = centred(distributed.ragged_all_gather(own_RF.T.contiguous(), film_counts).T)
    image_FD, report_RD, hash_R = (
        distributed.ragged_all_gather(torch.cat(rows)[:studies], film_counts)
        for rows in (collected.images, collected.reports, collected.hashes)
    )
    return {
        **recall_of(first_hits_by_score(centred_RF, hash_R), "parts_"),
        **recall_of(first_hits_by_score(with_global(centred_RF, image_FD, report_RD), hash_R), "combined_"),
    }
