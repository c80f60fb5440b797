"""False negatives that clusters find and miss, by the phantom's truth: films that show what a sentence of another report says.

n sentences of N studies, C findings, K centroids, D embedding.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from cmcgns import storage
from cmcgns.evaluate.embed import SentenceEmbedder
from cmcgns.evaluate.sentence_truth import SentenceTruth, sentence_truth
from cmcgns.library.runs import PretrainedRun
from cmcgns.phantom.findings import FINDINGS
from tests.evaluate.clusters import blocks_of_test_split, index_of_test_split, studies_of_test_split

Bools = npt.NDArray[np.bool_]


class Found(NamedTuple):
    """What clusters leave out, over pairs of a sentence and another study's film."""

    precision: float
    """Share of the pairs left out whose film shows what the sentence says."""
    recall: float
    """Share of such pairs that are left out."""
    base_rate: float
    """Share of such pairs among all: the precision of leaving out at random."""


def shows_too(texts: Sequence[str], shown_NC: Bools) -> tuple[Bools, npt.NDArray[np.int64]]:
    """Whether each film shows what each sentence says, (m, N), and the indices of the m sentences that name a finding.

    ``shown_NC``: the findings of each film. A negation is shown by a film without any of its findings; sides do not count.
    """
    rows, kept = [], []
    for index, text in enumerate(texts):
        truth = sentence_truth(text)
        if truth is None or not set(truth.finding.split("+")) <= set(FINDINGS):
            continue
        rows.append(_shown(truth, shown_NC))
        kept.append(index)
    return np.array(rows), np.array(kept)


def _shown(truth: SentenceTruth, shown_NC: Bools) -> Bools:
    columns = [FINDINGS.index(name) for name in truth.finding.split("+")]
    present_N: Bools = shown_NC[:, columns].any(1)
    return ~present_N if truth.negated else present_N


def found_by_clusters(
    cluster_n: npt.NDArray[np.int64], study_of_n: npt.NDArray[np.int64], texts: Sequence[str], shown_NC: Bools
) -> Found:
    """How well "its report has a sentence of the same cluster" says "its film shows it too"."""
    too_mN, kept_m = shows_too(texts, shown_NC)
    in_report_NK = np.zeros((len(shown_NC), int(cluster_n.max()) + 1), bool)
    in_report_NK[study_of_n, cluster_n] = True
    left_out_mN = in_report_NK[:, cluster_n[kept_m]].T
    other_mN = study_of_n[kept_m][:, None] != np.arange(len(shown_NC))
    both = float((left_out_mN & too_mN & other_mN).sum())
    left_out, too = float((left_out_mN & other_mN).sum()), float((too_mN & other_mN).sum())
    return Found(both / max(left_out, 1), both / max(too, 1), too / max(float(other_mN.sum()), 1))


def of_run(run: PretrainedRun) -> Found:
    """What the centroids of a finished run leave out among its test studies."""
    embed = SentenceEmbedder(run.load_model(), run.tokenizer, run.config, torch.device("cpu"))
    sentence_nD = np.concatenate([embed(block).sentence_nD for block in blocks_of_test_split(run)])
    labels = [dict(row["labels"]) for row in index_of_test_split(run)[1].to_pylist()]
    shown_NC = np.array([[label[name] > 0 for name in FINDINGS] for label in labels])
    studies = studies_of_test_split(run)
    assert len(studies) == len(labels)
    with tempfile.TemporaryDirectory() as scratch:
        storage.download_folder(run.export, Path(scratch))
        centroids_KD = load_file(Path(scratch) / "centroids.safetensors")["rows_KD"]
    study_of_n = np.repeat(np.arange(len(studies)), [len(study.sentences) for study in studies])
    texts = [text for study in studies for text in study.sentences]
    return found_by_clusters((sentence_nD @ centroids_KD.T).argmax(1), study_of_n, texts, shown_NC)
