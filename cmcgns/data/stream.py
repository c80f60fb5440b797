"""A corpus as a stream of microbatches: Ray Data fetches and decodes, each rank receives whole blocks in a fixed order.

The order is a function of (seed, epoch) and the index (see ``order``), known before anything is read. Each task takes one
piece of it. What is left after bad rows are dropped is cut into blocks of exactly ``microbatch_size`` studies; block b goes
to rank b mod world.
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
from cmcgns.data.order import Arrangement, EpochOrder, draw_key, drawn_image
from cmcgns.data.readers import Reader, Source
from cmcgns.data.record import StreamStudy, stream_table
from cmcgns.data.tokenizer import ReportTokenizer
from cmcgns.errors import BadRow, UserError

FETCH_THREADS = 8
"""Films of one piece that are fetched from storage at the same time."""
SCHEDULER_PAUSE_S = 0.02
HANDED_ON = {True: 512, False: 64}
"""Studies that are dealt to all ranks together, of a prepared set and of a raw one: each block on its way costs Ray Data some
15 ms of CPU time, and a film of a raw set takes 15 ms to decode."""

HANDS_AHEAD = 8
"""Least times that what is dealt together has to fit into what may wait for training: Ray Data counts what each rank has in hand
and in advance twice, and holds back reading, for up to a minute, until there is room for the next hand and what it is made of."""

DEALING_CPUS = 0.1
"""CPUs of a task that deals studies to the ranks: it copies memory."""
MOST_PIECES = 600
"""Pieces of an epoch of a raw set: each one costs 2 ms before the first is read."""
GROUPED_ROWS = 128
"""Studies that a task which reads whole groups hands on at once."""
BLOCK_BYTES = 8 * 2**20
"""Size at which what a task has made is handed on: two epochs at once took 450 MiB of object store in blocks of 32 MiB, 220 in
these."""


@dataclass(frozen=True)
class Stream:
    """One split of a corpus, ready to be streamed to ranks. Small: the split lies in the object store."""

    source: Source
    split_ref: Any
    """Object reference of the split's index table and ``Arrangement``."""
    studies: int
    tokenizer: ReportTokenizer
    config: DataConfig
    coordinator: Any
    """Actor that keeps the list of bad rows."""
    taken_cpus: float = 0.0
    """CPUs of the cluster that workers and clustering pool hold, which data tasks must leave alone."""
    most_cpus: float | None = None
    """Most CPUs for data tasks, where other runs share the cluster; what is taken does not count then."""
    studies_ahead: int = 1024
    """Decoded studies that may wait in the object store for training."""
    with_text: bool = False
    """Rows carry the sentences' words too."""

    def split(self, epoch: int, position: int, block_size: int, ranks: int) -> list[Any]:
        """One Ray Data iterator for each rank over the epoch from ``position`` on: with several, blocks of ``block_size`` go
        round them; a lone one gets all, to be cut by ``blocks``."""
        with self.context():
            rows = self.rows(epoch, position)
            if ranks == 1:
                return [rows.iterator()]  # scheduled in this process: one of its own would take 140 MiB
            # never as many as a reading task's: Ray Data would join the two, and read a piece for each study to deal
            cpus = DEALING_CPUS if self.config.cpus_per_task != DEALING_CPUS else DEALING_CPUS / 2
            in_turn = dealt(rows, ranks, block_size, self.rounds_at_a_time(block_size, ranks), cpus)
            return list(in_turn.streaming_split(ranks))

    def rounds_at_a_time(self, block_size: int, ranks: int) -> int:
        """Microbatches that each rank is handed at once: as many as make ``HANDED_ON`` studies of all ranks together, and
        leave room for ``HANDS_AHEAD`` times as many."""
        studies = min(HANDED_ON[self.source.in_groups], self.studies_ahead // HANDS_AHEAD)
        return max(studies // (ranks * block_size), 1)

    def rows(self, epoch: int, position: int) -> Any:
        """The epoch's good studies from ``position`` on as a Ray Data set of ``stream_schema``; to be called, and consumed,
        within ``context()``."""
        pieces = len(piece_bounds(self, epoch, position)) - 1
        # with the same CPUs as the tasks that follow, so that Ray Data joins the two: else it first counts through all pieces
        cpus = self.config.cpus_per_task
        numbers = ray_private.set_num_cpus(ray.data.range(pieces, override_num_blocks=pieces), cpus)
        return numbers.map_batches(
            read_pieces,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=cpus,
            # by reference: what stands here is unpickled by every task, and a vocabulary takes as long as a piece
            fn_kwargs={"stream_ref": ray.put(self), "epoch": epoch, "position": position},
        )

    def context(self) -> Any:
        """Ray Data's settings for this stream, while the block lasts."""
        return ordered_context(self.taken_cpus, self.studies_ahead * bytes_per_study(self.config), self.most_cpus)


def dealt(rows: Any, ranks: int, block_size: int, rounds: int, cpus: float) -> Any:
    """``rows`` in blocks of ``rounds`` microbatches of one rank each, in turn."""
    hand = rounds * block_size
    dealing = {"ranks": ranks, "block_size": block_size, "rounds": rounds}
    in_turn = rows.map_batches(
        deal,
        batch_format="pyarrow",
        batch_size=ranks * hand,
        zero_copy_batch=True,
        num_cpus=cpus,
        fn_kwargs=dealing,
    )
    # Ray Data joins the two into one task, which is handed multiples of batch_size, if both ask for the same; no parameter
    # says how much the second asks for: a whole CPU, which beside another epoch on a small machine is never free
    return ray_private.set_num_cpus(in_turn.repartition(target_num_rows_per_block=hand, strict=True), cpus)


class Interleaved(ray_private.execution_callback()):  # type: ignore[misc]
    """Fits Ray Data's scheduler to streams that run beside training and beside each other."""

    def before_execution_starts(self, executor: Any) -> None:
        """Lets the stream count on every CPU that training leaves: Ray Data would give it its part of all, and subtract from
        that the whole of what training holds. A stream left without a CPU for one of its steps fills the object store."""
        ray_private.set_total_resources(executor, data_resources)

    def on_execution_step(self, executor: Any) -> None:
        """Rests: while training holds the stream back the scheduler would turn without a pause, and take a third of a CPU."""
        time.sleep(SCHEDULER_PAUSE_S)


def bytes_per_study(config: DataConfig) -> int:
    """Bytes of one row in the object store: the grey square, and at most what tokens, owners and hashes take."""
    return config.resize**2 + 6 * config.max_tokens + 8 * config.max_sentences


def ordered_context(taken_cpus: float, most_bytes: int, most_cpus: float | None) -> Any:
    """Ray Data's settings for a stream that training consumes at its own pace, at most ``most_bytes`` behind it."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    # by default it reads ahead until half the object store is full: of small films, much of the corpus
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        cpu=most_cpus, object_store_memory=most_bytes
    )
    with warnings.catch_warnings():  # its successor knows labels of machines, not shares of one
        warnings.simplefilter("ignore", RayDeprecationWarning)
        context.execution_options.exclude_resources = ray.data.ExecutionResources(cpu=taken_cpus)
    context.execution_options.label_selector = data_label(list_nodes())
    context.target_max_block_size = BLOCK_BYTES
    # else a task that waits for room keeps its CPU: validation would wait for it, and training for validation
    ray_private.unlimit_generator_buffer(context)
    # training may pause for longer than any guard: validation, checkpoints, a slow pool
    context.execution_no_progress_timeout_s = -1
    context.custom_execution_callback_classes = [Interleaved]
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    return ray.data.DataContext.current(context)


def stream_split(
    source: Source, studies: pa.Table, arrangement: Arrangement, tokenizer: ReportTokenizer, config: DataConfig, coordinator: Any,
    **options: Any,
) -> Stream:  # fmt: skip
    """The stream of a split whose table and arrangement are put where every task finds them."""
    split_ref = ray.put((studies.combine_chunks(), arrangement))
    return Stream(source, split_ref, len(studies), tokenizer, config, coordinator, **options)


@lru_cache(maxsize=8)
def fetched(reference: Any) -> Any:
    """What ``reference`` refers to, fetched once by each process."""
    return ray.get(reference)


@lru_cache(maxsize=4)
def epoch_order(split_ref: Any, seed: int, epoch: int, groups_per_window: int) -> EpochOrder:
    """The order of an epoch, worked out once by each process."""
    order: EpochOrder = fetched(split_ref)[1].epoch(seed, epoch, groups_per_window)
    return order


def piece_studies(source: Source, config: DataConfig, studies: int) -> int:
    """Studies of one task's piece, about: a window of a prepared set; of a raw one as many windows as leave an epoch of
    ``studies`` with no more than ``MOST_PIECES``."""
    if source.in_groups:
        return config.groups_per_window * config.group_studies
    return config.window_size * max(-(-studies // (config.window_size * MOST_PIECES)), 1)


def most_ahead(source: Source, config: DataConfig, studies: int, global_batch_size: int, decoders: int) -> int:
    """Decoded studies that may wait for training where nothing else is asked for: enough to keep both sides busy."""
    piece = piece_studies(source, config, studies)
    return HANDS_AHEAD * global_batch_size + decoders * (
        piece if source.in_groups else max(4 * config.window_size, 2 * piece)
    )


def piece_bounds(stream: Stream, epoch: int, position: int) -> np.ndarray:
    """Positions at which the tasks' pieces begin, from ``position`` on, and the end; a prepared set's row groups are read
    whole, a raw one can be read from any place on."""
    config = stream.config
    if not stream.source.in_groups:
        size = piece_studies(stream.source, config, stream.studies)
        return np.append(np.arange(position, stream.studies, size), stream.studies)
    starts = epoch_order(stream.split_ref, config.seed, epoch, config.groups_per_window).starts
    return np.unique(np.maximum(starts, position))


def read_pieces(numbers: pa.Table, stream_ref: Any, epoch: int, position: int) -> Iterator[pa.Table]:
    """The good studies of the pieces whose numbers come in, fetched, decoded and tokenised, in order."""
    stream = fetched(stream_ref)
    bounds = piece_bounds(stream, epoch, position)
    try:
        for number in numbers["id"].to_pylist():
            yield from read_piece(stream, epoch, range(bounds[number], bounds[number + 1]))
    except UserError as error:
        # no row's fault, and no restart would mend it: storage that is gone, credentials that have expired
        ray.get(stream.coordinator.fail.remote(str(error)))
        raise


def read_piece(stream: Stream, epoch: int, positions: range) -> Iterator[pa.Table]:
    """The good studies at ``positions`` of the epoch's order, some hundred in each table."""
    config, (table, _) = stream.config, fetched(stream.split_ref)
    order = epoch_order(stream.split_ref, config.seed, epoch, config.groups_per_window)
    studies = table.take(order.row_S[positions.start : positions.stop]).to_pylist()
    shown = [drawn_image(config.seed, epoch, study["study_id"], len(study["films"])) for study in studies]
    reader = stream.source.reader([study["films"][film]["path"] for study, film in zip(studies, shown, strict=True)])
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
    """A study with the film of it that the epoch shows, or why it cannot be used."""
    config, film = stream.config, study["films"][shown]
    try:
        report = reader.read_sentences(study, film["path"])
        encoded = stream.tokenizer.encode(report.sentences)
        square_RR = resize_image(reader.read_image(film["path"]).grey_HW, config.resize)
    except BadRow as reason:
        return reason
    return StreamStudy.of(draw_key(config.seed, epoch, film["image_id"]), square_RR, report, encoded)
