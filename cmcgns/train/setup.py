"""A pretraining run before it starts: corpus, vocabulary, schedule and run folder, validated together."""

import hashlib
import itertools
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from cmcgns import storage
from cmcgns.bad_rows import too_many_bad
from cmcgns.cli import to_yaml
from cmcgns.config import Config
from cmcgns.data.image import Target
from cmcgns.data.order import Arrangement
from cmcgns.data.readers import Reader, Source, open_index
from cmcgns.data.record import StudyIndex
from cmcgns.data.reports import ParsedReport
from cmcgns.data.tokenizer import ReportTokenizer, load_tokenizer, train_tokenizer
from cmcgns.errors import BadRow, UserError
from cmcgns.faiss_install import check_faiss
from cmcgns.models.presets import TEXT_PRESETS
from cmcgns.plugins import absolute_plugin
from cmcgns.run_folder import RunFolder, name_taken, open_folder, refuse_changes
from cmcgns.train.schedule import Schedule, build_schedule

FETCH_THREADS = 16


@dataclass(frozen=True)
class Corpus:
    """A corpus, indexed."""

    source: Source
    index: StudyIndex
    train: pa.Table
    train_arrangement: Arrangement
    valid: pa.Table
    valid_arrangement: Arrangement

    @property
    def studies(self) -> int:
        """Training and validation studies, those included that could not be used at first sight."""
        return len(self.train) + len(self.valid) + len(self.index.bad_rows)

    @property
    def bad_rows(self) -> dict[str, str]:
        """Reason by study that could not be used at first sight."""
        return {row["source"]: row["reason"] for row in self.index.bad_rows}

    @property
    def digest(self) -> str:
        """Hash of the studies and their order, by which a resumed run knows its corpus."""
        text = "\n".join(itertools.chain(self.train["study_id"].to_pylist(), self.valid["study_id"].to_pylist()))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def open_corpus(config: Config) -> Corpus:
    """The corpus of ``config.data``, with the splits that training reads."""
    data = config.data
    source, index = open_index("data.uri", data, Target(data.resize, "longer"))
    train, train_arrangement = source.arrange(index.split("train"), data.group_studies)
    valid, valid_arrangement = source.arrange(index.split("valid"), data.group_studies)
    most = data.validation_studies
    corpus = Corpus(source, index, train, train_arrangement, valid.slice(0, most), valid_arrangement.first(most))
    complaint = too_many_bad(len(corpus.bad_rows), corpus.studies, data.max_bad_fraction, corpus.bad_rows.values())
    if complaint is not None:
        raise UserError(f"data.uri {data.uri}: {complaint}. Mend them, or raise data.max_bad_fraction")
    if not len(corpus.train) or not len(corpus.valid):
        raise UserError(
            f"data.uri {data.uri} has {len(corpus.train)} training and {len(corpus.valid)} validation studies after "
            f"filtering views {', '.join(data.views)} ({sum(index.filtered.values())} films left out); both are needed"
        )
    return corpus


@dataclass(frozen=True)
class ReportSample:
    """Training reports that were read before the run."""

    reports: list[ParsedReport]
    of: int
    """Training studies in all."""

    @property
    def sentences(self) -> int:
        """Training sentences, scaled up where only a part was read."""
        held = sum(len(report.sentences) for report in self.reports)
        return held * self.of // max(min(len(self.reports), self.of), 1)


def sample_reports(corpus: Corpus, most: int) -> ReportSample:
    """The first ``most`` training reports that can be used."""
    reports: list[ParsedReport] = []
    with ThreadPoolExecutor(FETCH_THREADS) as threads:
        for batch in corpus.train.slice(0, most).to_batches(max_chunksize=1024):
            studies = batch.to_pylist()
            reader = corpus.source.reader([study["films"][0]["path"] for study in studies], films=False)
            found = threads.map(partial(_parsed, reader), studies)
            reports += [report for report in found if report is not None]
    return ReportSample(reports, len(corpus.train))


