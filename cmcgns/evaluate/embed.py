"""Sentences as a trained model sees them: what it finds on the film where a sentence looks (z2), and the words' own vector.

n sentences of a block of studies, S sentences of one study (padded), D embedding.
"""

import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch
from rich.console import Console

from cmcgns import storage
from cmcgns.bad_rows import write_bad_rows
from cmcgns.cli import STATUS_FAILED, STATUS_INTERRUPTED, to_yaml
from cmcgns.cluster.coordinator import start_coordinator
from cmcgns.cluster.placement import bundles
from cmcgns.cluster.session import ONE_CPU, ray_session
from cmcgns.config import Config
from cmcgns.data.batch import Batcher
from cmcgns.data.image import Target
from cmcgns.data.order import VALIDATION_EPOCH, Arrangement
from cmcgns.data.readers import Source, open_index
from cmcgns.data.record import Block, to_block
from cmcgns.data.stream import piece_studies, stream_split
from cmcgns.data.tokenizer import ReportTokenizer
from cmcgns.errors import UserError, cause
from cmcgns.evaluate.config import EmbedConfig, EmbedJobConfig
from cmcgns.evaluate.encoders import PretrainedRun, open_run
from cmcgns.methods.base import load_method
from cmcgns.models.attention import unit
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.run_folder import RunFolder, open_folder, warn_of_passing_folder
from cmcgns.terminal import console, print_plan, quiet_terminal
from cmcgns.train.setup import with_absolute_paths

FloatArray = npt.NDArray[np.float32]


class SentenceVectors(NamedTuple):
    """All sentences of a block, study by study; rows of length 1."""

    study_n: npt.NDArray[np.int64]
    """Place of each sentence's study in the block."""
    number_n: npt.NDArray[np.int64]
    """Place of the sentence in its report."""
    attended_nD: FloatArray
    """What the sentence attends to on its study's film: the features that pretraining clusters. For a method without attention
    the sentence embedding."""
    sentence_nD: FloatArray
    """The mean of the sentence's tokens."""


