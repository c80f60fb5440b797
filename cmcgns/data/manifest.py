"""The manifest of a prepared set and the hash of its content; its columns are in ``record``.

The entries of many shards are in parts, files beside ``manifest.json``, which has their hashes: they are written and read one
after another, so that nothing holds an entry per shard.
"""

import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from cmcgns import storage
from cmcgns.data.record import PREPARED_INDEX
from cmcgns.errors import UserError
from cmcgns.storage.ahead import map_ahead

MANIFEST = "manifest.json"
PLAN = "plan.json"
"""Present in a set until it is complete."""
VERSION = 2
"""2 since row groups have hashes of their columns and the manifest one of itself; sets of version 1 are read unverified."""
VERSION_IN_PARTS = 3
INLINE_SHARDS = 1000
"""A manifest of more shards is in parts."""
SHARDS_PER_PART = 64
"""About 1 MB."""
PARTS_AHEAD = 4
PART = "manifest/{:05d}.jsonl"
SPLITS = ("train", "valid", "test")
HASHED_COLUMNS = (*PREPARED_INDEX, "report", "sentences", "image")
"""Columns that are read by themselves."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of a shard."""

    group: int
    """Index of its group among those of the split."""
    rows: int
    studies: int
    content_hash: str
    """Of all columns, as `--prepare.check` computes it."""
    columns: dict[str, str] = field(default_factory=dict)
    """Hash of each of ``HASHED_COLUMNS``; empty in version 1."""


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a prepared set."""

    name: str
    split: str
    bytes: int
    row_groups: list[RowGroup]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)

    @property
    def studies(self) -> int:
        return sum(group.studies for group in self.row_groups)


@dataclass(frozen=True)
class ShardParts(Collection[Shard]):
    """The shards of a manifest in parts; iterating reads and verifies one part after another."""

    uri: str
    """The prepared set."""
    hashes: list[str]
    """Of each part."""
    count: int
    """Number of shards."""

    def __len__(self) -> int:
        return self.count

    def __contains__(self, shard: object) -> bool:
        return any(each == shard for each in self)

    def __iter__(self) -> Iterator[Shard]:
        for part in map_ahead(self._part, range(len(self.hashes)), PARTS_AHEAD):
            yield from part

    def _part(self, number: int) -> list[Shard]:
        path = part_path(self.uri, number)
        content = storage.read_bytes(path)
        if xxhash.xxh3_128_hexdigest(content) != self.hashes[number]:
            raise UserError(f"{path} is not what was written; restore it, or prepare the set again")
        with well_formed(path, "part of a manifest", "prepare the set again"):
            return [_as_shard(json.loads(line)) for line in content.splitlines()]


def part_path(uri: str, number: int) -> str:
    """URI of a part of the manifest of the set at ``uri``."""
    return storage.join(uri, PART.format(number))


def part_names(manifest: "Manifest") -> list[str]:
    """Paths of the parts of a manifest in its set."""
    shards = manifest.shards
    return [PART.format(number) for number in range(len(shards.hashes))] if isinstance(shards, ShardParts) else []


def write_shards(uri: str, shards: Iterable[Shard], count: int) -> list[Shard] | ShardParts:
    """``count`` shards as a manifest holds them: themselves, or if they are many the parts that are written here."""
    if count <= INLINE_SHARDS:
        return list(shards)
    hashes, rest = list[str](), iter(shards)
    while part := list(itertools.islice(rest, SHARDS_PER_PART)):
        content = "".join(json.dumps(_as_entry(shard)) + "\n" for shard in part).encode()
        storage.write_bytes(part_path(uri, len(hashes)), content)
        hashes.append(xxhash.xxh3_128_hexdigest(content))
    return ShardParts(uri, hashes, count)


def _as_entry(shard: Shard) -> dict[str, Any]:
    return asdict(shard) | {"rows": shard.rows, "studies": shard.studies}


def _as_shard(entry: dict[str, Any]) -> Shard:
    return Shard(entry["name"], entry["split"], entry["bytes"], [RowGroup(**group) for group in entry["row_groups"]])


@dataclass(frozen=True)
class Manifest:
    """Description of a complete prepared set."""

    rows: int
    studies: int
    content_hash: str
    """Hash of all rows in order; does not depend on how they are cut into shards."""
    groups: dict[str, int]
    """Groups planned for each split, including those without a usable study."""
    shards: list[Shard] | ShardParts
    source: dict[str, Any]
    """The raw set: uri, format, digest of its index."""
    settings: dict[str, Any]
    bad_rows: int
    filtered: dict[str, int]
    summary: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @property
    def has_reports(self) -> bool:
        """Whether studies have reports."""
        return bool(self.settings.get("reports", True))  # sets of earlier versions do

    def to_json(self) -> str:
        """The content of manifest.json, with one line per shard, or with the hashes of its parts."""
        rest = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "shards"}
        if isinstance(self.shards, ShardParts):
            rest |= {"version": VERSION_IN_PARTS, "parts": self.shards.hashes, "shards": len(self.shards)}
            return json.dumps(rest | {"hash": self_hash(rest)}, indent=1) + "\n"
        shards = [_as_entry(shard) for shard in self.shards]
        rest["hash"] = self_hash(rest | {"shards": shards})
        lines = ",\n  ".join(json.dumps(shard) for shard in shards)
        return json.dumps(rest, indent=1)[:-2] + f',\n "shards": [\n  {lines}\n ]\n}}\n'


def read_manifest(uri: str) -> Manifest:
    """The manifest of the prepared set at ``uri``; ``UserError`` if it is not valid."""
    path = storage.join(uri, MANIFEST)
    with well_formed(path, "manifest of a prepared set", "prepare the set again"):
        fields: dict[str, Any] = json.loads(storage.read_bytes(path))
        if fields["version"] not in (1, VERSION, VERSION_IN_PARTS):
            raise UserError(
                f"{path} has version {fields['version']}, this code reads up to version {VERSION_IN_PARTS}; prepare the set again"
            )
        if fields.pop("hash", None) != (self_hash(fields) if fields["version"] > 1 else None):
            raise UserError(f"{path} is not what was written; restore it, or prepare the set again")
        if fields["version"] == VERSION_IN_PARTS:
            return Manifest(shards=ShardParts(uri, fields.pop("parts"), fields.pop("shards")), **fields)
        return Manifest(shards=[_as_shard(each) for each in fields.pop("shards")], **fields)


@contextmanager
def well_formed(uri: str, kind: str, fix: str) -> Iterator[None]:
    """Turn errors from parsing the JSON file at ``uri`` into one message that it is not a ``kind``, with the ``fix``."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise UserError(f"{uri} is not a {kind} ({type(error).__name__}); {fix}") from None


