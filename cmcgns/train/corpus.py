"""What the driver learns of a corpus before training: its index, its vocabulary, how many sentences it holds."""

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cmcgns.config import Config, DataConfig
from cmcgns.data.index import StudyIndex, too_many_bad
from cmcgns.data.reports import ParsedReport, parse_report
from cmcgns.data.sources import Source, open_source
from cmcgns.errors import BadRow, UserError, starting_with
from cmcgns.models.presets import TEXT_PRESETS
from cmcgns.models.tokenizer import ReportTokenizer, load_tokenizer, train_tokenizer

FETCH_THREADS = 16


@dataclass(frozen=True)
class Corpus:
    """A corpus, indexed."""

    source: Source
    index: StudyIndex
    train: pa.Table
    valid: pa.Table

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


def open_index(key: str, data: DataConfig) -> tuple[Source, StudyIndex]:
    """The corpus that ``data`` names and its index; where it cannot be read, the error names the setting ``key``."""
    try:
        source = open_source(
            data.uri, data.format, data.views, data.seed, data.resize, data.phantom_studies, data.phantom_size
        )
        return source, source.index()
    except UserError as error:
        reason = str(error).removeprefix("data.uri ")
        raise UserError(f"{key} {starting_with(data.uri, reason)}") from None


def open_corpus(config: Config) -> Corpus:
    """The corpus of ``config.data``, with the splits that training reads."""
    data = config.data
    source, index = open_index("data.uri", data)
    corpus = Corpus(source, index, index.split("train"), index.split("valid").slice(0, data.validation_studies))
    complaint = too_many_bad(corpus.bad_rows, corpus.studies, data.max_bad_fraction)
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
    with ThreadPoolExecutor(FETCH_THREADS) as threads:
        found = threads.map(lambda study: _parsed(corpus.source, study), _studies(corpus.train, most))
        return ReportSample([report for report in found if report is not None], len(corpus.train))


def _studies(table: pa.Table, most: int) -> Iterator[dict[str, Any]]:
    for batch in table.slice(0, most).to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _parsed(source: Source, study: dict[str, Any]) -> ParsedReport | None:
    try:
        return parse_report(source.read_report(study))
    except BadRow:
        return None  # recorded when training meets it


def make_tokenizer(config: Config, sample: ReportSample) -> ReportTokenizer:
    """The tokenizer of ``config.model``; trained on ``sample`` where the text encoder is a preset."""
    model, limits = config.model, (config.data.max_tokens, config.data.max_sentences)
    if model.tokenizer != "auto" or model.text_encoder not in TEXT_PRESETS:
        return load_tokenizer(model.tokenizer, model.text_encoder, *limits)
    sentences = (sentence for report in sample.reports for sentence in report.sentences)
    return train_tokenizer(sentences, model.vocabulary_size, *limits)


def check_sizes(config: Config, corpus: Corpus, sample: ReportSample) -> None:
    """Refuse settings that this corpus cannot carry, with the numbers."""
    clusters = config.objective.num_clusters
    if 4 * clusters > sample.sentences:
        raise UserError(
            f"objective.num_clusters {clusters} needs at least 4 x {clusters} = {4 * clusters} training sentences; "
            f"the corpus has {sample.sentences}, enough for {sample.sentences // 4}"
        )
    if config.train.global_batch_size > len(corpus.train):
        raise UserError(
            f"train.global_batch_size {config.train.global_batch_size} is larger than the corpus's "
            f"{len(corpus.train)} training studies"
        )
