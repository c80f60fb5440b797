"""The embed job: for each sentence its attended image features (z2) and its text embedding, as Parquet.

n sentences of a block of studies, S sentences of one study (padded), D embedding.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch
from rich.console import Console

from cmcgns import storage
from cmcgns.bad_rows import write_bad_rows
from cmcgns.cluster.coordinator import start_coordinator
from cmcgns.cluster.placement import bundles
from cmcgns.cluster.session import ONE_CPU
from cmcgns.config import Config
from cmcgns.data.batch import Batcher, ImageReportBatch
from cmcgns.data.image import Target
from cmcgns.data.manifest import SPLITS
from cmcgns.data.order import VALIDATION_EPOCH, Arrangement, one_after_the_other
from cmcgns.data.readers import Source, open_index
from cmcgns.data.record import Block, to_block
from cmcgns.data.stream import piece_studies, stream_split
from cmcgns.data.studies import ListedStudies
from cmcgns.data.tokenizer import ReportTokenizer
from cmcgns.errors import UserError, cause
from cmcgns.evaluate.config import EmbedConfig, EmbedJobConfig
from cmcgns.job import Job, check_capacity
from cmcgns.library.runs import PretrainedRun, open_model, open_run
from cmcgns.methods.base import SentenceAttention, load_method
from cmcgns.models.attention import unit
from cmcgns.models.device import autocast, device_of
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.run_folder import open_folder, write_config
from cmcgns.train.setup import with_absolute_paths

FloatArray = npt.NDArray[np.float32]


class SentenceVectors(NamedTuple):
    """Vectors of all sentences of a block, study by study; rows of length 1."""

    study_n: npt.NDArray[np.int64]
    """Index of each sentence's study in the block."""
    number_n: npt.NDArray[np.int64]
    """Index of the sentence in its report."""
    attended_nD: FloatArray
    """Features that the sentence attends to on its study's film, as clustered in pretraining; without attention the sentence
    embedding."""
    sentence_nD: FloatArray
    """Sentence embedding: the mean of the sentence's tokens."""


class Embedder:
    """The model with its batches; films are center-cropped, without random augmentation."""

    def __init__(
        self,
        model: DualEncoder,
        tokenizer: ReportTokenizer,
        config: Config,
        device: torch.device,
        precision: str = "fp32",
    ) -> None:
        self.model, self.device, self.precision = model.to(device).eval(), device, precision
        self.method = load_method(config)
        words = self.method.continuations(tokenizer)
        self.batcher = Batcher(config, tokenizer.pad_id, device, continues_V=words)

    @torch.inference_mode()
    def outputs(self, block: Block) -> tuple[ImageReportBatch, Any]:
        """The block as a batch, and what the model makes of it."""
        batch = self.batcher(block, (int(block.sentence_counts.sum()),), training=False)
        with autocast(self.device, self.precision):
            return batch, self.model(batch)

    @torch.inference_mode()
    def attention(self, outputs: Any) -> SentenceAttention | None:
        """What each sentence of ``outputs`` attends to; None without attention."""
        with autocast(self.device, self.precision):
            return self.method.attention(self.model, outputs)


class SentenceEmbedder(Embedder):
    """Computes ``SentenceVectors`` of blocks of studies."""

    @torch.inference_mode()
    def __call__(self, block: Block) -> SentenceVectors:
        counts_B = block.sentence_counts
        batch, outputs = self.outputs(block)
        attention = self.attention(outputs)
        rows = lambda values_BSD: unit(values_BSD.flatten(0, 1)[batch.sentence_row_n].float()).cpu().numpy()
        return SentenceVectors(
            np.repeat(np.arange(len(block)), counts_B),
            np.concatenate([np.arange(count) for count in counts_B]),
            rows(outputs.sentences_BSD if attention is None else attention.attended_BSD),
            rows(outputs.sentences_BSD),
        )


