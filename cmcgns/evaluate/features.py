"""Features of frozen encoders: each film is read once for all of them, by Ray Data, and what comes out is kept in Parquet.

N images, C channels of the backbone, D embedding, R pixels of the stored square.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray

from cmcgns import storage
from cmcgns.data.batch import crop, normalise
from cmcgns.data.image import resize_image
from cmcgns.data.labelled.base import ImageSet, ImageSource
from cmcgns.data.readers import Reader
from cmcgns.data.stream import FETCH_THREADS, fetched, ordered_context
from cmcgns.errors import BadRow
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.encoders import EncoderSpec

logger = logging.getLogger(__name__)
Floats = NDArray[np.float32]
PIECE_FILMS = 64
PIECES_AHEAD = 8
"""Pieces of decoded films that may wait for the encoders."""
SHOWN_BY = ("target", "crop_borders", "height", "width")
"""Settings of a source, where it has them, by which films of the same ids look otherwise."""


@dataclass(frozen=True)
class Features:
    """What one encoder sees on the images of a set that could be read, in the set's order."""

    image_ids: list[str]
    pooled_NC: Floats
    shared_ND: Floats | None
    """Rows of length 1 in the space of the reports; None for an encoder that knows no reports."""

    def of(self, image_ids: Sequence[str]) -> "tuple[NDArray[np.int64], Features]":
        """Which of ``image_ids`` are there, by place, and their features in that order."""
        row_of = {image_id: row for row, image_id in enumerate(self.image_ids)}
        places = np.array([i for i, image_id in enumerate(image_ids) if image_id in row_of], np.int64)
        rows = np.array([row_of[image_ids[place]] for place in places], np.int64)
        shared = None if self.shared_ND is None else self.shared_ND[rows]
        return places, Features([image_ids[place] for place in places], self.pooled_NC[rows], shared)


def features_uri(folder: str, encoder: EncoderSpec, images: ImageSet) -> str:
    """Where the features of ``encoder`` on ``images`` lie."""
    return storage.join(folder, f"{images.name}-{set_digest(images)}-{encoder.digest()}.parquet")


def set_digest(images: ImageSet, *more: object) -> str:
    """Hash of which films are in ``images`` and how they are shown, and of ``more`` that what is made of them depends on."""
    shown = [getattr(images.source, name, None) for name in SHOWN_BY]
    what = [images.name, images.source.uri, repr(shown), *map(repr, more), *images.table["image_id"].to_pylist()]
    return hashlib.blake2b("\n".join(what).encode(), digest_size=8).hexdigest()


def make_features(
    encoders: Sequence[EncoderSpec], images: ImageSet, folder: str, settings: EvaluateConfig
) -> tuple[list[str], dict[str, str]]:
    """URIs of the encoders' features on ``images``, those that lie in ``folder`` already not made again; and the reason by id of
    each image that could not be used when they were made."""
    uris = [features_uri(folder, encoder, images) for encoder in encoders]
    missing = [place for place, uri in enumerate(uris) if not storage.exists(uri)]
    for size in sorted({encoders[place].config.data.resize for place in missing}):
        together = [place for place in missing if encoders[place].config.data.resize == size]
        _make([encoders[place] for place in together], images, [uris[place] for place in together], size, settings)
    bad = {image_id: reason for uri in uris for image_id, reason in read_refused(uri).items()}
    warn_of_bad(images, bad, folder)
    return uris, bad


def refused_uri(uri: str) -> str:
    """Where it is written which images are not in the features or films at ``uri``, and why; of a whole set nothing is."""
    return uri.removesuffix(".parquet") + "-refused.json"


def read_refused(uri: str) -> dict[str, str]:
    """The reason by id of each image that is not in the features or films at ``uri``."""
    there = refused_uri(uri)
    return dict(json.loads(storage.read_bytes(there))) if storage.exists(there) else {}


def write_refused(uri: str, bad: dict[str, str]) -> None:
    """Before what lies at ``uri``: it counts as whole otherwise."""
    if bad:
        storage.write_bytes(refused_uri(uri), json.dumps(bad, indent=1).encode())


def warn_of_bad(images: ImageSet, bad: dict[str, str], folder: str) -> None:
    """Say how many images cannot be used, the commonest reason, and the way out."""
    if bad:
        reason, count = Counter(bad.values()).most_common(1)[0]
        logger.warning(
            "%s: %d of %d images could not be used, %d of them: %s. Mend them and delete %s/%s-* to have them read again",
            images.name, len(bad), len(images.table), count, reason, folder, images.name,
        )  # fmt: skip


def _make(
    encoders: Sequence[EncoderSpec], images: ImageSet, uris: Sequence[str], resize: int, settings: EvaluateConfig
) -> None:
    """Write the features of all ``encoders`` on ``images``."""
    bad: dict[str, str] = {}
    with ExitStack() as stack:
        scratch = [stack.enter_context(storage.scratch_file(uri)) for uri in uris]
        writers: list[pq.ParquetWriter] = []
        for part in stream_features(encoders, images, resize, settings):
            good = usable(part, bad)
            for place in range(len(encoders)):
                own = _columns_of(good, place)
                if len(writers) <= place:
                    writers.append(stack.enter_context(pq.ParquetWriter(scratch[place], own.schema)))
                writers[place].write_table(own)
        for writer, local, uri in zip(writers, scratch, uris, strict=True):
            writer.close()
            write_refused(uri, bad)
            storage.put_file(local, uri)


