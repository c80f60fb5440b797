"""Features of frozen encoders: Ray Data reads each film once for all encoders, and the features are stored in Parquet.

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
from cmcgns.errors import BadRow, UserError
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.encoders import EncoderSpec
from cmcgns.models.device import autocast, device_of, unit_rows
from cmcgns.storage import parquet

logger = logging.getLogger(__name__)
Floats = NDArray[np.float32]
PIECE_FILMS = 64
PIECES_AHEAD = 8
"""Pieces of decoded films that may wait for the encoders."""
SHOWN_BY = ("target", "crop_borders", "height", "width")
"""Attributes of a source, if it has them, that change what its films look like."""


@dataclass(frozen=True)
class Features:
    """Features by one encoder of the readable images of a set, in the set's order."""

    image_ids: list[str]
    pooled_NC: Floats
    shared_ND: Floats | None
    """Rows of length 1 in the space of the reports; None for an encoder without text encoder."""

    def of(self, image_ids: Sequence[str]) -> "tuple[NDArray[np.int64], Features]":
        """Indices of those ``image_ids`` that have features, and their features in that order."""
        row_of = {image_id: row for row, image_id in enumerate(self.image_ids)}
        indices = np.array([i for i, image_id in enumerate(image_ids) if image_id in row_of], np.int64)
        rows = np.array([row_of[image_ids[index]] for index in indices], np.int64)
        shared = None if self.shared_ND is None else self.shared_ND[rows]
        return indices, Features([image_ids[index] for index in indices], self.pooled_NC[rows], shared)


def features_uri(folder: str, encoder: EncoderSpec, images: ImageSet, precision: str = "fp32") -> str:
    """URI of the features of ``encoder`` on ``images``."""
    computed = "" if precision == "fp32" else f"-{precision}"
    return storage.join(folder, f"{images.name}-{set_digest(images)}-{encoder.digest()}{computed}.parquet")


def set_digest(images: ImageSet, *more: object) -> str:
    """Hash of the films in ``images``, their preprocessing, and ``more`` values on which the result depends."""
    shown = [getattr(images.source, name, None) for name in SHOWN_BY]
    what = [images.name, images.source.uri, repr(shown), *map(repr, more), *images.table["image_id"].to_pylist()]
    return hashlib.blake2b("\n".join(what).encode(), digest_size=8).hexdigest()


def make_features(
    encoders: Sequence[EncoderSpec], images: ImageSet, folder: str, settings: EvaluateConfig
) -> tuple[list[str], dict[str, str]]:
    """URIs of the encoders' features on ``images``, computed unless already stored in ``folder``; and for each unusable image its
    id and the reason."""
    uris = [features_uri(folder, encoder, images, settings.precision) for encoder in encoders]
    missing = [index for index, uri in enumerate(uris) if not storage.exists(uri)]
    for size in sorted({encoders[index].config.data.resize for index in missing}):
        same_size = [index for index in missing if encoders[index].config.data.resize == size]
        _make([encoders[index] for index in same_size], images, [uris[index] for index in same_size], size, settings)
    bad = {image_id: reason for uri in uris for image_id, reason in read_bad_images(uri).items()}
    warn_about_bad_images(images, bad, folder)
    return uris, bad


def bad_images_uri(uri: str) -> str:
    """URI of the list of unusable images that belongs to the features or films at ``uri``; not written if all are usable."""
    return uri.removesuffix(".parquet") + "-refused.json"


def read_bad_images(uri: str) -> dict[str, str]:
    """Reason by id for each image that is missing in the features or films at ``uri``."""
    bad_uri = bad_images_uri(uri)
    return dict(json.loads(storage.read_bytes(bad_uri))) if storage.exists(bad_uri) else {}


def write_bad_images(uri: str, bad: dict[str, str]) -> None:
    """Write the unusable images. Call it before ``uri`` is written, which otherwise counts as complete."""
    if bad:
        storage.write_bytes(bad_images_uri(uri), json.dumps(bad, indent=1).encode())


