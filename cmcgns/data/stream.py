"""A corpus as a stream of microbatches: Ray Data fetches and decodes, each rank receives whole blocks in a fixed order.

The order is a function of (seed, epoch) and the index (see ``order``); where its windows start is known before anything is read.
Each task reads one piece of it. After bad rows are dropped, the rest is cut into blocks of exactly ``microbatch_size`` studies;
block b goes to rank b mod world.
"""

import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.util.annotations import RayDeprecationWarning

from cmcgns.cluster import ray_private
from cmcgns.cluster.placement import data_label, data_resources, list_nodes
from cmcgns.config import DataConfig
from cmcgns.data.blocks import deal
from cmcgns.data.image import resize_image
from cmcgns.data.order import draw_key, drawn_image
from cmcgns.data.readers import Reader, Source
from cmcgns.data.record import StreamStudy, labels_of, stream_table
from cmcgns.data.studies import Studies
from cmcgns.data.tokenizer import ReportTokenizer
from cmcgns.errors import BadRow, UserError

FETCH_THREADS = 8
"""Films of one piece that are fetched from storage at the same time."""
SCHEDULER_PAUSE_S = 0.02
STUDIES_PER_DEAL = {True: 512, False: 64}
"""Studies dealt to all ranks at once, of a prepared set and of a raw one. Each block costs Ray Data about 15 ms of CPU time;
decoding a raw film takes 15 ms."""

DEALS_AHEAD = 8
"""Least ratio of the read-ahead limit to one deal. Ray Data counts the blocks that ranks hold and prefetch twice; with less room
it pauses reading, for up to a minute, until the next deal fits."""

DEALING_CPUS = 0.1
"""CPUs of the task that deals studies to the ranks; it only copies memory."""
MAX_PIECES = 600
"""Most pieces of an epoch of a raw set; each adds 2 ms to the start of the epoch."""
PIECES_AT_ONCE = 512
"""Pieces of a prepared set that one Ray dataset reads, 262,144 studies. Each takes some KiB of rank 0 and adds to the start, as
above."""
GROUPED_ROWS = 128
"""Studies in one output table of a task that reads whole row groups."""
BLOCK_BYTES = 8 * 2**20
"""Target size of a task's output blocks. Two epochs at once took 450 MiB of object store with blocks of 32 MiB, 220 MiB with
these."""


