"""What the driver learns of a corpus before training: its index, its vocabulary, how many sentences it holds."""

import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from cmcgns.config import Config, CorpusConfig
from cmcgns.data.index import StudyIndex, too_many_bad
from cmcgns.data.order import Arrangement
from cmcgns.data.reports import ParsedReport
from cmcgns.data.sources import Reader, Source, open_source
from cmcgns.data.transforms import Target
from cmcgns.errors import BadRow, UserError, starting_with
from cmcgns.models.shapes import TEXT_PRESETS
from cmcgns.models.tokenizer import ReportTokenizer, load_tokenizer, train_tokenizer

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


def open_index(key: str, data: CorpusConfig, target: Target) -> tuple[Source, StudyIndex]:
    """The corpus that ``data`` names and its index; where it cannot be read, the error names the setting ``key``.

    ``target``: what films will be shrunk to.
    """
    try:
        source = open_source(
            data.uri, data.format, data.views, data.seed, target, data.crop_borders,
            data.phantom_studies, data.phantom_size,
        )  # fmt: skip
        return source, source.index()
    except UserError as error:
        reason = str(error).removeprefix("data.uri ")
        raise UserError(f"{key} {starting_with(data.uri, reason)}") from None


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
    clusters = config.objective.num_clusters
    if 4 * clusters > sentences:
        raise UserError(
            f"objective.num_clusters {clusters} needs at least 4 x {clusters} = {4 * clusters} training sentences; "
            f"the corpus has {sentences}, enough for {sentences // 4}"
        )
    if config.train.global_batch_size > len(corpus.train):
        raise UserError(
            f"train.global_batch_size {config.train.global_batch_size} is larger than the corpus's "
            f"{len(corpus.train)} training studies"
        )