def warn_about_bad_images(images: ImageSet, bad: dict[str, str], folder: str) -> None:
    """Log how many images cannot be used, the most common reason and the fix."""
    if bad:
        reason, count = Counter(bad.values()).most_common(1)[0]
        logger.warning(
            "%s: %d of %d images could not be used, %d of them: %s. Fix them and delete %s/%s-* to read them again",
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
            good = drop_bad(part, bad)
            for index in range(len(encoders)):
                own = _columns_of(good, index)
                if len(writers) <= index:
                    writers.append(stack.enter_context(pq.ParquetWriter(scratch[index], own.schema)))
                writers[index].write_table(own)
        for writer, local, uri in zip(writers, scratch, uris, strict=True):
            writer.close()
            write_bad_images(uri, bad)
            storage.put_file(local, uri)


def _columns_of(table: pa.Table, index: int) -> pa.Table:
    """image_id, and the columns of the encoder with index ``index``."""
    named = {f"{name}{index}": name for name in ("pooled", "shared") if f"{name}{index}" in table.column_names}
    return table.select(["image_id", *named]).rename_columns(["image_id", *named.values()])


def stream_features(
    encoders: Sequence[EncoderSpec], images: ImageSet, resize: int, settings: EvaluateConfig
) -> Iterator[pa.Table]:
    """Tables with columns image_id, reason, and for encoder i pooled<i> and, if it has one, shared<i>."""
    pieces = pieces_of(images.table.select(["image_id", "path"]))
    read = partial(read_films, source_ref=ray.put(images.source), resize=resize)
    with ordered_context(0.0, PIECES_AHEAD * PIECE_FILMS * resize**2, None):
        films = ray.data.from_arrow(pieces).map_batches(
            read, batch_format="pyarrow", batch_size=None, num_cpus=encoders[0].config.data.cpus_per_task
        )
        embedded = films.map_batches(
            EmbedFilms,
            batch_format="pyarrow",
            batch_size=settings.batch_size,
            fn_constructor_args=(ray.put(list(encoders)), settings),
            compute=ray.data.ActorPoolStrategy(size=settings.workers),
            num_cpus=settings.cpus_per_worker,
            num_gpus=1 if settings.use_gpu else 0,
        )
        yield from embedded.iter_batches(batch_size=None, batch_format="pyarrow")


def read_films(rows: pa.Table, source_ref: Any, resize: int) -> pa.Table:
    """image_id, film (bytes of the padded square, null if it cannot be used) and reason of each row."""
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
    """``table`` in pieces of ``PIECE_FILMS`` rows, one per task."""
    rows = table.combine_chunks()
    return [rows.slice(start, PIECE_FILMS) for start in range(0, len(rows), PIECE_FILMS)]


def read_each(reader: Reader, read: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """``read`` of each item; in threads if ``reader`` waits for storage."""
    with ThreadPoolExecutor(FETCH_THREADS) as threads:
        return list((threads.map if reader.io_bound else map)(read, items))


def drop_bad(part: pa.Table, bad: dict[str, str]) -> pa.Table:
    """The usable rows of ``part``; adds id and reason of the others to ``bad``."""
    unusable = part.filter(pa.compute.is_valid(part["reason"]))
    bad |= dict(zip(unusable["image_id"].to_pylist(), unusable["reason"].to_pylist(), strict=True))
    return part.filter(pa.compute.is_null(part["reason"]))


class EmbedFilms:
    """A Ray Data actor with all encoders: takes padded squares, returns features."""

    def __init__(self, encoders_ref: Any, settings: EvaluateConfig) -> None:
        encoders: list[EncoderSpec] = ray.get(encoders_ref)
        torch.set_num_threads(max(int(settings.cpus_per_worker), 1))
        self.device, self.precision = device_of(settings.use_gpu), settings.precision
        self.sizes = [(spec.config.data.resize, spec.config.data.image_size) for spec in encoders]
        self.encoders = [spec.load().to(self.device) for spec in encoders]

    @torch.inference_mode()
    def __call__(self, rows: pa.Table) -> pa.Table:
        kept = rows["reason"].is_null().to_numpy()
        columns: dict[str, Any] = {"image_id": rows["image_id"], "reason": rows["reason"]}
        for index, (encoder, (resize, size)) in enumerate(zip(self.encoders, self.sizes, strict=True)):
            with autocast(self.device, self.precision):
                pooled, shared = encoder(self._films(rows, resize, size))
            columns[f"pooled{index}"] = _column(pooled.float().cpu().numpy(), kept)
            if shared is not None:
                columns[f"shared{index}"] = _column(unit_rows(shared, self.precision), kept)
        return pa.table(columns)

    def _films(self, rows: pa.Table, resize: int, size: int) -> torch.Tensor:
        """All films of the table, (B, 1, size, size); a grey image for an unreadable one."""
        blank = bytes([128]) * resize**2
        data = b"".join(film or blank for film in rows["film"].to_pylist())
        squares_B1RR = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(-1, 1, resize, resize)
        return normalise(crop(squares_B1RR.to(self.device), size, None))


def _column(values_BC: Floats, kept_B: NDArray[np.bool_]) -> pa.Array:
    """Rows as a column of lists of equal length; zeros for unreadable films."""
    rows_BC = values_BC * kept_B[:, None]
    return pa.FixedSizeListArray.from_arrays(pa.array(rows_BC.astype(np.float32).ravel()), rows_BC.shape[1])


def read_features(uri: str) -> Features:
    """The features stored at ``uri``."""
    table = parquet.read(uri, pq.ParquetFile.read, pa.schema({"image_id": pa.string()}))
    for name, kind in zip(table.column_names[1:], table.schema.types[1:], strict=True):
        if not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float32():
            raise UserError(f"{uri}: column {name} is {kind}, not lists of float32; delete the file to embed again")
    rows = lambda name: np.stack(table[name].to_numpy(zero_copy_only=False)) if len(table) else np.zeros((0, 0))
    shared = rows("shared").astype(np.float32) if "shared" in table.column_names else None
    return Features(table["image_id"].to_pylist(), rows("pooled").astype(np.float32), shared)
