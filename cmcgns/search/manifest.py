"""index.json: what an index holds, by which model, and the hash of each of its files. All of it is verified before it is used."""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from cmcgns import storage
from cmcgns.data.manifest import self_hash, well_formed
from cmcgns.errors import UserError
from cmcgns.search.nearest import Kind
from cmcgns.storage.integrity import CHUNK, HASH_THREADS, hash_uri

INDEX = "index.json"
PLAN = "plan.json"
"""Present in an index until it is complete."""
VERSION = 1
FILMS, REPORTS, ROWS, PICTURES = "films.faiss", "reports.faiss", "rows.parquet", "pictures.parquet"
"""Files of a shard."""
ROWS_SCHEMA = pa.schema(
    [
        pa.field("study_id", pa.string()),
        pa.field("path", pa.string()),  # of the film in its corpus
        pa.field("view", pa.string()),
        pa.field("split", pa.string()),
        pa.field("first", pa.bool_()),  # first usable film of its study: this row's report is in reports.faiss
        pa.field("report_hash", pa.int64()),
        pa.field("sentences", pa.list_(pa.string())),  # normalised, as the model reads them
        pa.field("picture_hash", pa.string()),  # XXH3 of the picture; '' without pictures
    ]
)
"""One row per film."""
PICTURES_SCHEMA = pa.schema([pa.field("png", pa.binary())])
"""The padded square that the model crops, by row."""
REBUILD = "build the index again: delete its folder and repeat the command that built it"


def shard_file(number: int, name: str) -> str:
    """Name of a file of shard ``number``."""
    return f"shard-{number:05d}.{name}"


@dataclass(frozen=True)
class Shard:
    """A complete part of an index."""

    films: int
    reports: int
    hashes: dict[str, str]
    """By file."""


@dataclass(frozen=True)
class Manifest:
    """Description of a complete index."""

    model: dict[str, str]
    """`uri`, `identity` and `method` of the run."""
    dim: int
    resize: int
    """Side of the pictures in pixels."""
    corpus: dict[str, Any]
    """`uri`, `format`, `split`, and `digest` of the list of films."""
    kind: Kind
    share: dict[str, float]
    """Share of the inverted lists that a search looks into, of films and of reports; 1 for flat."""
    recall_at_10: dict[str, dict[str, float]]
    """Of films and of reports by kind of query, against flat on a sample; empty for flat, which is exact."""
    shards: list[Shard]
    bad_rows: int
    versions: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def films(self) -> int:
        return sum(shard.films for shard in self.shards)

    @property
    def reports(self) -> int:
        return sum(shard.reports for shard in self.shards)

    def to_json(self) -> bytes:
        """Content of index.json."""
        fields = asdict(self) | {"films": self.films, "reports": self.reports}
        return (json.dumps(fields | {"hash": self_hash(fields)}, indent=1) + "\n").encode()


def read_manifest(uri: str, key: str = "search.index") -> Manifest:
    """The manifest of the index in the folder ``uri``, the value of ``key``.

    Raises:
        UserError: there is no index, it is incomplete, or index.json is not what was written.
    """
    path = storage.join(uri, INDEX)
    if not storage.exists(path):
        if storage.exists(storage.join(uri, PLAN)):
            raise UserError(f"{key} {uri} is an incomplete index; repeat the command that builds it to complete it")
        raise UserError(f"{key} {uri} has no {INDEX}; give the folder of an index, or build one with search.run")
    with well_formed(path, "description of an index", REBUILD):
        fields: dict[str, Any] = json.loads(storage.read_bytes(path))
        if fields["version"] != VERSION:
            raise UserError(f"{path} has version {fields['version']}, this code reads version {VERSION}; {REBUILD}")
        if fields.pop("hash") != self_hash(fields):
            raise UserError(f"{path} is not what was written; restore it, or {REBUILD}")
        counts = fields.pop("films"), fields.pop("reports")
        manifest = Manifest(**fields | {"shards": [Shard(**shard) for shard in fields["shards"]]})
        if counts != (manifest.films, manifest.reports):
            raise ValueError("counts")
        return manifest


def verified_files(uri: str, shards: Sequence[Shard], names: Sequence[str], scratch: Path) -> Path:
    """The local folder with the files ``names`` of all ``shards`` of the index at ``uri``: its own, or ``scratch`` for S3.

    Raises:
        UserError: one of them is missing or is not what was written.
    """
    folder = scratch if storage.is_s3(uri) else Path(storage.filesystem(uri)[1])

    def check(file: str, wanted: str) -> None:
        try:
            if storage.is_s3(uri):
                with (folder / file).open("wb") as copy:
                    storage.read(storage.join(uri, file), lambda source: shutil.copyfileobj(source, copy, CHUNK))
            found = hash_uri(str(folder / file))
        except storage.MissingFileError:
            raise missing(uri, file) from None
        if found != wanted:
            raise UserError(f"index {uri}: {file} is not what was written; restore it, or {REBUILD}")

    files = [(shard_file(number, name), shard.hashes[name]) for number, shard in enumerate(shards) for name in names]
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        list(threads.map(check, *zip(*files, strict=True)))
    return folder


def missing(uri: str, file: str) -> UserError:
    """The error that a file of the index is gone."""
    return UserError(f"index {uri}: {file} is missing; restore it, or {REBUILD}")