@dataclass(frozen=True)
class Stream:
    """One split of a corpus, ready to be streamed to ranks. Small: its ``Studies`` are in the object store."""

    source: Source
    split_ref: Any
    """Object reference of the split's ``Studies``."""
    studies: int
    tokenizer: ReportTokenizer
    config: DataConfig
    coordinator: Any
    """Actor that keeps the list of bad rows."""
    taken_cpus: float = 0.0
    """CPUs of the cluster that workers and clustering actors hold and data tasks must not use."""
    most_cpus: float | None = None
    """Most CPUs for data tasks if other runs share the cluster; ``taken_cpus`` is ignored then."""
    studies_ahead: int = 1024
    """Read-ahead limit: decoded studies that may wait in the object store."""
    with_text: bool = False
    """Rows contain the text of the sentences too."""
    labels: tuple[str, ...] = ()
    """Labels that rows contain."""

    @property
    def at_once(self) -> int:
        """Most studies that one Ray dataset reads; an epoch of more is read by several, one after the other."""
        if not self.source.in_groups:
            return self.studies
        return PIECES_AT_ONCE * piece_studies(self.source, self.config, self.studies)

    def split(self, epoch: int, position: int, block_size: int, ranks: int, end: int | None = None) -> list[Any]:
        """One Ray Data iterator per rank over the epoch from ``position`` to ``end``. Several ranks receive blocks of
        ``block_size`` in turn; a single rank receives all rows, which ``blocks`` cuts."""
        with self.context():
            rows = self.rows(epoch, position, end)
            if ranks == 1:
                return [rows.iterator()]  # scheduled in this process: an extra process would take 140 MiB
            # never equal to the CPUs of a reading task: Ray Data would fuse the two, and read a piece for each study to deal
            cpus = DEALING_CPUS if self.config.cpus_per_task != DEALING_CPUS else DEALING_CPUS / 2
            in_turn = deal_in_turn(rows, ranks, block_size, self.rounds_at_a_time(block_size, ranks), cpus)
            return list(in_turn.streaming_split(ranks))

    def rounds_at_a_time(self, block_size: int, ranks: int) -> int:
        """Microbatches dealt to each rank at once: ``STUDIES_PER_DEAL`` studies over all ranks, at most
        ``1 / DEALS_AHEAD`` of the read-ahead limit."""
        studies = min(STUDIES_PER_DEAL[self.source.in_groups], self.studies_ahead // DEALS_AHEAD)
        return max(studies // (ranks * block_size), 1)

    def rows(self, epoch: int, position: int, end: int | None = None) -> Any:
        """The epoch's usable studies from ``position`` to ``end`` as a Ray dataset of ``stream_schema``. Call and consume it
        within ``context()``."""
        pieces = len(piece_bounds(self, epoch, position, end)) - 1
        # the same CPUs as the tasks that follow, so that Ray Data fuses the two; otherwise it first counts all pieces
        cpus = self.config.cpus_per_task
        numbers = ray_private.set_num_cpus(ray.data.range(pieces, override_num_blocks=pieces), cpus)
        return numbers.map_batches(
            read_pieces,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=cpus,
            # by reference: every task unpickles these arguments, and a vocabulary takes as long as a piece
            fn_kwargs={"stream_ref": ray.put(self), "epoch": epoch, "position": position, "end": end},
        )

    def context(self) -> Any:
        """Context manager with Ray Data's settings for this stream."""
        return ordered_context(self.taken_cpus, self.studies_ahead * bytes_per_study(self.config), self.most_cpus)


def deal_in_turn(rows: Any, ranks: int, block_size: int, rounds: int, cpus: float) -> Any:
    """``rows`` in blocks of ``rounds`` microbatches, each for one rank in turn."""
    size = rounds * block_size
    dealing = {"ranks": ranks, "block_size": block_size, "rounds": rounds}
    in_turn = rows.map_batches(
        deal,
        batch_format="pyarrow",
        batch_size=ranks * size,
        zero_copy_batch=True,
        num_cpus=cpus,
        fn_kwargs=dealing,
    )
    # Ray Data fuses the two into one task, with multiples of batch_size, if both request the same CPUs. The repartition has no
    # parameter for it and requests a whole CPU, which is never free next to another epoch on a small machine
    return ray_private.set_num_cpus(in_turn.repartition(target_num_rows_per_block=size, strict=True), cpus)


class ConcurrentStreams(ray_private.execution_callback()):  # type: ignore[misc]
    """Adapts Ray Data's scheduler to several streams that run during training."""

    def before_execution_starts(self, executor: Any) -> None:
        """Let the stream plan with every CPU that training leaves. Ray Data would give it a share of all CPUs and subtract all
        that training holds from it. A stream without a CPU for one of its operators fills the object store."""
        ray_private.set_total_resources(executor, data_resources)

    def on_execution_step(self, executor: Any) -> None:
        """Pause: while training holds the stream back, the scheduler would busy-loop and use a third of a CPU."""
        time.sleep(SCHEDULER_PAUSE_S)


def bytes_per_study(config: DataConfig) -> int:
    """Most bytes of one row in the object store: the grey square, tokens, their sentences and hashes."""
    return config.resize**2 + 6 * config.max_tokens + 8 * config.max_sentences


def ordered_context(taken_cpus: float, most_bytes: int, most_cpus: float | None) -> Any:
    """Ray Data's settings for a stream that training consumes at its own pace, with at most ``most_bytes`` read ahead."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    # by default it reads ahead until half the object store is full, which is much of a corpus of small films
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        cpu=most_cpus, object_store_memory=most_bytes
    )
    with warnings.catch_warnings():  # label selectors replace it, but they select whole machines
        warnings.simplefilter("ignore", RayDeprecationWarning)
        context.execution_options.exclude_resources = ray.data.ExecutionResources(cpu=taken_cpus)
    context.execution_options.label_selector = data_label(list_nodes())
    context.target_max_block_size = BLOCK_BYTES
    # otherwise a task that waits for room keeps its CPU, validation waits for it, and training for validation
    ray_private.unlimit_generator_buffer(context)
    # training may pause for longer than any timeout: validation, checkpoints, slow clustering
    context.execution_no_progress_timeout_s = -1
    context.custom_execution_callback_classes = [ConcurrentStreams]
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    return ray.data.DataContext.current(context)


def stream_split(
    studies: Studies, tokenizer: ReportTokenizer, config: DataConfig, coordinator: Any, **options: Any
) -> Stream:
    """The stream of the split ``studies``, which go into the object store."""
    return Stream(studies.source, ray.put(studies), len(studies), tokenizer, config, coordinator, **options)


@lru_cache(maxsize=8)
def fetched(reference: Any) -> Any:
    """The object behind ``reference``, fetched once per process."""
    return ray.get(reference)


@lru_cache(maxsize=4)
def epoch_order(split_ref: Any, seed: int, epoch: int, groups_per_window: int) -> Any:
    """The ``Order`` of an epoch, computed once per process."""
    return fetched(split_ref).epoch(seed, epoch, groups_per_window)


def piece_studies(source: Source, config: DataConfig, studies: int) -> int:
    """Approximate studies of one task's piece: a window of a prepared set; of a raw set as many windows as give an epoch of
    ``studies`` at most ``MAX_PIECES``."""
    if source.in_groups:
        return config.groups_per_window * config.group_studies
    return config.window_size * max(-(-studies // (config.window_size * MAX_PIECES)), 1)


def default_read_ahead(source: Source, config: DataConfig, studies: int, global_batch_size: int, decoders: int) -> int:
    """Default read-ahead limit in studies: enough to keep reading and training busy."""
    piece = piece_studies(source, config, studies)
    return DEALS_AHEAD * global_batch_size + decoders * (
        piece if source.in_groups else max(4 * config.window_size, 2 * piece)
    )


def piece_bounds(stream: Stream, epoch: int, position: int, end: int | None = None) -> np.ndarray:
    """Positions where the tasks' pieces start, from ``position`` on, and the end. Row groups of a prepared set are read whole; a
    raw set can be read from any position."""
    config, end = stream.config, stream.studies if end is None else end
    if not stream.source.in_groups:
        size = piece_studies(stream.source, config, stream.studies)
        return np.append(np.arange(position, end, size), end)
    starts = epoch_order(stream.split_ref, config.seed, epoch, config.groups_per_window).starts
    between = slice(*np.searchsorted(starts, [position, end]))
    return np.unique(np.concatenate([[position], starts[between], [end]]))


def read_pieces(numbers: pa.Table, stream_ref: Any, epoch: int, position: int, end: int | None) -> Iterator[pa.Table]:
    """The usable studies of the pieces with these ``numbers``, fetched, decoded and tokenized, in order."""
    stream = fetched(stream_ref)
    bounds = piece_bounds(stream, epoch, position, end)
    try:
        for number in numbers["id"].to_pylist():
            yield from read_piece(stream, epoch, range(bounds[number], bounds[number + 1]))
    except UserError as error:
        # not the fault of a study, and a restart would not help: missing storage, expired credentials
        ray.get(stream.coordinator.fail.remote(str(error)))
        raise


def read_piece(stream: Stream, epoch: int, positions: range) -> Iterator[pa.Table]:
    """The usable studies at ``positions`` of the epoch's order, about a hundred per table."""
    config, split = stream.config, fetched(stream.split_ref)
    order = epoch_order(stream.split_ref, config.seed, epoch, config.groups_per_window)
    studies, reader_of = split.read(order, positions)
    shown = [drawn_image(config.seed, epoch, study["study_id"], len(study["films"])) for study in studies]
    reader = reader_of([study["films"][film]["path"] for study, film in zip(studies, shown, strict=True)])
    read = partial(read_study, reader=reader, stream=stream, epoch=epoch)
    with ThreadPoolExecutor(FETCH_THREADS) as threads:
        at_once = GROUPED_ROWS if stream.source.in_groups else config.window_size
        for start in range(0, len(studies), at_once):
            part = slice(start, start + at_once)
            rows = list((threads.map if reader.io_bound else map)(read, studies[part], shown[part]))
            bad = [
                {"source": study["study_id"], "reason": str(row)}
                for study, row in zip(studies[part], rows, strict=True)
                if isinstance(row, BadRow)
            ]
            if bad:
                ray.get(stream.coordinator.add_bad_rows.remote(bad))
            good = [
                (place, row) for place, row in zip(positions[part], rows, strict=True) if isinstance(row, StreamStudy)
            ]
            yield stream_table([place for place, _ in good], [row for _, row in good], config.resize, stream.with_text)


def read_study(study: dict[str, Any], shown: int, reader: Reader, stream: Stream, epoch: int) -> StreamStudy | BadRow:
    """A study with the film that this epoch shows, or the reason why it cannot be used."""
    config, film = stream.config, study["films"][shown]
    key, labels_L = draw_key(config.seed, epoch, film["image_id"]), labels_of(study, stream.labels)
    try:
        if not config.reports:
            square_RR = resize_image(reader.read_image(film["path"]).grey_HW, config.resize)
            return StreamStudy.without_report(key, square_RR, labels_L)
        report = reader.read_sentences(study, film["path"])
        encoded = stream.tokenizer.encode(report.sentences)
        square_RR = resize_image(reader.read_image(film["path"]).grey_HW, config.resize)
    except BadRow as reason:
        return reason
    return StreamStudy.of(key, square_RR, report, encoded, labels_L)
