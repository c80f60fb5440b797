"""A large prepared set, known by row group: what driver and tasks hold of it is one entry per row group, none per study.

A task reads the row groups of its window, and with them the ids by which their studies are shuffled. The order is that of
``Arrangement``, bit for bit.
"""

# R row groups of a split, G groups, T turns of an epoch (one for each group), C hashed columns

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cmcgns import storage
from cmcgns.data.manifest import HASHED_COLUMNS, MANIFEST, Manifest, Shard, well_formed
from cmcgns.data.order import EpochDraw, mixed, study_keys
from cmcgns.data.readers.base import canonical_view, filter_views, wanted_views
from cmcgns.data.readers.prepared import (
    READ_THREADS,
    PreparedSource,
    RowGroups,
    check_index,
    check_sizes,
    checked_content,
    paths_in,
    read_columns,
)
from cmcgns.data.record import FILM_TYPE, PREPARED_INDEX, index_of_prepared, index_table
from cmcgns.data.studies import Portion
from cmcgns.errors import BadRow, UserError
from cmcgns.storage.ahead import map_ahead

LISTED_STUDIES = 2**18
"""A set of more studies is not listed. The index of this many takes some 250 MiB; MIMIC-CXR has 227,835."""
HASH_BYTES = 16


@dataclass(frozen=True)
class GroupOrder:
    """The order of an epoch by group."""

    group_T: NDArray[np.int32]
    salt: np.int64 | None
    """As in ``EpochDraw``."""
    groups_per_window: int
    starts: NDArray[np.int64]

    def groups(self, window: int) -> NDArray[np.int32]:
        """The groups of ``window``."""
        first = window * self.groups_per_window
        return self.group_T[first : first + self.groups_per_window]


class ReadGroup(NamedTuple):
    """One row group, as far as it could be read."""

    studies: pa.Table
    """Index rows; they have no ids if the row group could not be read at all."""
    are_known: bool
    content: pa.Table | BadRow


