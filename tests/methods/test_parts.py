"""Retrieval by parts: each sentence of a report finds itself on a film; the same on any number of ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.data.batch import ImageReportBatch
from cmcgns.errors import UserError
from cmcgns.measures import MEASURES, measure
from cmcgns.methods.base import load_method
from cmcgns.train.validation import validate
from tests.ranks import run_on_ranks
from tests.small import random_batch, small_config, small_model

STUDIES, BATCH, PADDED = 24, 4, 2
CONFIG = small_config(objective__local_negatives="films")


class Plain:
    """A model in place of an engine: validation only calls it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)


def validated(only_rank_0: bool = False) -> dict[str, float]:
    """Scores of ``STUDIES`` studies over all ranks; the last ``PADDED`` of each batch are padding, or all on other ranks."""
    model = small_model(CONFIG)
    rank, size = distributed.rank(), BATCH - PADDED
    share = STUDIES if only_rank_0 else STUDIES // distributed.world_size()
    real, batches = size if rank == 0 or not only_rank_0 else 0, []
    for start in range(0, share, size):
        firsts = [0 if only_rank_0 else r * share for r in range(distributed.world_size())]
        rows = [slice(first + start, first + start + BATCH) for first in firsts]  # padding is the studies that follow
        batches.append((random_batch(CONFIG, rows[rank], ranks=rows), real, True))
    return validate(Plain(model), load_method(CONFIG), iter(batches), {"sentences": None}, 1, 1).scores  # type: ignore[arg-type]


def slow_recall(batch: ImageReportBatch, combined: bool) -> dict[str, float]:
    """The same by loops over reports, sentences and films."""
    outputs = small_model(CONFIG).eval()(batch)
    scores = torch.zeros(STUDIES, STUDIES)
    for report in range(STUDIES):
        for film in range(STUDIES):
            found = [
                sentence_score(outputs, report, sentence, film)
                for sentence in range(int(batch.sentence_mask_BS[report].sum()))
            ]
            scores[report, film] = torch.stack(found).mean()
    scores = scores - scores.mean(1, keepdim=True)
    if combined:
        cosines = outputs.report_BD @ outputs.image_BD.T
        scores = 0.2 * scores / scores.std() + cosines / cosines.std()
    right = batch.report_hash_B.unsqueeze(1) == batch.report_hash_B
    kind, recalls = "combined" if combined else "parts", {}
    for way, table in (("t2i", scores), ("i2t", scores.T)):
        for depth in (1, 5):
            hits = [bool(right[i][table[i].topk(depth).indices].any()) for i in range(STUDIES)]
            recalls[f"{way}_{kind}_recall_at_{depth}"] = sum(hits) / STUDIES
    return recalls


def sentence_score(outputs: Any, report: int, sentence: int, film: int) -> Tensor:
    query_D = outputs.sentence_query_BSD[report, sentence]
    attended_D = torch.zeros_like(query_D)
    for key_D, value_D in zip(outputs.patch_key_BPD[film], outputs.patch_value_BPD[film], strict=True):
        attended_D = attended_D + torch.sigmoid(query_D @ key_D / len(query_D) ** 0.5) * value_D
    return F.cosine_similarity(outputs.sentences_BSD[report, sentence], attended_D, dim=0)


@torch.no_grad()
def test_recall_by_parts_is_that_of_loops_over_sentences_and_films() -> None:
    batch, found = random_batch(CONFIG, slice(0, STUDIES)), validated()
    for combined in (False, True):
        for name, value in slow_recall(batch, combined).items():
            assert found[name] == pytest.approx(value), name


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "only_rank_0"), [(2, False), (3, False), (2, True)])
def test_recall_by_parts_is_the_same_on_any_number_of_ranks(ranks: int, only_rank_0: bool) -> None:
    expected = {name: value for name, value in validated().items() if "recall" in name}
    assert len(expected) == 13
    for found in run_on_ranks(ranks, validated, only_rank_0):
        assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_every_metric_of_sweeps_is_reported_and_a_method_without_parts_refuses_theirs() -> None:
    found = validated()
    for name in MEASURES:
        assert 0 <= measure(name, found) <= 1
    both = measure("i2t_parts_recall_at_5", found) + measure("t2i_parts_recall_at_5", found)
    assert measure("mean_parts_recall_at_5", found) == both / 2
    without = {name: value for name, value in found.items() if "parts" not in name}
    with pytest.raises(UserError, match="mean_parts_recall_at_1 is not reported by this method"):
        measure("mean_parts_recall_at_1", without)