def sentence_table(vectors: SentenceVectors, study_ids: list[str], texts: pa.Array) -> pa.Table:
    """Columns id (``study/number``), study_id, text, vector (attended features) and sentence_vector, one row per sentence;
    ``study_ids`` and ``texts`` are the block's studies and sentences."""
    ids = [study_ids[index] for index in vectors.study_n]
    dim = vectors.attended_nD.shape[1]
    column = lambda rows_nD: pa.FixedSizeListArray.from_arrays(pa.array(rows_nD.ravel()), dim)
    return pa.table(
        {
            "id": [f"{study}/{number}" for study, number in zip(ids, vectors.number_n, strict=True)],
            "study_id": ids,
            "text": texts,
            "vector": column(vectors.attended_nD),
            "sentence_vector": column(vectors.sentence_nD),
        }
    )


STUDIES_AHEAD = 512
"""Decoded studies that may wait for the model."""
ROWS_PER_FILE = 50_000


@dataclass(frozen=True)
class Split:
    """The studies to embed, and the settings with which they are read."""

    config: Config
    source: Source
    studies: pa.Table
    arrangement: Arrangement

    @property
    def listed(self) -> ListedStudies:
        """The studies as a stream takes them."""
        return ListedStudies(self.source, self.studies, self.arrangement)


class EmbedRows(ABC):
    """A Ray Data actor with the model: takes stream rows with text, returns ``table``."""

    embedder: type[Embedder] = Embedder

    def __init__(self, uri: str, studies: Any, settings: EmbedConfig) -> None:
        torch.set_num_threads(max(int(settings.cpus_per_worker), 1))
        run = open_model("embed.run", uri, settings.trusted)
        self.studies, self.settings, self.resize = ray.get(studies), settings, run.config.data.resize
        device = device_of(settings.use_gpu)
        self.embed: Any = self.embedder(run.load_model(), run.tokenizer, run.config, device, settings.precision)

    def __call__(self, rows: pa.Table) -> pa.Table:
        rows = rows.combine_chunks()
        block = to_block(rows, self.resize)
        return self.table(block, self.studies.take(block.positions), rows["sentences"].chunk(0))

    @abstractmethod
    def table(self, block: Block, studies: pa.Table, sentences: pa.ListArray) -> pa.Table:
        """What is kept of a block; ``studies`` are the index rows and ``sentences`` the texts of its studies."""


class EmbedSentences(EmbedRows):
    """Takes studies, returns their sentences."""

    embedder = SentenceEmbedder

    def table(self, block: Block, studies: pa.Table, sentences: pa.ListArray) -> pa.Table:
        return sentence_table(self.embed(block), studies["study_id"].to_pylist(), sentences.flatten())


class EmbedJob(Job):
    """Embeds all sentences of a split with a trained model."""

    script = "embed"
    resume_key = ""
    packages = ("cmcgns", "ray", "torch", "transformers", "pyarrow")

    def __init__(self, config: EmbedJobConfig) -> None:
        self.config, self.settings = config, config.embed
        self.model_run = open_run("embed.run", self.settings.run, self.settings.trusted)
        self.split = open_split(self.model_run, self.settings)
        self.folder = open_folder(config.run, "embed", resume_key="")
        self.coordinator: Any = None

    def needed(self) -> list[dict[str, float]]:
        own = self.settings
        return [*bundles(own.workers, own.cpus_per_worker, own.use_gpu), ONE_CPU]

    def check_cluster(self, cpus: float) -> None:
        own = self.settings
        check_capacity("embed", "worker", own.workers, own.cpus_per_worker, own.use_gpu, kept=1)

    def plan(self, cpus: float) -> dict[str, str]:
        settings, method = self.settings, self.model_run.method
        vector = (
            "what each sentence attends to on its film"
            if method.has_attention
            else (f"the sentence embedding ({self.model_run.config.method.name} attends to no patches)")
        )
        return {
            "embed": f"{self.folder.name} in {self.folder.storage}",
            "model": self.model_run.export,
            "studies": f"{len(self.split.studies)} of {self.split.config.data.uri} ({settings.split})",
            "vector": vector,
            "workers": f"{settings.workers} x {settings.cpus_per_worker:g} CPU{' + GPU' if settings.use_gpu else ''}, "
            f"{settings.batch_size} studies a forward; the cluster has {cpus:g} CPUs",
        }

    def run(self, terminal: Console) -> dict[str, Any]:
        split, began = self.split, time.perf_counter()
        self.coordinator = start_coordinator(len(split.studies), split.config.data.max_bad_fraction, {})
        write_config(self.folder, self.config)
        try:
            write_sentences(self.model_run, self.settings, split, self.coordinator, self.folder.file("sentences"))
        except BaseException as error:
            # an incomplete set could be mistaken for a complete one
            storage.delete_folder(self.folder.file("sentences"))
            if isinstance(error, UserError):  # the run has started: it fails, and its folder says so
                raise RuntimeError(str(error)) from error
            raise
        return {"seconds": round(time.perf_counter() - began, 1)}

    def reason(self, error: Exception) -> str:
        failure = None if self.coordinator is None else ray.get(self.coordinator.failure.remote())
        return failure or cause(error)

    def write_result(self, result: dict[str, Any]) -> None:
        if self.coordinator is not None:
            bad_rows = ray.get(self.coordinator.account.remote())["bad_rows"]
            write_bad_rows(self.folder.uri, bad_rows)
            result |= {"studies": len(self.split.studies) - len(bad_rows), "bad_rows": len(bad_rows)}
        super().write_result(result)

    def summary(self, result: dict[str, Any]) -> dict[str, str]:
        return {
            "finished": f"{result['studies']} studies, {result['bad_rows']} bad rows, {result['seconds']} s",
            "sentences": self.folder.file("sentences"),
        }


