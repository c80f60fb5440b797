"""Agreement of clusters of sentence features with the findings in the phantom's sentences."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from sklearn.metrics import adjusted_mutual_info_score

from cmcgns.clustering.kmeans import Array
from cmcgns.data.image import Target
from cmcgns.data.order import VALIDATION_EPOCH, drawn_image
from cmcgns.data.readers import Source, open_index
from cmcgns.data.record import Block, StreamStudy, stream_table, to_block
from cmcgns.data.stream import Stream, read_study
from cmcgns.evaluate.embed import SentenceEmbedder
from cmcgns.evaluate.tasks.clusters import by_chance, purity, sentence_classes
from cmcgns.library.runs import PretrainedRun
from cmcgns.methods.cm_cgns.model import CmCgnsModel

BATCH = 32


class Agreement(NamedTuple):
    """Agreement of clusters and classes."""

    mutual_information: float
    """Adjusted for chance: 0 for random clusters, 1 for the classes themselves."""
    purity: float
    """Fraction of the sentences that belong to the most common class of their cluster."""
    purity_by_chance: float
    """The same with classes shuffled over the sentences."""


def agreement(cluster_n: Array, texts: Sequence[str]) -> Agreement:
    """Clusters and classes (finding, laterality, negated) of the sentences that name a finding."""
    class_n, kept_n = sentence_classes(texts)
    cluster_n, class_n = np.asarray(cluster_n)[kept_n], class_n[kept_n]
    return Agreement(
        float(adjusted_mutual_info_score(class_n, cluster_n)),
        purity(cluster_n, class_n),
        by_chance(purity, cluster_n, class_n),
    )


def attended(run: PretrainedRun, model: CmCgnsModel, shift: int = 0) -> npt.NDArray[np.float32]:
    """Attended features of the run's test split under ``model``, each report with the film of the study ``shift`` on."""
    blocks = blocks_of_test_split(run)
    films_NRR = np.roll(np.concatenate([block.images_BRR for block in blocks]), shift, axis=0)
    embed = SentenceEmbedder(model, run.tokenizer, run.config, torch.device("cpu"))
    rows, first = [], 0
    for block in blocks:
        rows.append(embed(dataclasses.replace(block, images_BRR=films_NRR[first : first + len(block)])).attended_nD)
        first += len(block)
    return np.concatenate(rows)


def texts_of_test_split(run: PretrainedRun) -> list[str]:
    """The sentences behind the rows of ``attended``."""
    return [text for study in studies_of_test_split(run) for text in study.sentences]


def blocks_of_test_split(run: PretrainedRun) -> list[Block]:
    """The run's test split in order, read without Ray."""
    studies, resize = studies_of_test_split(run), run.config.data.resize
    table = stream_table(range(len(studies)), studies, resize)
    starts = range(0, len(table), BATCH)
    return [to_block(table.slice(start, BATCH).combine_chunks(), resize) for start in starts]


def index_of_test_split(run: PretrainedRun) -> tuple[Source, pa.Table]:
    """The corpus, and the rows of the split in order."""
    data = run.config.data
    source, index = open_index("data.uri", data, Target(data.resize, "longer"))
    return source, source.arrange(index.split("test"), data.group_studies)[0]


def studies_of_test_split(run: PretrainedRun) -> list[StreamStudy]:
    """The studies of the split as its stream reads them."""
    data = run.config.data
    source, table = index_of_test_split(run)
    stream = Stream(source, None, len(table), run.tokenizer, data, None)
    found = []
    for study in table.to_pylist():
        shown = drawn_image(data.seed, VALIDATION_EPOCH, study["study_id"], len(study["films"]))
        found.append(read_study(study, shown, source.reader([]), stream, VALIDATION_EPOCH))
    return [study for study in found if isinstance(study, StreamStudy)]
