"""The contract of a prepared set: the columns of its shards, its manifest, and the hash of what they hold."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cmcgns import storage
from cmcgns.errors import UserError

MANIFEST = "manifest.json"
PLAN = "plan.json"
"""Lies in a set until it is complete."""
VERSION = 1
SPLITS = ("train", "valid", "test")
SHARD_SCHEMA = pa.schema(
    [
        pa.field("patient_id", pa.string()),
        pa.field("study_id", pa.string()),
        pa.field("group", pa.string()),  # what splits keep together
        pa.field("image_id", pa.string()),
        pa.field("view", pa.string()),
        pa.field("split", pa.string()),
        pa.field("image", pa.binary()),  # 8-bit grey, a PNG or a JPEG
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("crop", pa.list_(pa.int32())),  # left, top, right, bottom of what was kept, in pixels of the raw film
        pa.field("report", pa.string()),
        pa.field("sentences", pa.list_(pa.string())),  # normalised, as the model reads them
        pa.field("labels", pa.map_(pa.string(), pa.float32())),
        pa.field("source", pa.string()),  # the film's path in the raw set
    ]
)
"""One row an image-report pair; the rows of a study follow each other."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of a shard."""

    group: int
    """Number of its group among those of its split."""
    rows: int
    studies: int
    content_hash: str


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
class Manifest:
    """What a complete prepared set says of itself."""

    rows: int
    studies: int
    content_hash: str
    """Of all rows in their order, however they are cut into shards."""
    groups: dict[str, int]
    """Groups planned for each split, those included of which no study could be used."""
    shards: list[Shard]
    source: dict[str, Any]
    """The raw set: uri, format, digest of its index."""
    settings: dict[str, Any]
    bad_rows: int
    filtered: dict[str, int]
    summary: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> str:
        """The manifest as it lies in the set; each shard on one line."""
        shards = [asdict(shard) | {"rows": shard.rows, "studies": shard.studies} for shard in self.shards]
        rest = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "shards"}
        lines = ",\n  ".join(json.dumps(shard) for shard in shards)
        return json.dumps(rest, indent=1)[:-2] + f',\n "shards": [\n  {lines}\n ]\n}}\n'


def read_manifest(uri: str) -> Manifest:
    """The manifest of the prepared set at ``uri``; ``UserError`` where it is none of ours."""
    place = storage.join(uri, MANIFEST)
    with well_formed(place, "manifest of a prepared set", "prepare the set again"):
        given: dict[str, Any] = json.loads(storage.read_bytes(place))
        if given["version"] != VERSION:
            raise UserError(
                f"{place} is of version {given['version']}; this code reads version {VERSION}: prepare again"
            )
        shards = [
            Shard(each["name"], each["split"], each["bytes"], [RowGroup(**group) for group in each["row_groups"]])
            for each in given.pop("shards")
        ]
        return Manifest(shards=shards, **given)


@contextmanager
def well_formed(uri: str, what: str, way_out: str) -> Iterator[None]:
    """What does not hold the keys of ``what`` in the JSON file at ``uri`` becomes one message with the ``way_out``."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{uri} is no {what} ({type(error).__name__}); {way_out}") from None


def content_hash(rows: pa.Table) -> str:
    """Hash of the rows' values, the same however Arrow lays them out."""
    digest = hashlib.blake2b(digest_size=16)
    for name in rows.schema.names:
        digest.update(name.encode())
        _add(digest, rows[name].combine_chunks())
    return digest.hexdigest()


def joint_hash(hashes: Iterable[str]) -> str:
    """Hash of row groups' hashes in their order."""
    return hashlib.blake2b("".join(hashes).encode(), digest_size=16).hexdigest()


def _add(digest: Any, values: pa.Array) -> None:
    """Lengths of lists and texts, then what they hold."""
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
