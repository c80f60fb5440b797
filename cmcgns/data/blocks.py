"""Stream rows dealt to the ranks, and cut into blocks of one microbatch on each rank."""

# R rounds, W ranks (world), B studies of a block, F facts of all its ranks' blocks

from collections.abc import Generator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cmcgns.data.record import DEALT, FACTS, Block, to_block


def deal(rows: pa.Table, ranks: int, block_size: int, rounds: int) -> pa.Table:
    """``rows`` cut into blocks that go round the ranks, sorted by rank: all blocks of rank 0 first.

    Each rank gets ``rounds`` blocks, so that the table can be cut into equal parts. At the end of an epoch the missing rows
    are filled with rows of position -1. A column ``DEALT`` tells each rank about the others' blocks, so that ranks need not ask.
    """
    index_RWB = np.arange(rounds * ranks * block_size).reshape(rounds, ranks, block_size)
    index = index_RWB.transpose(1, 0, 2).ravel()
    absent = index >= len(rows)
    dealt = rows.take(np.where(absent, 0, index))
    positions = np.where(absent, -1, dealt["position"].to_numpy())
    dealt = dealt.set_column(dealt.schema.get_field_index("position"), "position", pa.array(positions))
    facts_RW5 = round_facts(rows, index_RWB)
    facts_WRF = np.broadcast_to(facts_RW5.reshape(rounds, -1), (ranks, rounds, ranks * len(FACTS)))
    lengths = np.where(index % block_size == 0, facts_WRF.shape[2], 0)  # only in the first row of a block
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return dealt.append_column(DEALT, pa.ListArray.from_arrays(pa.array(offsets), pa.array(facts_WRF.ravel())))


def round_facts(rows: pa.Table, index_RWB: NDArray[np.int64]) -> NDArray[np.int64]:
    """``FACTS`` of each block, (R, W, 5); ``index_RWB``: its rows, those past the end absent."""
    present_RWB, row_RWB = index_RWB < len(rows), np.minimum(index_RWB, len(rows) - 1)

    def of_rows(values: Any) -> Any:
        return np.where(present_RWB, values.to_numpy()[row_RWB], 0)

    positions_RWB = of_rows(rows["position"])
    facts = (
        present_RWB.sum(2),
        of_rows(pc.list_value_length(rows["sentence_hashes"])).sum(2),
        positions_RWB[:, :, 0],
        positions_RWB.max(2),
        of_rows(rows["draw_key"]).sum(2, dtype=np.int64),
    )
    return np.stack(facts, axis=2).astype(np.int64)


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
