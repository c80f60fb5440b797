"""Stream rows dealt to the ranks, and cut into blocks of one microbatch on each rank."""

# R rounds, W ranks (world), B studies of a block

from collections.abc import Generator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cmcgns.data.record import Block, to_block


def deal(rows: pa.Table, ranks: int, block_size: int, rounds: int) -> pa.Table:
    """``rows`` cut into blocks that go round the ranks, sorted by rank: all blocks of rank 0 first.

    Each rank gets ``rounds`` blocks, so that the table can be cut into equal parts. At the end of an epoch the missing rows
    are filled with rows of position -1.
    """
    index_RWB = np.arange(rounds * ranks * block_size).reshape(rounds, ranks, block_size)
    index = index_RWB.transpose(1, 0, 2).ravel()
    absent = index >= len(rows)
    dealt = rows.take(np.where(absent, 0, index))
    positions = np.where(absent, -1, dealt["position"].to_numpy())
    return dealt.set_column(dealt.schema.get_field_index("position"), "position", pa.array(positions))


def blocks(iterator: Any, resize: int, size: int) -> Generator[Block]:
    """The studies from one rank's Ray Data iterator, in order, in blocks of ``size``; the last one may be smaller."""
    rest = pa.table({})
    for table in iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        if table.num_rows and table["position"][-1].as_py() < 0:
            table = table.filter(pc.greater_equal(table["position"], 0))
        rows = (pa.concat_tables([rest, table]) if rest.num_rows else table).combine_chunks()
        end = len(rows) - len(rows) % size
        for start in range(0, end, size):
            yield to_block(rows.slice(start, size), resize)
        rest = rows.slice(end)
    if rest.num_rows:
        yield to_block(rest, resize)
