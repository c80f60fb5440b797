"""One shard of an index: which films it has, and the writer of its files.

N films of the shard, D embedding.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import xxhash
from numpy.typing import NDArray

from cmcgns import storage
from cmcgns.search import nearest
from cmcgns.search.manifest import FILMS, PICTURES, PICTURES_SCHEMA, REPORTS, ROWS, ROWS_SCHEMA, Shard, shard_file
from cmcgns.storage.integrity import hash_file

PICTURES_PER_GROUP = 16
"""Pictures that are read together with one."""
DONE = "json"
"""File that makes a shard complete, gone when the index is."""


def shard_bounds(studies: pa.Table, shard_films: int) -> list[int]:
    """The first film of each shard and the end: ``shard_films`` each, and more if a study would be cut."""
    ids = studies["study_id"].combine_chunks()
    starts_F = np.flatnonzero(np.append(True, pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)))
    wanted = np.arange(0, len(ids), shard_films)
    first = np.unique(np.append(starts_F, len(ids))[np.searchsorted(starts_F, wanted)])
    return [*first[first < len(ids)].tolist(), len(ids)]


def in_shards(tables: Iterable[pa.Table], bounds: Sequence[int]) -> Iterator[tuple[int, pa.Table | None]]:
    """The rows of ``tables``, which come in order of `position`, as (shard, rows), and (shard, None) once a shard has all of its
    rows; the shards begin at ``bounds``, without the last, which is the end."""
    number = 0
    for table in tables:
        position_B = table["position"].to_numpy()
        if not len(position_B):
            continue
        cuts = np.searchsorted(position_B, bounds[number + 1 :])
        start = 0
        for cut in cuts:
            if cut > start:
                yield number, table.slice(start, cut - start)
            if cut == len(position_B):
                break
            yield number, None
            number, start = number + 1, int(cut)
    while number < len(bounds) - 1:  # the last rows of a shard may be unusable
        yield number, None
        number += 1


def vectors(rows_BD: torch.Tensor) -> pa.Array:
    """Embeddings as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows_BD.float().cpu().numpy().ravel()), rows_BD.shape[1])


def matrix(column: pa.ChunkedArray, dim: int) -> NDArray[np.float32]:
    """The column of ``vectors`` as (N, D)."""
    parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
    return np.concatenate([np.zeros(0, np.float32), *parts]).reshape(-1, dim)


class ShardWriter:
    """Writes one shard: pictures as they come, the other files at the end."""

    def __init__(self, uri: str, number: int, kind: nearest.Kind, dim: int, pictures: bool) -> None:
        self.uri, self.number, self.kind, self.dim = uri, number, kind, dim
        self.tables: list[pa.Table] = []
        self.stack = ExitStack()
        self.pictures = self._scratch(PICTURES) if pictures else None
        self.png = None
        if self.pictures is not None:  # statistics and dictionaries would hold whole pictures once more
            options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
            self.png = pq.ParquetWriter(self.pictures, PICTURES_SCHEMA, **options)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self.png is not None:
            self.png.close()
        self.stack.close()

    def add(self, table: pa.Table) -> None:
        """Add rows as ``EmbedFilms`` returns them."""
        png = table["png"].to_pylist()
        hashes = [xxhash.xxh3_128_hexdigest(each) if self.png else "" for each in png]
        if self.png is not None:
            self.png.write_table(table.select(["png"]).cast(PICTURES_SCHEMA), row_group_size=PICTURES_PER_GROUP)
        kept = table.drop_columns(["png"]).take(
            np.arange(len(table))
        )  # a copy: a view would keep the pictures in Ray's memory
        self.tables.append(kept.append_column("picture_hash", pa.array(hashes, pa.string())))

    def finish(self) -> Shard:
        """Write the shard; the file that makes it complete comes last."""
        table = pa.concat_tables([self._no_rows(), *self.tables])
        ids = table["study_id"].to_pylist()
        first_N = np.array([row == 0 or ids[row] != ids[row - 1] for row in range(len(ids))], bool)
        rows = table.append_column("first", pa.array(first_N)).select(ROWS_SCHEMA.names).cast(ROWS_SCHEMA)
        hashes = dict[str, str]()
        if self.png is not None and self.pictures is not None:
            self.png.close()
            hashes[PICTURES] = self._put(self.pictures, PICTURES)
        path = self._scratch(ROWS)
        pq.write_table(rows, path, compression="zstd")
        hashes[ROWS] = self._put(path, ROWS)
        for name, vector_ND in (
            (FILMS, matrix(table["film"], self.dim)),
            (REPORTS, matrix(table["report"], self.dim)[first_N]),
        ):
            path = self._scratch(name)
            nearest.write(nearest.build(vector_ND, self.kind), path)
            hashes[name] = self._put(path, name)
        shard = Shard(len(ids), int(first_N.sum()), hashes)
        storage.write_bytes(storage.join(self.uri, shard_file(self.number, DONE)), json.dumps(asdict(shard)).encode())
        return shard

    def _no_rows(self) -> pa.Table:
        """An empty table as ``add`` keeps them: every film of a shard may be unusable."""
        kept = {each.name: each.type for each in ROWS_SCHEMA if each.name != "first"}
        vector = pa.list_(pa.float32(), self.dim)
        of_actor = {"position": pa.int64(), **kept, "film": vector, "report": vector}
        del of_actor["picture_hash"]
        return pa.schema(of_actor | {"picture_hash": pa.string()}).empty_table()

    def _scratch(self, name: str) -> Path:
        return self.stack.enter_context(storage.scratch_file(storage.join(self.uri, shard_file(self.number, name))))

    def _put(self, local: Path, name: str) -> str:
        found = hash_file(local)
        storage.put_file(local, storage.join(self.uri, shard_file(self.number, name)))
        return found