@dataclass(frozen=True)
class GroupedStudies:
    """The studies of one split of a prepared set, by row group in the order of the set."""

    source: PreparedSource
    shards: tuple[str, ...]
    groups: int
    """Groups planned for the split."""
    shard_R: NDArray[np.int32]
    """Index of each row group's shard."""
    number_R: NDArray[np.int32]
    """Its place in the shard."""
    group_R: NDArray[np.int32]
    """Its group, ascending."""
    rows_R: NDArray[np.int32]
    studies_R: NDArray[np.int32]
    """Studies with a film of the wanted views."""
    hash_RC: NDArray[np.uint8]
    """Hashes of ``HASHED_COLUMNS`` (R, C, 16); empty for a set of version 1."""
    identified_by: str
    """Hash of the set's content, and what was chosen of it."""
    cut: int = -1
    """The row group of which only the first studies count."""

    def __len__(self) -> int:
        return int(self.studies_R.sum(dtype=np.int64))

    def first(self, studies: int | None) -> "GroupedStudies":
        if studies is None:
            return self
        before_R = np.cumsum(self.studies_R, dtype=np.int64) - self.studies_R
        kept_R = np.clip(studies - before_R, 0, self.studies_R).astype(np.int32)
        cut = int(np.flatnonzero(kept_R)[-1]) if kept_R.any() else -1
        return replace(self, studies_R=kept_R, identified_by=f"{self.identified_by} {studies}", cut=cut)

    def epoch(self, seed: int, epoch: int, groups_per_window: int) -> GroupOrder:
        draw = EpochDraw.of(seed, epoch, self.groups)
        group_T = np.empty(self.groups, np.int32)
        group_T[draw.turn_G] = np.arange(self.groups)
        studies_T = np.zeros(self.groups, np.int64)
        studies_T[draw.turn_G[self.group_R]] = self.studies_R
        windows = np.add.reduceat(studies_T, np.arange(0, self.groups, groups_per_window))
        return GroupOrder(group_T, draw.salt, groups_per_window, np.concatenate([[0], np.cumsum(windows)]))

    def read(self, order: GroupOrder, positions: range) -> Portion:
        first = int(order.starts.searchsorted(positions.start, "right")) - 1
        end = int(order.starts.searchsorted(positions.stop, "left"))
        parts, content = list[pa.Table](), dict[str, pa.Table | BadRow]()
        for window in range(first, end):
            start = int(order.starts[window])
            if start == order.starts[window + 1]:  # all its groups are lost, or have no film of the wanted views
                continue
            studies, found = self._window(order, window)
            parts.append(studies.slice(max(positions.start - start, 0), positions.stop - max(positions.start, start)))
            content |= found
        studies = pa.concat_tables(parts).to_pylist() if parts else []
        return Portion(studies, lambda paths: RowGroups(content))

    def samples(self, most: int) -> Iterator[Portion]:
        """The studies of the first row groups with ``most`` studies."""
        some = np.flatnonzero(self.studies_R)
        some = some[: np.searchsorted(np.cumsum(self.studies_R[some]), most) + 1]
        for row, found in zip(some.tolist(), self._read_all(some, ("sentences",)), strict=True):
            content = {self._name(row): found.content}
            yield Portion(found.studies.to_pylist()[:most], lambda paths, content=content: RowGroups(content))  # type: ignore[misc]
            most -= len(found.studies)

    def identity(self) -> Sequence[str]:
        """Hash of the content, since their ids are not at hand."""
        return [self.identified_by]

    def ids(self) -> Iterator[str]:
        """The ids by which a list of them is identified; reads the index of the split."""
        for found in self._read_all(np.flatnonzero(self.studies_R), ()):
            yield from found.studies["study_id"].to_pylist()

    def _window(self, order: GroupOrder, window: int) -> tuple[pa.Table, dict[str, pa.Table | BadRow]]:
        """The studies of ``window`` in their order, and the row groups that they are in."""
        row_r = np.flatnonzero(np.isin(self.group_R, order.groups(window)) & (self.studies_R > 0))
        found = list(self._read_all(row_r, ("image", "sentences")))
        studies = pa.concat_tables([each.studies for each in found]).combine_chunks()
        if order.salt is not None:
            unknown = np.concatenate([np.full(len(each.studies), not each.are_known) for each in found])
            studies = studies.take(np.lexsort((mixed(study_keys(studies), order.salt), unknown)))
        return studies, {self._name(row): each.content for row, each in zip(row_r.tolist(), found, strict=True)}

    def _read_all(self, rows: NDArray[np.int64], columns: tuple[str, ...]) -> Iterator[ReadGroup]:
        return map_ahead(partial(self._read_group, columns), rows.tolist(), min(len(rows), READ_THREADS) or 1)

    def _read_group(self, columns: tuple[str, ...], row: int) -> ReadGroup:
        """Row group ``row``, its index verified; ``UserError`` if that is not what the manifest says."""
        uri, name, studies = self.source.uri, self._name(row), int(self.studies_R[row])
        rows = read_columns(uri, name, (*PREPARED_INDEX, *columns))
        if isinstance(rows, BadRow):
            return ReadGroup(unknown_studies(name, studies), False, rows)
        same_shard = slice(*np.searchsorted(self.shard_R, [self.shard_R[row], self.shard_R[row] + 1]))
        check_sizes(uri, name.rpartition("#")[0], self.rows_R[same_shard].tolist())
        hashes = self._hashes(row)
        index = rows.select(PREPARED_INDEX)
        check_index(uri, name, index, hashes)
        index = index.append_column("path", pa.array(paths_in(name, len(rows)), pa.string()))
        found = usable_studies(index, self.source.views)
        if len(found) < studies or (len(found) > studies and row != self.cut):
            place = storage.join(uri, name)
            raise UserError(f"{place} has {len(found)} studies, the manifest says {studies}; prepare the set again")
        return ReadGroup(found.slice(0, studies), True, checked_content(name, rows.select(columns), hashes))

    def _hashes(self, row: int) -> dict[str, str]:
        if not len(self.hash_RC):
            return {}
        return {name: digest.tobytes().hex() for name, digest in zip(HASHED_COLUMNS, self.hash_RC[row], strict=True)}

    def _name(self, row: int) -> str:
        return f"{self.shards[self.shard_R[row]]}#{self.number_R[row]}"


def usable_studies(rows: pa.Table, views: Sequence[str]) -> pa.Table:
    """``INDEX_SCHEMA`` of the studies with a film of ``views``, from ``PREPARED_INDEX`` and paths."""
    films, _ = filter_views(rows.drop_columns(["labels"]).to_pandas(), views)
    return index_of_prepared(films, rows["labels"])