def _parsed(reader: Reader, study: dict[str, Any]) -> ParsedReport | None:
    try:
        return reader.read_sentences(study, study["films"][0]["path"])
    except BadRow:
        return None  # recorded when training meets it


def make_tokenizer(config: Config, sample: ReportSample) -> ReportTokenizer:
    """The tokenizer of ``config.model``; trained on ``sample`` where the text encoder is a preset."""
    model, limits = config.model, (config.data.max_tokens, config.data.max_sentences)
    if model.tokenizer != "auto" or model.text_encoder not in TEXT_PRESETS:
        return load_tokenizer(model.tokenizer, model.text_encoder, *limits)
    sentences = (sentence for report in sample.reports for sentence in report.sentences)
    return train_tokenizer(sentences, model.vocabulary_size, *limits)


def check_sizes(config: Config, corpus: Corpus, sentences: int) -> None:
    """Refuse settings that this corpus cannot carry, with the numbers."""
    for bank in config.banks:
        clusters, rows = bank.num_clusters, sentences if bank.per_sentence else len(corpus.train)
        if 4 * clusters > rows:
            raise UserError(
                f"{bank.setting} {clusters} needs at least 4 x {clusters} = {4 * clusters} training "
                f"{'sentences' if bank.per_sentence else 'studies'}; the corpus has {rows}, enough for {rows // 4}"
            )
    if config.train.global_batch_size > len(corpus.train):
        raise UserError(
            f"train.global_batch_size {config.train.global_batch_size} is larger than the corpus's "
            f"{len(corpus.train)} training studies"
        )


AnyConfig = TypeVar("AnyConfig", bound=Config)
FREE_TO_CHANGE = {
    "data": {"uri", "window_size", "cpus_per_task", "studies_ahead", "max_bad_fraction"},
    "clustering": {"actors", "cpus_per_actor", "gpus_per_actor", "device"},
    "train": {
        "num_workers", "cpus_per_worker", "threads_per_worker", "use_gpu", "engine", "zero_stage", "microbatch_size",
        "activation_checkpointing", "placement", "overlap_comm",
        "log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "max_failures",
    },
    "run": {"name", "storage", "resume"},
}  # fmt: skip
"""Settings that a resumed run may be given anew; all others decide what is learnt."""


def with_absolute_paths(config: AnyConfig) -> AnyConfig:
    """``config`` with local folders made absolute: workers and data tasks start in other folders than the driver."""
    data, model = config.data, config.model
    uri = data.uri
    if not (storage.is_s3(uri) or "://" in uri or uri.split(":")[0] == "phantom"):
        uri = str(Path(uri).expanduser().absolute())
    given = {name: getattr(model, name) for name in ("image_encoder", "text_encoder", "tokenizer")}
    folders = {
        name: str(Path(value).absolute()) if Path(value).is_dir() else absolute_plugin(value)
        for name, value in given.items()
    }
    return config.model_copy(
        update={
            "data": data.model_copy(update={"uri": uri, "format": absolute_plugin(data.format)}),
            "model": model.model_copy(update=folders),
            "clustering": config.clustering.model_copy(
                update={"clusterer": absolute_plugin(config.clustering.clusterer)}
            ),
            "method": config.method.model_copy(update={"name": absolute_plugin(config.method.name)}),
        }
    )


