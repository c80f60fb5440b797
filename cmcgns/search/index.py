"""An index in use: the nearest films and reports of films, texts or vectors. Needs FAISS, no Ray.

Q queries, k neighbours, D embedding, R side of a padded square.
"""

import io
import os
import weakref
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from PIL import Image

from cmcgns import storage
from cmcgns.errors import UserError
from cmcgns.faiss_install import check_faiss
from cmcgns.library.films import FilmLike
from cmcgns.library.model import Model, device_named
from cmcgns.library.runs import LOAD, PretrainedRun, open_model
from cmcgns.search.manifest import (
    FILMS,
    PICTURES,
    PICTURES_SCHEMA,
    REBUILD,
    REPORTS,
    ROWS,
    ROWS_SCHEMA,
    Manifest,
    missing,
    read_manifest,
    shard_file,
    verified_files,
)
from cmcgns.search.nearest import Floats, Shards, read
from cmcgns.storage import parquet
from cmcgns.storage.errors import BrokenFileError

KEY = "cmcgns.load_index"
"""The key of messages to users of the library."""


@dataclass(frozen=True)
class Case:
    """A film of the index, with the report of its study."""

    cosine: float
    """Similarity to the query, of the film or of the report."""
    study_id: str
    path: str
    """Of the film in its corpus."""
    view: str
    split: str
    sentences: list[str]
    """Of the report, as far as the model read it, normalised."""
    row: int
    """Number of the film in the index."""


@dataclass(frozen=True)
class Found:
    """The nearest cases of one query, nearest first."""

    films: list[Case]
    reports: list[Case]
    """By their reports; the film is the first of the study."""


def load_index(
    where: str | os.PathLike[str],
    model: "Model | str | os.PathLike[str] | None" = None,
    device: str = "cpu",
    trusted: Collection[str] = (),
) -> "Index":
    """The index in the folder or at the `s3://` URI ``where``, with the model that built it.

    ``model``: that model, or where it is now; by default where it was. ``device`` and ``trusted`` are those of ``cmcgns.load``.

    Raises:
        UserError: there is no index, a file of it is missing or changed, or it was built by another model.
    """
    return open_index(KEY, str(where), model, device, trusted)


def open_index(
    key: str,
    where: str,
    model: "Model | str | os.PathLike[str] | None" = None,
    device: str = "cpu",
    trusted: Collection[str] = (),
) -> "Index":
    """``load_index`` for the setting ``key``."""
    check_faiss("cpu")
    uri = storage.absolute(key, where).rstrip("/")
    manifest = read_manifest(uri, key)
    if isinstance(model, Model):
        check_model(uri, manifest, model.run)
        return Index(uri, manifest, model)
    run_uri = manifest.model["uri"] if model is None else str(model)
    if model is None and not storage.exists(run_uri):
        raise UserError(
            f"{key} {uri} was built by {run_uri}, which is not there any more; say where it is now "
            f"({'model=' if key == KEY else 'search.run'})"
        )
    run = open_model(LOAD if key == KEY else "search.run", run_uri, trusted)
    check_model(uri, manifest, run)
    return Index(uri, manifest, Model(run, device_named(device)))


def check_model(uri: str, manifest: Manifest, run: PretrainedRun) -> None:
    """Raise ``UserError`` unless ``run`` has the weights that built the index."""
    wanted, found = manifest.model["identity"], run.identity()
    if found != wanted:
        raise UserError(
            f"index {uri} was built by {manifest.model['uri']} (weights {wanted[:8]}), and {run.uri} is another model (weights "
            f"{found[:8]}): their embeddings cannot be compared. Give the run that built it, or build a new index"
        )


