"""Studies as they travel from the decoder to a rank: rows of an Arrow table, then numpy views of one microbatch."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


class ReadStudy(NamedTuple):
    """A study ready for training: its film as a grey square, its report as tokens."""

    draw_key: int
    image_RR: NDArray[np.uint8]
    tokens_T: NDArray[np.int32]
    sentence_of_token_T: NDArray[np.int16]
    sentence_hashes: list[int]
    report_hash: int
    sentences: list[str]


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


def row_table(positions: Sequence[int], studies: Sequence[ReadStudy], resize: int, with_text: bool = False) -> pa.Table:
    """``studies`` as rows of ``row_schema``, each with its position in the epoch's order."""
    schema = row_schema(resize, with_text)
    pixels = np.concatenate([study.image_RR.reshape(-1) for study in studies]) if studies else np.zeros(0, np.uint8)
    columns = {
        "position": pa.array(positions, pa.int64()),
        "draw_key": pa.array([study.draw_key for study in studies], pa.int64()),
        "image": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(resize * resize), len(studies), [None, pa.py_buffer(pixels)]
        ),
        "tokens": _lists([study.tokens_T for study in studies], np.int32),
        "sentence_of_token": _lists([study.sentence_of_token_T for study in studies], np.int16),
        "sentence_hashes": _lists([np.array(study.sentence_hashes, np.int64) for study in studies], np.int64),
        "report_hash": pa.array([study.report_hash for study in studies], pa.int64()),
    }
    if with_text:
        columns["sentences"] = pa.array([study.sentences for study in studies], pa.list_(pa.string()))
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _lists(parts: Sequence[NDArray[Any]], kind: type) -> pa.ListArray:
    """One list a part; made of whole arrays, since Python's lists of numbers take longer than decoding a film."""
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(np.concatenate([*parts, np.zeros(0, kind)]).astype(kind))
    )


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


def deal(rows: pa.Table, ranks: int, block_size: int, rounds: int) -> pa.Table:
    """``rows``, cut into blocks that go round the ranks, in the order of the ranks: all of rank 0's first.

    Each rank gets ``rounds`` blocks, so that the table can be cut into equal parts; what is missing at an epoch's end is
    filled with rows of position -1.
    """
    index_RWB = np.arange(rounds * ranks * block_size).reshape(rounds, ranks, block_size)
    index = index_RWB.transpose(1, 0, 2).ravel()
    absent = index >= len(rows)
    dealt = rows.take(np.where(absent, 0, index))
    positions = np.where(absent, -1, dealt["position"].to_numpy())
    return dealt.set_column(dealt.schema.get_field_index("position"), "position", pa.array(positions))


def blocks(iterator: Any, resize: int, size: int) -> Generator[Block]:
    """The studies that one rank's Ray Data iterator delivers, in order, in blocks of ``size``; the last may be smaller."""
    rest = pa.table({})
    for table in iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        if table.num_rows and table["position"][-1].as_py() < 0:
            table = table.filter(pc.greater_equal(table["position"], 0))
        whole = (pa.concat_tables([rest, table]) if rest.num_rows else table).combine_chunks()
        full = len(whole) - len(whole) % size
        for start in range(0, full, size):
            yield to_block(whole.slice(start, size), resize)
        rest = whole.slice(full)
    if rest.num_rows:
        yield to_block(rest, resize)


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