def write_tokenizer(folder: RunFolder, tokenizer: ReportTokenizer) -> None:
    """Keep the vocabulary, which a resumed run must share."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(Path(scratch))
        storage.upload_folder(Path(scratch), folder.file("tokenizer"))


def read_tokenizer(folder: RunFolder, config: Config) -> ReportTokenizer:
    """The vocabulary that the run began with."""
    with tempfile.TemporaryDirectory() as scratch:
        storage.download_folder(folder.file("tokenizer"), Path(scratch))
        return load_tokenizer(scratch, scratch, config.data.max_tokens, config.data.max_sentences)


def write_start(folder: RunFolder, config: Config, corpus_digest: str, tokenizer: ReportTokenizer) -> None:
    """Write down what a new run starts with; check that a resumed one still has its corpus."""
    if not folder.resumed:
        if storage.exists(folder.file("config.yaml")):  # another run of that name began while this one looked around
            raise UserError(name_taken(folder))
        write_tokenizer(folder, tokenizer)
        write_corpus(folder, corpus_digest)
        # last: where it lies, everything lies that a resumed run needs
        storage.write_bytes(folder.file("config.yaml"), to_yaml(config).encode())
        return
    check_corpus(folder, config, corpus_digest)


def write_corpus(folder: RunFolder, corpus_digest: str) -> None:
    """Keep what ``check_corpus`` needs."""
    folder.write_json("corpus.json", {"digest": corpus_digest})


def check_corpus(folder: RunFolder, config: Config, corpus_digest: str, resume_key: str = "run.resume") -> None:
    """Refuse to go on with another corpus than the run, or the sweep, began with."""
    before = json.loads(storage.read_bytes(folder.file("corpus.json")))["digest"]
    if before != corpus_digest:
        raise UserError(
            f"{resume_key} {folder.name}: data.uri {config.data.uri} no longer holds the studies that it began with "
            f"({corpus_digest} instead of {before})"
        )


def latest_checkpoint(folder: RunFolder) -> str | None:
    """URI of the newest complete checkpoint in the folder."""
    names = [name for name in storage.list_folders(folder.uri) if name.startswith("checkpoint_")]
    found = [uri for name in sorted(names) if storage.exists(f"{(uri := folder.file(name))}/progress.json")]
    return found[-1] if found else None


@dataclass(frozen=True)
class PreparedCorpus:
    """What is made of a corpus before training, the same for all runs that share their settings of data and model."""

    corpus: Corpus
    sentences: int
    """Training sentences, about."""
    tokenizer: ReportTokenizer


@dataclass(frozen=True)
class Pretraining:
    """A run that may begin."""

    config: Config
    folder: RunFolder
    schedule: Schedule
    prepared: PreparedCorpus

    @property
    def corpus(self) -> Corpus:
        """The corpus, indexed."""
        return self.prepared.corpus

    @property
    def tokenizer(self) -> ReportTokenizer:
        """The vocabulary that the run begins or began with."""
        return self.prepared.tokenizer


def setup_pretraining(config: Config, prepared: PreparedCorpus | None = None) -> Pretraining:
    """The run of ``config``, new or resumed; ``prepared`` where another run has made them already.

    Raises:
        UserError: a setting that this machine, the run's folder or the corpus cannot carry.
    """
    config = with_absolute_paths(config)
    check_faiss(config.clustering.device)
    folder = open_folder(config.run, "pretrain")
    if folder.resumed:
        refuse_changes(config, folder, FREE_TO_CHANGE)
    made = prepared or prepare_corpus(config, folder if folder.resumed else None)
    schedule = build_schedule(config.train, len(made.corpus.train))
    check_sizes(config, made.corpus, made.sentences)
    return Pretraining(config, folder, schedule, made)


def prepare_corpus(config: Config, resumed: RunFolder | None = None) -> PreparedCorpus:
    """The corpus of ``config`` and its vocabulary, that of the run in ``resumed`` if there is one."""
    corpus = open_corpus(config)
    sample = sample_reports(corpus, config.model.vocabulary_reports)
    # vocabularies take their time: what the corpus cannot carry is told before
    build_schedule(config.train, len(corpus.train))
    check_sizes(config, corpus, sample.sentences)
    tokenizer = read_tokenizer(resumed, config) if resumed else make_tokenizer(config, sample)
    return PreparedCorpus(corpus, sample.sentences, tokenizer)
