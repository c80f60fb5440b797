"""A pretraining run before it begins: what its settings and its corpus say, found to go together."""

from dataclasses import dataclass

from cmcgns.clustering.kmeans import check_faiss
from cmcgns.config import Config
from cmcgns.models.tokenizer import ReportTokenizer
from cmcgns.run_folder import RunFolder, open_folder, refuse_changes
from cmcgns.train.corpus import Corpus, check_sizes, make_tokenizer, open_corpus, sample_reports
from cmcgns.train.folder import FREE_TO_CHANGE, read_tokenizer, with_absolute_paths
from cmcgns.train.schedule import Schedule, build_schedule


@dataclass(frozen=True)
class Materials:
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
    materials: Materials

    @property
    def corpus(self) -> Corpus:
        """The corpus, indexed."""
        return self.materials.corpus

    @property
    def tokenizer(self) -> ReportTokenizer:
        """The vocabulary that the run begins or began with."""
        return self.materials.tokenizer


def open_pretraining(config: Config, materials: Materials | None = None) -> Pretraining:
    """The run of ``config``, new or resumed; ``materials`` where another run has made them already.

    Raises:
        UserError: a setting that this machine, the run's folder or the corpus cannot carry.
    """
    config = with_absolute_paths(config)
    check_faiss(config.clustering.device)
    folder = open_folder(config.run, "pretrain")
    if folder.resumed:
        refuse_changes(config, folder, FREE_TO_CHANGE)
    made = materials or make_materials(config, folder if folder.resumed else None)
    schedule = build_schedule(config.train, len(made.corpus.train))
    check_sizes(config, made.corpus, made.sentences)
    return Pretraining(config, folder, schedule, made)


def make_materials(config: Config, resumed: RunFolder | None = None) -> Materials:
    """The corpus of ``config`` and its vocabulary, that of the run in ``resumed`` if there is one."""
    corpus = open_corpus(config)
    sample = sample_reports(corpus, config.model.vocabulary_reports)
    # vocabularies take their time: what the corpus cannot carry is told before
    build_schedule(config.train, len(corpus.train))
    check_sizes(config, corpus, sample.sentences)
    tokenizer = read_tokenizer(resumed, config) if resumed else make_tokenizer(config, sample)
    return Materials(corpus, sample.sentences, tokenizer)