def self_hash(fields: dict[str, Any]) -> str:
    """Hash of everything in a manifest but this hash."""
    rest = {name: value for name, value in fields.items() if name != "hash"}
    as_read = json.loads(json.dumps(rest))  # keys that are numbers become strings
    return xxhash.xxh3_128_hexdigest(json.dumps(as_read, sort_keys=True).encode())


def describe_row_group(number: int, rows: pa.Table, studies: int) -> RowGroup:
    """The manifest's entry for group ``number`` of a split, whose ``rows`` are those of ``studies`` studies."""
    columns = {name: column_hash(rows[name]) for name in HASHED_COLUMNS}
    return RowGroup(number, len(rows), studies, content_hash(rows), columns)


def column_hash(values: pa.ChunkedArray) -> str:
    """Hash of one column of a row group: XXH3, so that it costs a small part of decoding a film."""
    digest = xxhash.xxh3_128()
    _add(digest, values.combine_chunks())
    return digest.hexdigest()


def content_hash(rows: pa.Table) -> str:
    """Hash of the rows' values; does not depend on Arrow's memory layout."""
    digest = hashlib.blake2b(digest_size=16)
    for name in rows.schema.names:
        digest.update(name.encode())
        _add(digest, rows[name].combine_chunks())
    return digest.hexdigest()


def joint_hash(hashes: Iterable[str]) -> str:
    """Hash of the hashes of row groups, in order."""
    return hashlib.blake2b("".join(hashes).encode(), digest_size=16).hexdigest()


def _add(digest: Any, values: pa.Array) -> None:
    """Add the lengths of lists and strings, then their content."""
    if isinstance(values, pa.ChunkedArray):
        values = values.chunk(0) if values.num_chunks else pa.array([], values.type)
    kind = values.type
    if values.null_count:
        digest.update(np.packbits(np.asarray(values.is_valid())).tobytes())
        values = values.fill_null(b"" if pa.types.is_binary(kind) else "") if not pa.types.is_nested(kind) else values
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        offsets = np.frombuffer(values.buffers()[1], np.int32)[values.offset : values.offset + len(values) + 1]
        digest.update(np.diff(offsets).astype("<i4").tobytes())
        if len(values):
            digest.update(memoryview(values.buffers()[2] or b"")[offsets[0] : offsets[-1]])
    elif pa.types.is_list(kind) or pa.types.is_map(kind):
        offsets = values.offsets.to_numpy()
        digest.update(np.diff(offsets).astype("<i4").tobytes())
        inner = [values.values] if pa.types.is_list(kind) else [values.keys, values.items]
        for each in inner:
            _add(digest, each.slice(offsets[0], offsets[-1] - offsets[0]))
    elif pa.types.is_struct(kind):
        for each in values.flatten():
            _add(digest, each)
    else:
        digest.update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False)).tobytes())
