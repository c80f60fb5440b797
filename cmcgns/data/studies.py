"""The studies of a split behind one protocol: listed in a table, or known only by row group (``readers/grouped.py``)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cmcgns.data.order import Arrangement, EpochOrder

if TYPE_CHECKING:
    from cmcgns.data.readers.base import Reader, Source

SAMPLED_AT_ONCE = 1024


class Portion(NamedTuple):
    """Some studies of a split."""

    studies: list[dict[str, Any]]
    """Index rows."""
    reader: "Callable[[Sequence[str]], Reader]"
    """Gives a reader of those films of theirs that are at these paths."""


class Order(Protocol):
    """The order of an epoch."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """Positions where windows start, and the end of the last one."""
        ...


class Studies(Protocol):
    """The studies of one split. It goes to Ray tasks through the object store."""

    @property
    def source(self) -> "Source": ...

    def __len__(self) -> int: ...

    def first(self, studies: int | None) -> Self:
        """The first ``studies`` of them; all if None."""
        ...

    def epoch(self, seed: int, epoch: int, groups_per_window: int) -> Any:
        """The ``Order`` of ``epoch``."""
        ...

    def read(self, order: Any, positions: range) -> Portion:
        """The studies at ``positions`` of an order from ``epoch``."""
        ...

    def samples(self, most: int) -> Iterator[Portion]:
        """The first studies, about ``most``, to read their reports and no films."""
        ...

    def identity(self) -> Iterable[str]:
        """What differs if these are other studies or in another order; compared when a run is resumed."""
        ...

    def ids(self) -> Iterable[str]:
        """The id of each; takes long for a large set."""
        ...


@dataclass(frozen=True)
class ListedStudies:
    """The S studies of a table, in its order."""

    source: "Source"
    table: pa.Table
    """In one piece of memory: taking rows from many is slow."""
    arrangement: Arrangement

    def __len__(self) -> int:
        return len(self.table)

    def first(self, studies: int | None) -> "ListedStudies":
        return replace(self, table=self.table.slice(0, studies), arrangement=self.arrangement.first(studies))

    def epoch(self, seed: int, epoch: int, groups_per_window: int) -> EpochOrder:
        return self.arrangement.epoch(seed, epoch, groups_per_window)

    def read(self, order: EpochOrder, positions: range) -> Portion:
        rows = self.table.take(order.row_S[positions.start : positions.stop])
        return Portion(rows.to_pylist(), self.source.reader)

    def samples(self, most: int) -> Iterator[Portion]:
        for batch in self.table.slice(0, most).to_batches(max_chunksize=SAMPLED_AT_ONCE):
            yield Portion(batch.to_pylist(), partial(self.source.reader, films=False))

    def identity(self) -> Iterable[str]:
        return self.ids()

    def ids(self) -> Iterable[str]:
        ids: list[str] = self.table["study_id"].to_pylist()
        return ids