class SentenceEmbedder:
    """A model that turns blocks of studies into ``SentenceVectors``; films are cropped at the middle, nothing is drawn."""

    def __init__(self, model: DualEncoder, tokenizer: ReportTokenizer, config: Config, device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.method, self.batcher = load_method(config), Batcher(config, tokenizer.pad_id, device)

    @torch.inference_mode()
    def __call__(self, block: Block) -> SentenceVectors:
        counts_B = block.sentence_counts
        batch = self.batcher(block, (int(counts_B.sum()),), training=False)
        outputs = self.model(batch)
        looks = self.method.attention(self.model, outputs)
        rows = lambda values_BSD: unit(values_BSD.flatten(0, 1)[batch.sentence_row_n].float()).cpu().numpy()
        return SentenceVectors(
            np.repeat(np.arange(len(block)), counts_B),
            np.concatenate([np.arange(count) for count in counts_B]),
            rows(outputs.sentences_BSD if looks is None else looks.attended_BSD),
            rows(outputs.sentences_BSD),
        )


def sentence_table(vectors: SentenceVectors, study_ids: list[str], texts: pa.Array) -> pa.Table:
    """Columns id (``study/number``), study_id, text, vector (attended features) and sentence_vector, one row a sentence;
    ``study_ids`` are those of the block, ``texts`` its sentences' words."""
    ids = [study_ids[place] for place in vectors.study_n]
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
PACKAGES = ("cmcgns", "ray", "torch", "transformers", "pyarrow")


@dataclass(frozen=True)
class Split:
    """The studies to embed, and the settings that they are read with."""

    config: Config
    source: Source
    studies: pa.Table
    arrangement: Arrangement


class EmbedRows:
    """A Ray Data actor that holds the model: studies in, sentences out."""

    def __init__(self, uri: str, study_ids: Any, settings: EmbedConfig) -> None:
        torch.set_num_threads(max(int(settings.cpus_per_worker), 1))
        run = open_run("embed.run", uri)
        self.study_ids = ray.get(study_ids)
        self.resize = run.config.data.resize
        device = torch.device("cuda" if settings.use_gpu else "cpu")
        self.embed = SentenceEmbedder(run.load_model(), run.tokenizer, run.config, device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        rows = rows.combine_chunks()
        block, texts = to_block(rows, self.resize), rows["sentences"].chunk(0).flatten()
        return sentence_table(self.embed(block), self.study_ids.take(block.positions).to_pylist(), texts)


def embed_sentences(config: EmbedJobConfig) -> int:
    """Exit status of one embedding: 0 finished, 1 failed, 130 stopped by the user."""
    terminal, settings = console(), config.embed
    run = open_run("embed.run", settings.run)
    split = open_split(run, settings)
    folder = open_folder(config.run, "embed", resume_key="")
    workers = bundles(settings.workers, settings.cpus_per_worker, settings.use_gpu)
    with quiet_terminal(), ray_session(needed=[*workers, ONE_CPU]) as cpus:
        check_capacity(settings, cpus)
        print_plan(terminal, describe_plan(run, settings, folder, split, cpus))
        warn_of_passing_folder(terminal, folder)
        storage.write_bytes(folder.file("config.yaml"), to_yaml(config).encode())
        began = time.perf_counter()
        coordinator = start_coordinator(len(split.studies), split.config.data.max_bad_fraction, {})
        try:
            write_sentences(run, settings, split, coordinator, folder.file("sentences"))
            result: dict[str, Any] = {"status": "finished"}
        except KeyboardInterrupt:
            result = {"status": "stopped"}
        except Exception as error:  # whatever Ray Data wraps a task's error in
            reason = ray.get(coordinator.failure.remote()) or cause(error)
            result = {"status": "failed", "failure": reason}
        if result["status"] != "finished":
            storage.delete_folder(folder.file("sentences"))  # a part might be taken for the whole
        bad_rows = ray.get(coordinator.account.remote())["bad_rows"]
        write_bad_rows(folder.uri, bad_rows)
        counts = {"studies": len(split.studies) - len(bad_rows), "bad_rows": len(bad_rows)}
        seconds = {"seconds": round(time.perf_counter() - began, 1)}
        return conclude(terminal, folder, result | counts | seconds)


def open_split(run: PretrainedRun, settings: EmbedConfig) -> Split:
    """The studies that ``settings`` asks for, out of the run's corpus or the one that it names."""
    data, key = run.config.data, "embed.run"
    if settings.uri is not None:
        key, data = "embed.uri", data.model_copy(update={"uri": settings.uri, "format": "auto"})
    config = with_absolute_paths(run.config.model_copy(update={"data": data}))
    source, index = open_index(key, config.data, Target(config.data.resize, "longer"))
    studies = index.split(settings.split)
    if not len(studies):
        raise UserError(
            f"embed.split {settings.split}: {data.uri} has no study in it; its index has {len(index.table)}"
        )
    studies, arrangement = source.arrange(studies, config.data.group_studies)
    return Split(
        config, source, studies.slice(0, settings.studies).combine_chunks(), arrangement.first(settings.studies)
    )


def check_capacity(settings: EmbedConfig, cpus: float) -> None:
    """Refuse what would leave Ray Data without a CPU, with the numbers."""
    wanted = settings.workers * settings.cpus_per_worker
    if wanted > cpus - 1:
        raise UserError(
            f"embed.workers {settings.workers} of {settings.cpus_per_worker:g} CPUs need {wanted:g}; the cluster has "
            f"{cpus:g} and one is kept for data. Lower embed.workers or embed.cpus_per_worker"
        )
    gpus = float(ray.cluster_resources().get("GPU", 0))
    if settings.use_gpu and settings.workers > gpus:
        raise UserError(
            f"embed.workers {settings.workers} need as many GPUs; the cluster has {gpus:g}. See embed.use_gpu"
        )


def write_sentences(run: PretrainedRun, settings: EmbedConfig, split: Split, coordinator: Any, uri: str) -> None:
    """Parquet files of all sentences under ``uri``; which file comes first says nothing."""
    stream = stream_split(
        split.source,
        split.studies,
        split.arrangement,
        run.tokenizer,
        split.config.data,
        coordinator,
        studies_ahead=STUDIES_AHEAD + 2 * piece_studies(split.source, split.config.data, len(split.studies)),
        with_text=True,
    )
    files, path = storage.filesystem(uri)
    with stream.context():
        sentences = stream.rows(VALIDATION_EPOCH, 0).map_batches(
            EmbedRows,
            batch_format="pyarrow",
            batch_size=settings.batch_size,
            fn_constructor_args=(run.uri, ray.put(split.studies["study_id"]), settings),
            compute=ray.data.ActorPoolStrategy(size=settings.workers),
            num_cpus=settings.cpus_per_worker,
            num_gpus=1 if settings.use_gpu else 0,
        )
        sentences.write_parquet(path, filesystem=files, min_rows_per_file=ROWS_PER_FILE)


def describe_plan(
    run: PretrainedRun, settings: EmbedConfig, folder: RunFolder, split: Split, cpus: float
) -> dict[str, str]:
    """What runs where, for the user."""
    return {
        "embed": f"{folder.name} in {folder.storage}",
        "model": run.export,
        "studies": f"{len(split.studies)} of {split.config.data.uri} ({settings.split})",
        "workers": f"{settings.workers} x {settings.cpus_per_worker:g} CPU{' + GPU' if settings.use_gpu else ''}, "
        f"{settings.batch_size} studies a forward; the cluster has {cpus:g} CPUs",
    }


def conclude(terminal: Console, folder: RunFolder, result: dict[str, Any]) -> int:
    """Write result.json, say where everything is; the exit status."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    folder.write_json("result.json", result | {"versions": versions})
    if result["status"] == "finished":
        print_plan(
            terminal,
            {
                "finished": f"{result['studies']} studies, {result['bad_rows']} bad rows, {result['seconds']} s",
                "sentences": folder.file("sentences"),
            },
        )
        return 0
    terminal.print(result.get("failure", "stopped"), style="red", highlight=False, markup=False)
    return STATUS_FAILED if result["status"] == "failed" else STATUS_INTERRUPTED
