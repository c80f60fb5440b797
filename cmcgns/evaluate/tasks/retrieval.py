"""Retrieval on one split of the corpus: films query reports, and reports query films.

N studies, M of them compared by parts.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmcgns.evaluate.base import Inputs, Task
from cmcgns.evaluate.figures import SAMPLES, Figure, nearest
from cmcgns.evaluate.pairs import Pairs, SplitName, embed_pairs
from cmcgns.evaluate.scores import Resampling, Score
from cmcgns.library.runs import PretrainedRun, open_run
from cmcgns.models.device import CPU
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.models.retrieval import first_hits, first_hits_by_score, recall, recall_of, with_global

WAYS = {"i2t": "film to report", "t2i": "report to film"}
BY_PARTS, COMBINED = ", by parts", ", combined"
DEPTHS = (1, 5, 10)
SHOWN_REPORTS = 3


def retrieval(uri: str, split: SplitName, device: torch.device = CPU) -> dict[str, Any]:
    """``recall`` on ``split`` of its corpus by the export of the finished run in the folder ``uri``."""
    run = open_run("run", uri)
    return model_retrieval(run.load_model(), run, split, device)


def model_retrieval(
    model: DualEncoder, run: PretrainedRun, split: SplitName, device: torch.device = CPU
) -> dict[str, Any]:
    """The same with ``model``, using settings and vocabulary of ``run``."""
    pairs = embed_pairs(model, run, split, device)
    hits = _hits(pairs)
    scores = recall(*_tensors(pairs))
    for kind, name in ((BY_PARTS, "parts_"), (COMBINED, "combined_")):
        if kind in hits:
            scores |= recall_of(hits[kind], name)
    return scores


def retrieval_scores(
    pairs: Pairs, encoder: str, images: str, resamples: int, seed: int, shown: list[Figure] | None = None
) -> list[Score]:
    """Recall at each of ``DEPTHS`` in both directions, with intervals over the queries; a hit is any item with the same report.
    Depths that reach all of the items are left out: recall is 1 there, whatever the model.
    Where the method has parts, also by parts and by both together. Each note gives the recall of a random order.

    Appends some films with their nearest reports to ``shown``.
    """
    if shown is not None:
        shown.append(nearest_reports(pairs, f"{encoder}: films of {images} and the reports nearest to them"))
    scores = []
    for kind, hits in _hits(pairs).items():
        number = len(hits["i2t"])
        resampling = Resampling.of(list(pairs.group_N[:number]), resamples, seed)
        depths = [depth for depth in DEPTHS if depth < number]
        notes = {depth: f"chance {chance(pairs.report_hash_N[:number], depth):.4f}" for depth in depths}
        for way, rank_N in hits.items():
            for depth in depths:
                hit_N = (rank_N < depth).numpy().astype(np.float64)
                value, interval = float(hit_N.mean()), resampling.mean(hit_N)
                setting, metric = WAYS[way] + kind, f"recall@{depth}"
                scores.append(
                    Score("retrieval", images, setting, metric, encoder, value, number, interval, notes[depth])
                )
    return scores


def chance(hash_N: NDArray[np.int64], depth: int) -> float:
    """Mean recall at ``depth`` of a random order, in which every item with the query's text is a hit."""
    _, index_N, count_n = np.unique(hash_N, return_inverse=True, return_counts=True)
    wrong_N, number = len(hash_N) - count_n[index_N], len(hash_N)
    miss_N = np.ones(number)
    for place in range(min(depth, number)):
        miss_N *= np.maximum(wrong_N - place, 0) / (number - place)
    return float(1 - miss_N.mean())


def _hits(pairs: Pairs) -> dict[str, dict[str, Tensor]]:
    """Ranks of first hits by the kind of similarity."""
    image_ND, report_ND, hash_N = _tensors(pairs)
    found = {"": first_hits(image_ND, report_ND, hash_N)}
    if pairs.by_parts_MM is not None:
        parts_MM = torch.from_numpy(pairs.by_parts_MM)
        first = slice(len(parts_MM))
        both_MM = with_global(parts_MM, image_ND[first], report_ND[first])
        found |= {
            BY_PARTS: first_hits_by_score(parts_MM, hash_N[first]),
            COMBINED: first_hits_by_score(both_MM, hash_N[first]),
        }
    return found


def nearest_reports(pairs: Pairs, title: str) -> Figure:
    """Some films, each with the ``SHOWN_REPORTS`` nearest reports."""
    texts = [" ".join(f"{text}." for text in pairs.text_n[pairs.study_of_n == i]) for i in range(len(pairs.study_N))]
    films = pairs.film_MHW[:SAMPLES]
    similarity_MN = pairs.image_ND[: len(films)] @ pairs.report_ND.T
    retrieved = [[texts[index] for index in row[:SHOWN_REPORTS]] for row in np.argsort(-similarity_MN, axis=1)]
    return nearest(title, films, retrieved, texts[: len(films)])


def _tensors(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    image_ND, report_ND, hash_N = pairs.image_ND, pairs.report_ND, pairs.report_hash_N
    return torch.from_numpy(image_ND), torch.from_numpy(report_ND), torch.from_numpy(hash_N)


class Retrieval(Task):
    """Recall in both directions on the split of the corpus in `evaluate.split`."""

    reads = "pairs"
    least_studies = min(DEPTHS) + 1

    def scores(self, inputs: Inputs) -> list[Score]:
        assert inputs.pairs is not None
        own = inputs.settings
        return retrieval_scores(
            inputs.pairs, inputs.encoder.name, inputs.set_name, own.resamples, own.seed, inputs.shown
        )


TASK = Retrieval()