def open_split(run: PretrainedRun, settings: EmbedConfig, job: str = "embed") -> Split:
    """The studies of ``settings``, from the run's corpus or from ``embed.uri``; messages name the settings of ``job``."""
    data, key = run.config.data, f"{job}.run"
    if not data.reports:
        raise UserError(f"{key} {run.uri} was trained with data.reports false: there are no sentences to read")
    if settings.uri is not None:
        other: dict[str, Any] = {"uri": settings.uri, "format": "auto", "columns": {}, "films": None}
        key, data = f"{job}.uri", data.model_copy(update=other)
    config = with_absolute_paths(run.config.model_copy(update={"data": data}))
    source, index = open_index(key, config.data, Target(config.data.resize, "longer"))
    names = SPLITS if settings.split == "all" else (settings.split,)
    arranged = [source.arrange(studies, data.group_studies) for studies in map(index.split, names) if len(studies)]
    if not arranged:
        raise UserError(
            f"{job}.split {settings.split}: {data.uri} has no study in it, {len(index.table)} in all splits; give another split"
        )
    studies = pa.concat_tables([part for part, _ in arranged])
    arrangement = one_after_the_other([part for _, part in arranged], data.groups_per_window)
    return Split(
        config, source, studies.slice(0, settings.studies).combine_chunks(), arrangement.first(settings.studies)
    )


def write_sentences(run: PretrainedRun, settings: EmbedConfig, split: Split, coordinator: Any, uri: str) -> None:
    """Write all sentences as Parquet files under ``uri``; the order of the files has no meaning."""
    files, path = storage.lasting_filesystem(uri)
    with embedded(EmbedSentences, run, settings, split, coordinator, split.studies.select(["study_id"])) as sentences:
        sentences.write_parquet(path, filesystem=files, min_rows_per_file=ROWS_PER_FILE)


@contextmanager
def embedded(
    actor: type[EmbedRows], run: PretrainedRun, settings: EmbedConfig, split: Split, coordinator: Any, studies: pa.Table,
    position: int = 0,
) -> Iterator[Any]:  # fmt: skip
    """A Ray dataset of what ``actor`` makes of the split from ``position`` on, in order, to be consumed within the block.

    ``studies``: the columns of the split that the actor needs.
    """
    data = split.config.data
    ahead = STUDIES_AHEAD + 2 * piece_studies(split.source, data, len(split.studies))
    stream = stream_split(split.listed, run.tokenizer, data, coordinator, studies_ahead=ahead, with_text=True)
    with stream.context():
        yield stream.rows(VALIDATION_EPOCH, position).map_batches(
            actor,
            batch_format="pyarrow",
            batch_size=settings.batch_size,
            fn_constructor_args=(run.uri, ray.put(studies), settings),
            compute=ray.data.ActorPoolStrategy(size=settings.workers),
            num_cpus=settings.cpus_per_worker,
            num_gpus=1 if settings.use_gpu else 0,
        )
