"""A corpus as a stream of microbatches: Ray Data fetches and decodes, each rank receives whole blocks in a fixed order.

The order is a permutation of the index by (seed, epoch), known before anything is read. After bad rows are dropped the
stream is cut again into blocks of exactly ``microbatch_size`` studies; block b goes to rank b mod world.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.util.annotations import RayDeprecationWarning

from cmcgns.config import DataConfig
from cmcgns.data.reports import parse_report
from cmcgns.data.sources import Source
from cmcgns.data.transforms import draw_key, drawn_film, resize_film
from cmcgns.errors import BadRow
from cmcgns.models.tokenizer import ReportTokenizer

FETCH_THREADS = 8
"""Films of one window that are fetched from storage at the same time."""
SCHEDULER_PAUSE_S = 0.02
VALIDATION_EPOCH = -1
"""Stands for validation where draws are keyed by epoch, so that they never change."""


@dataclass(frozen=True)
class Stream:
    """One split of a corpus, ready to be streamed to ranks. Small: the table lies in the object store."""

    source: Source
    table: Any
    """Object reference of the split's index table."""
    studies: int
    tokenizer: ReportTokenizer
    config: DataConfig
    board: Any
    """Actor that keeps the list of bad rows."""
    taken_cpus: float = 0.0
    """CPUs of the cluster that workers and clustering pool hold, which data tasks must leave alone."""
    studies_ahead: int = 1024
    """Decoded studies that may wait in the object store for training."""
    with_text: bool = False
    """Rows carry the sentences' words too."""

    def split(self, epoch: int, position: int, block_size: int, ranks: int) -> list[Any]:
        """One Ray Data iterator for each rank over the epoch from ``position`` on, in blocks of ``block_size``."""
        with self.context():
            blocks = self.rows(epoch, position).repartition(target_num_rows_per_block=block_size, strict=True)
            return list(blocks.streaming_split(ranks))

    def rows(self, epoch: int, position: int) -> Any:
        """The epoch's good studies from ``position`` on as a Ray Data set of ``row_schema``; to be called, and consumed,
        within ``context()``."""
        windows = -(-(self.studies - position) // self.config.window_size)
        return ray.data.range(windows, override_num_blocks=windows).map_batches(
            read_window,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=self.config.cpus_per_task,
            fn_kwargs={"stream": self, "epoch": epoch, "position": position},
        )

    def context(self) -> Any:
        """Ray Data's settings for this stream, while the block lasts."""
        return ordered_context(self.taken_cpus, self.studies_ahead * bytes_per_study(self.config))


class Unhurried(ExecutionCallback):
    """Rests after each turn of Ray Data's scheduler: while training holds the stream back it would turn without a pause,
    and take a third of a CPU from it."""

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(SCHEDULER_PAUSE_S)


def bytes_per_study(config: DataConfig) -> int:
    """Bytes of one row in the object store: the grey square, and at most what tokens, owners and hashes take."""
    return config.resize**2 + 6 * config.max_tokens + 8 * config.max_sentences


def ordered_context(taken_cpus: float, most_bytes: int) -> Any:
    """Ray Data's settings for a stream that training consumes at its own pace, at most ``most_bytes`` behind it."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    # by default it reads ahead until half the object store is full: of small films, much of the corpus
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=most_bytes)
    with warnings.catch_warnings():  # its successor knows labels of machines, not shares of one
        warnings.simplefilter("ignore", RayDeprecationWarning)
        context.execution_options.exclude_resources = ray.data.ExecutionResources(cpu=taken_cpus)
    # training may pause for longer than any guard: validation, checkpoints, a slow pool
    context.execution_no_progress_timeout_s = -1
    context.custom_execution_callback_classes = [Unhurried]
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    return ray.data.DataContext.current(context)


def read_window(window: pa.Table, stream: Stream, epoch: int, position: int) -> pa.Table:
    """The good studies of the windows whose numbers come in, fetched, decoded and tokenised, in order."""
    size = stream.config.window_size
    positions = [
        place
        for number in window["id"].to_pylist()
        for place in range(position + number * size, min(position + (number + 1) * size, stream.studies))
    ]
    table, order = ray.get(stream.table), epoch_order(stream.config.seed, epoch, stream.studies)
    studies = table.take(order[positions]).to_pylist()
    with ThreadPoolExecutor(FETCH_THREADS if stream.source.format != "phantom" else 1) as threads:
        rows = list(threads.map(lambda study: read_study(study, stream, epoch), studies))
    bad = [
        {"source": study["study_id"], "reason": str(row)}
        for study, row in zip(studies, rows, strict=True)
        if isinstance(row, BadRow)
    ]
    if bad:
        ray.get(stream.board.add_bad_rows.remote(bad))
    good = [row | {"position": place} for place, row in zip(positions, rows, strict=True) if isinstance(row, dict)]
    return pa.Table.from_pylist(good, schema=row_schema(stream.config.resize, stream.with_text))


def read_study(study: dict[str, Any], stream: Stream, epoch: int) -> dict[str, Any] | BadRow:
    """One row of ``row_schema`` but for its position, or why there is none."""
    config = stream.config
    film = study["films"][drawn_film(config.seed, epoch, study["study_id"], len(study["films"]))]
    try:
        report = parse_report(stream.source.read_report(study))
        encoded = stream.tokenizer.encode(report.sentences)
        square = resize_film(stream.source.read_film(film["path"]), config.resize)
    except BadRow as reason:
        return reason
    text = {"sentences": report.sentences[: encoded.sentences]} if stream.with_text else {}
    return text | {
        "draw_key": draw_key(config.seed, epoch, film["image_id"]),
        "image": square.tobytes(),
        "tokens": encoded.tokens_T,
        "sentence_of_token": encoded.sentence_of_token_T,
        "sentence_hashes": report.sentence_hashes[: encoded.sentences],
        "report_hash": report.report_hash,
    }


@lru_cache(maxsize=8)
def row_schema(resize: int, with_text: bool = False) -> pa.Schema:
    """Columns of the stream; films stay uint8 until they reach the training device."""
    text = {"sentences": pa.list_(pa.string())} if with_text else {}
    return pa.schema(
        text
        | {
            "position": pa.int64(),
            "draw_key": pa.int64(),
            "image": pa.binary(resize * resize),
            "tokens": pa.list_(pa.int32()),
            "sentence_of_token": pa.list_(pa.int16()),
            "sentence_hashes": pa.list_(pa.int64()),
            "report_hash": pa.int64(),
        }
    )


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, studies: int) -> np.ndarray:
    """The index rows of an epoch in their order; validation keeps the index's own."""
    if epoch == VALIDATION_EPOCH:
        return np.arange(studies)
    return np.random.Generator(np.random.PCG64([seed % 2**64, epoch])).permutation(studies)


@dataclass(frozen=True)
class Block:
    """Studies of one microbatch as they come out of the stream, on the host."""

    positions: np.ndarray
    draw_keys: np.ndarray
    images_BRR: np.ndarray
    tokens: Sequence[np.ndarray]
    sentence_of_token: Sequence[np.ndarray]
    sentence_hashes: Sequence[np.ndarray]
    report_hashes: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def sentence_counts(self) -> np.ndarray:
        """Sentences of each study."""
        return np.array([len(hashes) for hashes in self.sentence_hashes])

    def padded(self, size: int) -> "Block":
        """``size`` studies, the first one repeated at the end."""
        index = np.concatenate([np.arange(len(self)), np.zeros(size - len(self), np.int64)])
        pick = lambda parts: [parts[i] for i in index]
        return Block(
            self.positions[index],
            self.draw_keys[index],
            self.images_BRR[index],
            pick(self.tokens),
            pick(self.sentence_of_token),
            pick(self.sentence_hashes),
            self.report_hashes[index],
        )


def blank_block(size: int, resize: int) -> Block:
    """``size`` studies of nothing, for a rank that has run out of validation studies while others have not."""
    token, owner, text = np.zeros(1, np.int32), np.zeros(1, np.int16), np.zeros(1, np.int64)
    images_BRR = np.zeros((size, resize, resize), np.uint8)
    zeros = np.zeros(size, np.int64)
    return Block(zeros, zeros, images_BRR, [token] * size, [owner] * size, [text] * size, zeros)


def blocks(iterator: Any, resize: int) -> Iterator[Block]:
    """The blocks that one rank's Ray Data iterator delivers, in order."""
    for table in iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=4):
        if table.num_rows:
            yield to_block(table.combine_chunks(), resize)


def to_block(table: pa.Table, resize: int) -> Block:
    """Arrow columns as numpy views."""
    image = table["image"].chunk(0)
    start, stop = image.offset * resize * resize, (image.offset + len(image)) * resize * resize
    pixels = np.frombuffer(image.buffers()[1], np.uint8)[start:stop]
    return Block(
        positions=table["position"].to_numpy(),
        draw_keys=table["draw_key"].to_numpy(),
        images_BRR=pixels.reshape(-1, resize, resize),
        tokens=ragged(table["tokens"]),
        sentence_of_token=ragged(table["sentence_of_token"]),
        sentence_hashes=ragged(table["sentence_hashes"]),
        report_hashes=table["report_hash"].to_numpy(),
    )


def ragged(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Each row of a list column as an array."""
    lists = column.chunk(0)
    offsets = lists.offsets.to_numpy()
    return np.split(lists.values.to_numpy()[offsets[0] : offsets[-1]], (offsets - offsets[0])[1:-1])