def _columns_of(table: pa.Table, place: int) -> pa.Table:
    """image_id, and the columns of encoder number ``place``."""
    named = {f"{name}{place}": name for name in ("pooled", "shared") if f"{name}{place}" in table.column_names}
    return table.select(["image_id", *named]).rename_columns(["image_id", *named.values()])


def stream_features(
    encoders: Sequence[EncoderSpec], images: ImageSet, resize: int, settings: EvaluateConfig
) -> Iterator[pa.Table]:
    """Tables of image_id, reason, and for encoder i pooled<i> and perhaps shared<i>."""
    pieces = pieces_of(images.table.select(["image_id", "path"]))
    read = partial(read_films, source_ref=ray.put(images.source), resize=resize)
    with ordered_context(0.0, PIECES_AHEAD * PIECE_FILMS * resize**2, None):
        films = ray.data.from_arrow(pieces).map_batches(
            read, batch_format="pyarrow", batch_size=None, num_cpus=encoders[0].config.data.cpus_per_task
        )
        found = films.map_batches(
            EmbedFilms,
            batch_format="pyarrow",
            batch_size=settings.batch_size,
            fn_constructor_args=(ray.put(list(encoders)), settings),
            compute=ray.data.ActorPoolStrategy(size=settings.workers),
            num_cpus=settings.cpus_per_worker,
            num_gpus=1 if settings.use_gpu else 0,
        )
        yield from found.iter_batches(batch_size=None, batch_format="pyarrow")


def read_films(rows: pa.Table, source_ref: Any, resize: int) -> pa.Table:
    """image_id, film (the padded square's bytes, null where it cannot be used) and reason of each row."""
    source: ImageSource = fetched(source_ref)
    paths = rows["path"].to_pylist()
    reader = source.reader(paths)

    def read(path: str) -> tuple[bytes | None, str | None]:
        try:
            return resize_image(reader.read_image(path).grey_HW, resize).tobytes(), None
        except BadRow as reason:
            return None, str(reason)

    films = read_each(reader, read, paths)
    columns = {
        "image_id": rows["image_id"],
        "film": pa.array([film for film, _ in films], pa.binary(resize**2)),
        "reason": pa.array([reason for _, reason in films], pa.string()),
    }
    return pa.table(columns)


def pieces_of(table: pa.Table) -> list[pa.Table]:
    """``table`` in pieces of ``PIECE_FILMS`` rows, one a task."""
    rows = table.combine_chunks()
    return [rows.slice(start, PIECE_FILMS) for start in range(0, len(rows), PIECE_FILMS)]


def read_each(reader: Reader, read: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """What ``read`` makes of each item, several at a time where ``reader`` waits for storage."""
    with ThreadPoolExecutor(FETCH_THREADS) as threads:
        return list((threads.map if reader.io_bound else map)(read, items))


def usable(part: pa.Table, bad: dict[str, str]) -> pa.Table:
    """The rows of ``part`` without a reason against them; those of the others go into ``bad``."""
    refused = part.filter(pa.compute.is_valid(part["reason"]))
    bad |= dict(zip(refused["image_id"].to_pylist(), refused["reason"].to_pylist(), strict=True))
    return part.filter(pa.compute.is_null(part["reason"]))


class EmbedFilms:
    """A Ray Data actor that holds all encoders: squares in, features out."""

    def __init__(self, encoders_ref: Any, settings: EvaluateConfig) -> None:
        encoders: list[EncoderSpec] = ray.get(encoders_ref)
        torch.set_num_threads(max(int(settings.cpus_per_worker), 1))
        self.device = torch.device("cuda" if settings.use_gpu else "cpu")
        self.sizes = [(spec.config.data.resize, spec.config.data.image_size) for spec in encoders]
        self.encoders = [spec.load().to(self.device) for spec in encoders]

    @torch.inference_mode()
    def __call__(self, rows: pa.Table) -> pa.Table:
        kept = rows["reason"].is_null().to_numpy()
        columns: dict[str, Any] = {"image_id": rows["image_id"], "reason": rows["reason"]}
        for place, (encoder, (resize, size)) in enumerate(zip(self.encoders, self.sizes, strict=True)):
            pooled, shared = encoder(self._films(rows, resize, size))
            columns[f"pooled{place}"] = _column(pooled, kept)
            if shared is not None:
                columns[f"shared{place}"] = _column(shared, kept)
        return pa.table(columns)

    def _films(self, rows: pa.Table, resize: int, size: int) -> torch.Tensor:
        """All films of the table, (B, 1, size, size); grey where one could not be read."""
        blank = bytes([128]) * resize**2
        data = b"".join(film or blank for film in rows["film"].to_pylist())
        squares_B1RR = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(-1, 1, resize, resize)
        return normalise(crop(squares_B1RR.to(self.device), size, None))


def _column(values_BC: torch.Tensor, kept_B: NDArray[np.bool_]) -> pa.Array:
    """Rows as a column of lists of equal length; zeros where there was no film."""
    rows_BC = values_BC.float().cpu().numpy() * kept_B[:, None]
    return pa.FixedSizeListArray.from_arrays(pa.array(rows_BC.astype(np.float32).ravel()), rows_BC.shape[1])


def read_features(uri: str) -> Features:
    """The features that lie at ``uri``."""
    table = storage.read_parquet(uri, lambda file: file.read())
    rows = lambda name: np.stack(table[name].to_numpy(zero_copy_only=False)) if len(table) else np.zeros((0, 0))
    shared = rows("shared").astype(np.float32) if "shared" in table.column_names else None
    return Features(table["image_id"].to_pylist(), rows("pooled").astype(np.float32), shared)