def unknown_studies(row_group: str, studies: int) -> pa.Table:
    """``INDEX_SCHEMA`` of the studies of a row group that cannot be read: each is a bad row, named after its place."""
    film = dict.fromkeys((each.name for each in FILM_TYPE), "")
    rows = [
        {"study_id": path, "films": [film | {"image_id": path, "path": path}], "report_path": path, "labels": []}
        for path in paths_in(row_group, studies)
    ]
    return index_table(rows)


class Entry(NamedTuple):
    """What is kept of a shard's entry in the manifest."""

    name: str
    number_r: NDArray[np.int32]
    group_r: NDArray[np.int32]
    rows_r: NDArray[np.int32]
    studies_r: NDArray[np.int32]
    hash_rC: NDArray[np.uint8]

    @classmethod
    def of(cls, shard: Shard, studies: Sequence[int], verified: bool) -> "Entry":
        """The entry of ``shard``, of whose row groups so many ``studies`` are usable; ``verified``: the set has hashes."""
        groups = shard.row_groups
        digests = [group.columns[name] for group in groups for name in HASHED_COLUMNS] if verified else []
        hash_rC = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, len(HASHED_COLUMNS), HASH_BYTES)
        group_r, rows_r = (np.array([getattr(each, name) for each in groups], np.int32) for name in ("group", "rows"))
        return cls(
            shard.name, np.arange(len(groups), dtype=np.int32), group_r, rows_r, np.array(studies, np.int32), hash_rC
        )


def grouped_splits(source: PreparedSource) -> tuple[dict[str, GroupedStudies], dict[str, int]]:
    """The studies of each split of a prepared set, and its films of other views by reason; reads the manifest, by parts."""
    manifest, path = source.open_manifest(), storage.join(source.uri, MANIFEST)
    entries, filtered = defaultdict[str, list[Entry]](list), Counter[str]()
    with well_formed(path, "manifest of a prepared set", "prepare the set again"):
        for shard, studies, excluded in counted(source, manifest):
            entries[shard.split].append(Entry.of(shard, studies, manifest.version > 1))
            filtered.update(excluded)
        splits = {split: _joined(source, manifest, split, entries.pop(split)) for split in sorted(entries)}
        for split in splits.values():
            if (np.diff(split.group_R) <= 0).any() or not 0 <= split.group_R[0] <= split.group_R[-1] < split.groups:
                raise UserError(f"{path}: its row groups are not in the order of their groups; prepare the set again")
    return splits, dict(sorted(filtered.items()))


def _joined(source: PreparedSource, manifest: Manifest, split: str, entries: list[Entry]) -> GroupedStudies:
    names, *columns = zip(*entries, strict=True)
    shard_R = np.repeat(np.arange(len(names), dtype=np.int32), [len(numbers) for numbers in columns[0]])
    number_R, group_R, rows_R, studies_R, hash_RC = map(np.concatenate, columns)
    chosen = f"{manifest.content_hash} {split} {' '.join(sorted(wanted_views(source.views)))}"
    return GroupedStudies(
        source, names, manifest.groups[split], shard_R, number_R, group_R, rows_R, studies_R, hash_RC, chosen
    )


def counted(source: PreparedSource, manifest: Manifest) -> Iterator[tuple[Shard, list[int], dict[str, int]]]:
    """Each shard with the usable studies of its row groups, and its films of other views by reason."""
    views = {view for split in manifest.summary.get("splits", {}).values() for view in split["views"]}
    if views and {canonical_view(view) for view in views} <= wanted_views(source.views):
        for shard in manifest.shards:
            yield shard, [group.studies for group in shard.row_groups], {}
        return
    # the manifest does not say which studies have which views
    yield from map_ahead(partial(_count_shard, source), manifest.shards, READ_THREADS)


def _count_shard(source: PreparedSource, shard: Shard) -> tuple[Shard, list[int], dict[str, int]]:
    studies, filtered = list[int](), Counter[str]()
    for number, group in enumerate(shard.row_groups):
        name = f"{shard.name}#{number}"
        rows = read_columns(source.uri, name, ("study_id", "view"))
        if isinstance(rows, BadRow):
            raise UserError(
                f"{storage.join(source.uri, shard.name)}: {rows}, and its views cannot be counted; restore it"
            )
        check_sizes(source.uri, shard.name, [each.rows for each in shard.row_groups])
        check_index(source.uri, name, rows, group.columns)
        films, excluded = filter_views(rows.to_pandas(), source.views)
        studies.append(films["study_id"].nunique())
        filtered.update(excluded)
    return shard, studies, filtered
