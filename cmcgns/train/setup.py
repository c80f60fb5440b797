"""Setup of a pretraining run: corpus, vocabulary, schedule and run folder, validated together."""

import hashlib
import itertools
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cmcgns import storage
from cmcgns.bad_rows import too_many_bad
from cmcgns.config import Config
from cmcgns.config.sections import is_generated
from cmcgns.data.image import Target
from cmcgns.data.manifest import SPLITS
from cmcgns.data.readers import Reader, Source, open_splits
from cmcgns.data.reports import ParsedReport
from cmcgns.data.studies import Studies
from cmcgns.data.tokenizer import ReportTokenizer, load_tokenizer, train_tokenizer
from cmcgns.errors import BadRow, UserError
from cmcgns.faiss_install import check_faiss
from cmcgns.models.presets import TEXT_PRESETS
from cmcgns.plugins import absolute_plugin
from cmcgns.run_folder import RunFolder, name_taken, open_folder, refuse_changes, write_config
from cmcgns.train.loggers import check_loggers
from cmcgns.train.resume import find_checkpoint, list_checkpoints
from cmcgns.train.schedule import Schedule, build_schedule
from cmcgns.user_folders import check_extension_lock

FETCH_THREADS = 16


@dataclass(frozen=True)
class Corpus:
    """A corpus with its training and validation split."""

    source: Source
    train: Studies
    valid: Studies
    has_test: bool
    filtered: dict[str, int]
    """Films of other views by reason."""
    bad_rows: dict[str, str]
    """Reason for each study that the reader rejected while indexing."""

    @property
    def studies(self) -> int:
        """Training and validation studies, including those that the reader rejected while indexing."""
        return len(self.train) + len(self.valid) + len(self.bad_rows)

    @property
    def digest(self) -> str:
        """Hash of the studies and their order; a resumed run compares it."""
        return _hash(itertools.chain(self.train.identity(), self.valid.identity()))

    def listed_digest(self) -> str:
        """The digest as if the studies were listed; reads the index of the whole set."""
        return _hash(itertools.chain(self.train.ids(), self.valid.ids()))

    @property
    def record(self) -> dict[str, str]:
        """What a run records of its corpus: the digest, and of a prepared set the hash of its content."""
        content = getattr(self.source, "content_hash", None)
        return {"digest": self.digest} | ({"content_hash": content} if content else {})


def _hash(texts: Iterable[str]) -> str:
    """Hash of ``texts``, one a line."""
    digest, separator = hashlib.blake2b(digest_size=8), ""
    for text in texts:
        digest.update(f"{separator}{text}".encode())
        separator = "\n"
    return digest.hexdigest()


def open_corpus(config: Config) -> Corpus:
    """The corpus of ``config.data`` with its training and validation split."""
    data = config.data
    splits = open_splits("data.uri", data, Target(data.resize, "longer"), data.group_studies)
    bad_rows = {row["source"]: row["reason"] for row in splits.bad_rows}
    sizes = {split: len(splits.studies[split]) if split in splits.studies else 0 for split in SPLITS}
    valid = min(sizes["valid"], data.validation_studies or sizes["valid"])
    complaint = too_many_bad(
        len(bad_rows), sizes["train"] + valid + len(bad_rows), data.max_bad_fraction, bad_rows.values()
    )
    if complaint is not None:
        raise UserError(f"data.uri {data.uri}: {complaint}. Fix them, or raise data.max_bad_fraction")
    if not sizes["train"] or not sizes["valid"]:
        raise UserError(
            f"data.uri {data.uri} has {sizes['train']} training and {sizes['valid']} validation studies after "
            f"filtering views {', '.join(data.views)} ({sum(splits.filtered.values())} films excluded); both splits are needed. "
            "Check data.views and the corpus's own splits; drawn ones change with data.seed"
        )
    train, held_out = splits.studies["train"], splits.studies["valid"].first(data.validation_studies)
    return Corpus(splits.source, train, held_out, sizes["test"] > 0, splits.filtered, bad_rows)


@dataclass(frozen=True)
class ReportSample:
    """Training reports that are read before the run."""

    reports: list[ParsedReport]
    patients: list[str]
    """The group of each report: its patient unless the data say more."""
    of: int
    """Number of training studies in the corpus."""

    @property
    def sentences(self) -> int:
        """Training sentences; an estimate if only part of the reports was read."""
        sampled = sum(len(report.sentences) for report in self.reports)
        return sampled * self.of // max(min(len(self.reports), self.of), 1)


