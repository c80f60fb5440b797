"""Embeddings of a split of a run's corpus: films with their reports, and sentences with their attention on the film.

N studies, M of them compared by parts, n sentences of all, P patches, D embedding.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from cmcgns.cluster.coordinator import start_coordinator
from cmcgns.data.order import VALIDATION_EPOCH, drawn_image
from cmcgns.data.record import to_block
from cmcgns.data.stream import stream_split
from cmcgns.errors import UserError
from cmcgns.evaluate.config import EmbedConfig
from cmcgns.evaluate.embed import STUDIES_AHEAD, Embedder, Split, open_split
from cmcgns.evaluate.films import center_crop
from cmcgns.library.runs import PretrainedRun
from cmcgns.methods.base import ComparesParts, SentenceAttention
from cmcgns.methods.parts import CollectedParts
from cmcgns.models.attention import unit
from cmcgns.models.device import CPU, unit_rows
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.models.retrieval import centred, mean_over_sentences

Floats = NDArray[np.float32]
FILMS = 64
PART_STUDIES = 2048
"""Studies that are compared by parts, whose patches have to fit into memory."""
SplitName = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class Pairs:
    """A model's embeddings of a split, in its order, without unusable studies."""

    study_N: NDArray[Any]
    """Id of each study."""
    group_N: NDArray[Any]
    """Group (patient) of each study; resamples draw whole groups."""
    path_N: NDArray[Any]
    """Path of the film that was embedded."""
    image_ND: Floats
    report_ND: Floats
    """Both of length 1."""
    report_hash_N: NDArray[np.int64]
    text_n: NDArray[Any]
    """Text of each sentence."""
    study_of_n: NDArray[np.int64]
    """Index of each sentence's study in the rows above."""
    attended_nD: Floats
    """Features that each sentence attends to on its film, of length 1; (n, 0) for a method without attention."""
    weight_nP: Floats
    """Attention weight of each patch; (n, 0) for a method without attention."""
    film_MHW: NDArray[np.uint8]
    """Films of the first ``FILMS`` studies, as seen by the model."""
    by_parts_MM: Floats | None = None
    """Centred scores by parts of the first ``PART_STUDIES`` reports (rows) on their films; None for a method without parts."""


@torch.inference_mode()
def embed_pairs(
    model: DualEncoder, run: PretrainedRun, split: SplitName, device: torch.device = CPU, precision: str = "fp32"
) -> Pairs:
    """Embeddings of ``split`` of the run's corpus by ``model`` on ``device``, with settings and vocabulary of ``run``."""
    source_split = open_split(run, EmbedConfig(run=run.uri, split=split), "evaluate")
    coordinator = start_coordinator(len(source_split.studies), source_split.config.data.max_bad_fraction, {})
    stream = stream_split(
        source_split.listed, run.tokenizer, source_split.config.data, coordinator,
        taken_cpus=1.0, studies_ahead=STUDIES_AHEAD, with_text=True,
    )  # fmt: skip
    embedder = Embedder(model, run.tokenizer, run.config, device, precision)
    blocks, held, parts = list[Pairs](), 0, CollectedParts(PART_STUDIES)
    with stream.context():
        tables = stream.rows(VALIDATION_EPOCH, 0).iter_batches(
            batch_size=run.config.train.microbatch_size, batch_format="pyarrow"
        )
        for table in tables:
            rows = table.combine_chunks()
            blocks.append(_block_pairs(embedder, rows, source_split, FILMS - held, parts))
            held += len(blocks[-1].film_MHW)
    if not blocks:
        raise UserError(f"{source_split.config.data.uri}: the {split} split has no usable study")
    pairs = _joined(blocks)
    return replace(pairs, by_parts_MM=_by_parts(run.method, parts)) if isinstance(run.method, ComparesParts) else pairs


def _by_parts(method: ComparesParts, collected: CollectedParts) -> Floats:
    """Centred scores of reports (rows) on films."""
    sentences, films, study_n = collected.joined()
    return centred(mean_over_sentences(method.part_scores(sentences, films), study_n, collected.studies)).cpu().numpy()


def _block_pairs(embedder: Embedder, table: pa.Table, split: Split, films: int, parts: CollectedParts) -> Pairs:
    """Embeddings of one block, with its first ``films`` films; its parts are added to ``parts``."""
    block, method = to_block(table, split.config.data.resize), embedder.method
    batch, outputs = embedder.outputs(block)
    if isinstance(method, ComparesParts) and not parts.is_full:
        parts.add(method.parts(outputs, batch), len(block))
    attention = embedder.attention(outputs) or SentenceAttention(*[outputs.sentences_BSD[..., :0]] * 2)
    real = lambda values_BSX: values_BSX.flatten(0, 1)[batch.sentence_row_n].float().cpu()
    studies = split.studies.take(block.positions)
    data = split.config.data
    shown = [
        study["films"][drawn_image(data.seed, VALIDATION_EPOCH, study["study_id"], len(study["films"]))]["path"]
        for study in studies.select(["study_id", "films"]).to_pylist()
    ]
    return Pairs(
        study_N=np.array(studies["study_id"].to_pylist(), object),
        group_N=np.array(studies["group"].to_pylist(), object),
        path_N=np.array(shown, object),
        image_ND=unit_rows(outputs.image_BD, embedder.precision),
        report_ND=unit_rows(outputs.report_BD, embedder.precision),
        report_hash_N=block.report_hashes.copy(),
        text_n=np.array(table["sentences"].chunk(0).flatten().to_pylist(), object),
        study_of_n=np.repeat(np.arange(len(block)), block.sentence_counts),
        attended_nD=unit(real(attention.attended_BSD)).numpy(),
        weight_nP=real(attention.weight_BSP).numpy(),
        film_MHW=center_crop(block.images_BRR[:films], data.image_size).copy(),
    )


def _joined(blocks: list[Pairs]) -> Pairs:
    """All blocks concatenated; ``study_of_n`` is shifted to the new rows."""
    starts = np.cumsum([0, *(len(block.study_N) for block in blocks[:-1])])
    moved = [replace(block, study_of_n=block.study_of_n + start) for block, start in zip(blocks, starts, strict=True)]
    return Pairs(
        **{
            field.name: np.concatenate([getattr(block, field.name) for block in moved])
            for field in fields(Pairs)
            if field.name != "by_parts_MM"
        }
    )