class Index:
    """An index whose vectors and reports have been verified; its pictures are verified as they are read."""

    def __init__(self, uri: str, manifest: Manifest, model: Model) -> None:
        self.uri, self.manifest, self.model = uri, manifest, model
        self._footers = dict[str, tuple[Any, NDArray[np.int64]]]()
        shards, stack = manifest.shards, ExitStack()
        weakref.finalize(self, stack.close)
        scratch = stack.enter_context(storage.scratch_folder())
        self._folder = verified_files(uri, shards, [FILMS, REPORTS, ROWS], scratch)
        for number, shard in enumerate(shards):
            name = shard_file(number, PICTURES)
            if PICTURES in shard.hashes and not storage.exists(storage.join(uri, name)):
                raise missing(uri, name)
        self.films, self.reports = self._read(FILMS, "films"), self._read(REPORTS, "reports")
        tables = [
            parquet.read(str(self._folder / shard_file(number, ROWS)), lambda file: file.read(), ROWS_SCHEMA)
            for number in range(len(shards))
        ]
        self.rows: pa.Table = pa.concat_tables(tables).combine_chunks()
        self._check_counts()

    def __repr__(self) -> str:
        return f"<cmcgns.Index {self.uri}: {len(self.films)} films, {len(self.reports)} reports, {self.manifest.kind}>"

    def search(
        self, films: Iterable[FilmLike] | None = None, texts: Iterable[str] | None = None, k: int = 10
    ) -> list[Found]:
        """The ``k`` nearest films and the ``k`` nearest reports of each film or of each text."""
        if (films is None) == (texts is None):
            raise UserError("search: give either films or texts")
        query_QD = self.model.embed_films(films) if films is not None else self.model.embed_reports(texts or ())
        return self.nearest(query_QD, k)

    def nearest(self, query_QD: Floats, k: int = 10) -> list[Found]:
        """The same for embeddings by the model of the index, rows of length 1."""
        if k < 1:
            raise UserError(f"search: k {k}: give at least 1")
        if not len(query_QD):
            return []
        films = self.films.search(query_QD, min(k, len(self.films)))
        reports = self.reports.search(query_QD, min(k, len(self.reports)))
        return [
            Found(self._cases(film_cosine_k, film_k), self._cases(report_cosine_k, self._report_rows[report_k]))
            for film_cosine_k, film_k, report_cosine_k, report_k in zip(*films, *reports, strict=True)
        ]

    def picture(self, case: Case) -> NDArray[np.uint8] | None:
        """The film of a case as the model reads it, before the crop, (R, R); None if the index was built without pictures.

        Raises:
            UserError: the picture is not what was written.
        """
        wanted = self.rows["picture_hash"][case.row].as_py()
        if not wanted:
            return None
        number = int(np.searchsorted(self.films.start_s, case.row, side="right")) - 1
        name = shard_file(number, PICTURES)
        try:
            png = self._png(storage.join(self.uri, name), int(case.row - self.films.start_s[number]))
        except storage.MissingFileError:
            raise missing(self.uri, name) from None
        except BrokenFileError:
            png = b""
        if xxhash.xxh3_128_hexdigest(png) != wanted:
            raise UserError(f"index {self.uri}: a picture in {name} is not what was written; restore it, or {REBUILD}")
        return np.asarray(Image.open(io.BytesIO(png)))

    @cached_property
    def _report_rows(self) -> NDArray[np.int64]:
        """The row of each report."""
        return np.flatnonzero(self.rows["first"].to_numpy())

    def _read(self, name: str, kind: str) -> Shards:
        files = [shard_file(number, name) for number in range(len(self.manifest.shards))]
        indexes = [read(self._folder / file, f"index {self.uri}: {file}") for file in files]
        return Shards(indexes, self.manifest.share[kind])

    def _check_counts(self) -> None:
        found = [
            (index.ntotal, reports.ntotal, index.d)
            for index, reports in zip(self.films.indexes, self.reports.indexes, strict=True)
        ]
        wanted = [(shard.films, shard.reports, self.model.dim) for shard in self.manifest.shards]
        if found != wanted or len(self.rows) != len(self.films) or len(self._report_rows) != len(self.reports):
            raise UserError(f"index {self.uri}: its files do not belong together; {REBUILD}")

    def _cases(self, cosine_k: Floats, row_k: NDArray[np.int64]) -> list[Case]:
        there = np.isfinite(cosine_k)  # an approximate index may find fewer
        names = ["study_id", "path", "view", "split", "sentences"]
        rows = self.rows.select(names).take(row_k[there]).to_pylist()
        return [
            Case(cosine=float(cosine), row=int(row), **values)
            for cosine, row, values in zip(cosine_k[there], row_k[there], rows, strict=True)
        ]

    def _png(self, uri: str, row: int) -> bytes:
        footer, start_g = self._row_groups(uri)
        group = int(np.searchsorted(start_g, row, side="right")) - 1
        read_group = lambda file: file.read_row_group(group)["png"][row - int(start_g[group])].as_py()
        return bytes(parquet.read(uri, read_group, footer=footer))

    def _row_groups(self, uri: str) -> tuple[Any, NDArray[np.int64]]:
        """The footer of a file of pictures, read once, and the first row of each of its row groups."""
        if uri not in self._footers:
            footer = parquet.read(uri, lambda file: file.metadata, PICTURES_SCHEMA)
            sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
            self._footers[uri] = footer, np.cumsum([0, *sizes])
        return self._footers[uri]