def sample_reports(corpus: Corpus, most: int) -> ReportSample:
    """The usable reports among the first ``most`` training studies."""
    reports: list[ParsedReport] = []
    patients: list[str] = []
    with ThreadPoolExecutor(FETCH_THREADS) as threads:
        for studies, reader_of in corpus.train.samples(most):
            reader = reader_of([study["films"][0]["path"] for study in studies])
            for study, report in zip(studies, threads.map(partial(_parse, reader), studies), strict=True):
                if report is not None:
                    reports.append(report)
                    patients.append(study["group"])
    return ReportSample(reports, patients, len(corpus.train))


def _parse(reader: Reader, study: dict[str, Any]) -> ParsedReport | None:
    try:
        return reader.read_sentences(study, study["films"][0]["path"])
    except BadRow:
        return None  # recorded when training reads it


def make_tokenizer(config: Config, sample: ReportSample) -> ReportTokenizer:
    """The tokenizer of ``config.model``; trained on ``sample`` if the text encoder is a preset."""
    model, limits = config.model, (config.data.max_tokens, config.data.max_sentences)
    if model.tokenizer != "auto" or model.text_encoder not in TEXT_PRESETS:
        if model.subwords:
            raise UserError(
                f"model.subwords needs a vocabulary that is trained on the corpus, but model.tokenizer {model.tokenizer} with "
                f"model.text_encoder {model.text_encoder} has one; remove model.subwords, or set model.tokenizer=auto and one of "
                f"{', '.join(TEXT_PRESETS)}"
            )
        return load_tokenizer(model.tokenizer, model.text_encoder, *limits)
    sentences = (
        (patient, sentence)
        for patient, report in zip(sample.patients, sample.reports, strict=True)
        for sentence in report.sentences
    )
    patients = 1 if is_generated(config.data.uri, config.data.format) else model.vocabulary_patients
    return train_tokenizer(sentences, model.vocabulary_size, *limits, patients, model.subwords)


def check_sizes(config: Config, corpus: Corpus, sentences: int) -> None:
    """Raise ``UserError`` with the numbers if the corpus is too small for the settings."""
    for bank in config.banks:
        clusters, rows = bank.num_clusters, sentences if bank.per_sentence else len(corpus.train)
        if 4 * clusters > rows:
            raise UserError(
                f"{bank.setting} {clusters} needs at least 4 x {clusters} = {4 * clusters} training "
                f"{'sentences' if bank.per_sentence else 'studies'}; the corpus has {rows}, enough for {rows // 4} clusters"
            )
    if config.train.global_batch_size > len(corpus.train):
        raise UserError(
            f"train.global_batch_size {config.train.global_batch_size} is larger than the corpus's "
            f"{len(corpus.train)} training studies; lower it"
        )


LABELLED = 65_536
"""Studies whose labels are looked at."""


def check_labels(config: Config, corpus: Corpus) -> None:
    """Raise ``UserError`` if the first training studies lack a label that the method learns from."""
    wanted = config.objective.learned_labels()
    if not wanted:
        return
    studies = itertools.chain.from_iterable(portion.studies for portion in corpus.train.samples(LABELLED))
    found = set(itertools.chain.from_iterable(dict(study["labels"] or ()) for study in studies))
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(
            f"objective.classes: no training study of data.uri {config.data.uri} has the label {' or '.join(missing)}; its "
            f"labels are: {', '.join(sorted(found)) or 'none'}"
        )


AnyConfig = TypeVar("AnyConfig", bound=Config)
FREE_TO_CHANGE = {
    "data": {"uri", "films", "window_size", "cpus_per_task", "studies_ahead", "max_bad_fraction"},
    "clustering": {"actors", "cpus_per_actor", "gpus_per_actor", "device"},
    "train": {
        "num_workers", "min_workers", "cpus_per_worker", "threads_per_worker", "use_gpu", "engine", "zero_stage",
        "microbatch_size", "activation_checkpointing", "placement", "overlap_comm", "deterministic", "tf32", "compile",
        "log_every", "validate_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "keep_best", "max_failures",
        "hang_timeout_s",
    },
    "run": {"name", "storage", "resume", "loggers"},
}  # fmt: skip
"""Settings that may change when a run is resumed; all others affect what is learned."""


def with_absolute_paths(config: AnyConfig) -> AnyConfig:
    """``config`` with absolute local paths: workers and data tasks run in other folders than the driver."""
    data, model = config.data, config.model
    uri = data.uri
    if not (storage.is_s3(uri) or "://" in uri or is_generated(uri, data.format)):
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
    """Store the vocabulary; a resumed run must use the same."""
    with storage.scratch_folder() as scratch:
        tokenizer.save(scratch)
        storage.upload_folder(scratch, folder.file("tokenizer"))


def read_tokenizer(folder: RunFolder, config: Config) -> ReportTokenizer:
    """The vocabulary that the run started with."""
    with storage.scratch_folder() as scratch:
        storage.download_folder(folder.file("tokenizer"), scratch)
        return load_tokenizer(str(scratch), str(scratch), config.data.max_tokens, config.data.max_sentences)


def write_start(folder: RunFolder, config: Config, corpus: Corpus, tokenizer: ReportTokenizer) -> None:
    """Write config, vocabulary and record of the corpus of a new run; check the corpus of a resumed one."""
    if not folder.resumed:
        if storage.exists(folder.file("config.yaml")):  # another run has taken the name meanwhile
            raise UserError(name_taken(folder))
        write_tokenizer(folder, tokenizer)
        write_corpus(folder, corpus)
        # last: if config.yaml exists, everything that a resumed run needs exists
        write_config(folder, config)
        return
    check_corpus(folder, config, corpus)


def write_corpus(folder: RunFolder, corpus: Corpus) -> None:
    """Store the record that ``check_corpus`` compares."""
    folder.write_json("corpus.json", corpus.record)


def check_corpus(folder: RunFolder, config: Config, corpus: Corpus, resume_key: str = "run.resume") -> None:
    """Raise ``UserError`` if the corpus is not the one that the run or sweep started with."""
    before, now = json.loads(storage.read_bytes(folder.file("corpus.json"))), corpus.record
    # a run on raw files, or of an earlier version, has listed them
    if before["digest"] != now["digest"] and before["digest"] != corpus.listed_digest():
        raise UserError(
            f"{resume_key} {folder.name}: data.uri {config.data.uri} no longer has the studies that the run started with "
            f"(digest {now['digest']} instead of {before['digest']}); restore them, or start a new run"
        )
    # a set may be prepared after the run has started from raw files, and a run of an earlier version has no hash
    if before.get("content_hash", now.get("content_hash")) != now.get("content_hash", before.get("content_hash")):
        raise UserError(
            f"{resume_key} {folder.name}: the prepared set {config.data.uri} has other films or reports than the run started "
            f"with (content hash {now['content_hash']} instead of {before['content_hash']}); restore it, or start a new run"
        )


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus with its vocabulary; runs with the same data and model settings can share it."""

    corpus: Corpus
    sentences: int
    """Approximate number of training sentences."""
    tokenizer: ReportTokenizer


@dataclass(frozen=True)
class Pretraining:
    """A validated run, ready to start."""

    config: Config
    folder: RunFolder
    schedule: Schedule
    prepared: PreparedCorpus
    checkpoint: str | None = None
    """Name of the verified checkpoint from which it resumes."""
    there_before: tuple[str, ...] = ()
    """Names of all checkpoints in the folder when it was set up."""

    @property
    def corpus(self) -> Corpus:
        """The indexed corpus."""
        return self.prepared.corpus

    @property
    def tokenizer(self) -> ReportTokenizer:
        """The vocabulary of the run."""
        return self.prepared.tokenizer


def setup_pretraining(config: Config, prepared: PreparedCorpus | None = None) -> Pretraining:
    """The run of ``config``, new or resumed; ``prepared`` is reused if another run has already made it.

    Raises:
        UserError: a setting does not fit this machine, the run folder or the corpus.
    """
    config = with_absolute_paths(config)
    check_loggers(config)
    if config.banks:
        check_faiss(config.clustering.device)
    if config.train.engine == "deepspeed" and config.train.zero_stage and not config.train.use_gpu:
        check_extension_lock()
    folder = open_folder(config.run, "pretrain")
    checkpoint = None
    there_before = tuple(list_checkpoints(folder)) if folder.resumed else ()
    if folder.resumed:
        refuse_changes(config, folder, FREE_TO_CHANGE)
        started: dict[str, Any] = yaml.safe_load(storage.read_bytes(folder.file("config.yaml")))
        every = started.get("train", {}).get("checkpoint_every", config.train.checkpoint_every)
        checkpoint = find_checkpoint(folder, every)
    made = prepared or prepare_corpus(config, folder if folder.resumed else None)
    schedule = build_schedule(config.train, len(made.corpus.train))
    check_sizes(config, made.corpus, made.sentences)
    return Pretraining(config, folder, schedule, made, checkpoint, there_before)


def prepare_corpus(config: Config, resumed: RunFolder | None = None) -> PreparedCorpus:
    """The corpus of ``config`` and its vocabulary; the vocabulary is read from ``resumed`` if given."""
    corpus = open_corpus(config)
    check_labels(config, corpus)
    sample = sample_reports(corpus, config.model.vocabulary_reports if config.data.reports else 0)
    # before the vocabulary, which takes a while to train: raises if the corpus is too small
    build_schedule(config.train, len(corpus.train))
    check_sizes(config, corpus, sample.sentences)
    tokenizer = read_tokenizer(resumed, config) if resumed else make_tokenizer(config, sample)
    return PreparedCorpus(corpus, sample.sentences, tokenizer)
