"""Films with boxes and masks on the padded square that an encoder sees, resized like the film in ``resize_image``.

N boxes, K masks, R pixels of the square.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from cmcgns import storage
from cmcgns.data.image import resize_image
from cmcgns.data.labelled.base import BOX_TYPE, ImageSet
from cmcgns.data.stream import fetched, ordered_context
from cmcgns.errors import BadRow
from cmcgns.evaluate.features import (
    PIECE_FILMS,
    PIECES_AHEAD,
    drop_bad,
    pieces_of,
    read_bad_images,
    read_each,
    set_digest,
    warn_about_bad_images,
    write_bad_images,
)
from cmcgns.storage import parquet

Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]
Pixel = TypeVar("Pixel", np.bool_, np.uint8)


def _placed(height: int, width: int, side: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the film on its padded square."""
    scale = side / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    return (side - new_height) // 2, (side - new_width) // 2, new_height, new_width


def resize_boxes(box_N4: Floats, size: tuple[int, ...], side: int) -> Floats:
    """Boxes (x0, y0, x1, y1) of a film of ``size`` (height, width) in pixels of its padded square of ``side`` pixels."""
    height, width = size
    top, left, new_height, new_width = _placed(height, width, side)
    scale = np.array([new_width / width, new_height / height] * 2)
    return np.asarray(box_N4, np.float64) * scale + np.array([left, top] * 2)


def resize_masks(mask_KHW: Masks, side: int) -> Masks:
    """Masks (K, side, side); a pixel is set if at least half of its area is."""
    _, height, width = mask_KHW.shape
    top, left, new_height, new_width = _placed(height, width, side)
    filter_ = cv2.INTER_AREA if side < max(height, width) else cv2.INTER_LINEAR  # as in resize_image
    square_KRR = np.zeros((len(mask_KHW), side, side), bool)
    for k, mask_HW in enumerate(mask_KHW):
        scaled = cv2.resize(mask_HW.astype(np.float32), (new_width, new_height), interpolation=filter_)
        square_KRR[k, top : top + new_height, left : left + new_width] = scaled >= 0.5
    return square_KRR


def center_crop(values_KRR: NDArray[Pixel], size: int) -> NDArray[Pixel]:
    """Center crop of ``size`` pixels, as in validation."""
    start = (values_KRR.shape[-1] - size) // 2
    return values_KRR[..., start : start + size, start : start + size]


def patch_coverage(mask_KRR: Masks, grid: int) -> Floats:
    """Share of each of ``grid`` x ``grid`` patches that each mask covers, (K, P) in raster order."""
    cell = mask_KRR.shape[-1] // grid
    cells = mask_KRR.reshape(len(mask_KRR), grid, cell, grid, cell)
    return np.asarray(cells.mean((2, 4)).reshape(len(mask_KRR), grid * grid), np.float64)


SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("film", pa.binary()),
        pa.field("masks", pa.binary()),  # one bit per pixel, class after class
        pa.field("boxes", pa.list_(BOX_TYPE)),
        pa.field("reason", pa.string()),  # why it cannot be used; null if it can
    ]
)


@dataclass(frozen=True)
class Films:
    """Films of some images as padded squares, without cropping."""

    image_ids: list[str]
    film_NRR: NDArray[np.uint8]
    mask_NKRR: NDArray[np.bool_]
    kinds: list[NDArray[np.int32]]
    """Class of each box, per film."""
    boxes: list[NDArray[np.float64]]
    """(x0, y0, x1, y1) of each box, per film, in pixels of the square."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def take(self, indices: Sequence[int]) -> "Films":
        """The films with these indices."""
        pick = lambda parts: [parts[i] for i in indices]
        rows = np.asarray(indices, np.int64)
        return Films(
            pick(self.image_ids), self.film_NRR[rows], self.mask_NKRR[rows], pick(self.kinds), pick(self.boxes)
        )


def make_films(images: ImageSet, side: int, cpus_per_task: float, folder: str) -> tuple[str, dict[str, str]]:
    """URI of the films of ``images`` as squares of ``side`` pixels, created unless already stored in ``folder``; and for each
    unusable film its id and the reason."""
    where = images.table.select(["boxes", "masks"]).to_pylist()  # labels may be corrected for the same films
    masks_in = [images.masks_uri] if hasattr(images, "masks_uri") else []  # of a user's own table
    of_set = set_digest(images, images.box_classes, images.mask_classes, *masks_in, where)
    uri = storage.join(folder, f"{images.name}-{of_set}-films-{side}.parquet")
    if not storage.exists(uri):
        pieces = pieces_of(images.table)
        read = partial(read_films, images_ref=ray.put(images), side=side)
        context = ordered_context(0.0, PIECES_AHEAD * PIECE_FILMS * 2 * side**2, None)
        with context, storage.scratch_file(uri) as local:
            with pq.ParquetWriter(local, SCHEMA) as writer:
                write_bad_images(uri, _write_films(writer, pieces, read, cpus_per_task))
            storage.put_file(local, uri)
    bad = read_bad_images(uri)
    warn_about_bad_images(images, bad, folder)
    return uri, bad


def _write_films(writer: pq.ParquetWriter, pieces: list[pa.Table], read: Any, cpus_per_task: float) -> dict[str, str]:
    """Write the films of all ``pieces``. Returns the reason by id for unusable ones."""
    bad = dict[str, str]()
    films = ray.data.from_arrow(pieces).map_batches(
        read, batch_format="pyarrow", batch_size=None, num_cpus=cpus_per_task
    )
    for part in films.iter_batches(batch_size=None, batch_format="pyarrow"):
        writer.write_table(drop_bad(part, bad).cast(SCHEMA))
    return bad


def read_films(rows: pa.Table, images_ref: Any, side: int) -> pa.Table:
    """Table in ``SCHEMA`` for some rows of a set's table."""
    images: ImageSet = fetched(images_ref)
    listed = rows.to_pylist()
    reader = images.source.reader([row["path"] for row in listed])

    def read(row: dict[str, Any]) -> dict[str, Any]:
        try:
            film = reader.read_image(row["path"])
            annotations = images.annotations(row, film)  # masks are separate files
        except BadRow as reason:
            return {"image_id": row["image_id"], "reason": str(reason)}
        box_N4 = resize_boxes(annotations.box_N4, film.grey_HW.shape, side)
        boxes = [
            dict(zip(("kind", "x0", "y0", "x1", "y1"), (int(kind), *map(float, box)), strict=True))
            for kind, box in zip(annotations.kind_N, box_N4, strict=True)
        ]
        return {
            "image_id": row["image_id"],
            "film": resize_image(film.grey_HW, side).tobytes(),
            "masks": np.packbits(resize_masks(annotations.mask_KHW, side)).tobytes(),
            "boxes": boxes,
        }

    return pa.Table.from_pylist(read_each(reader, read, listed), schema=SCHEMA)


def film_ids(uri: str) -> list[str]:
    """Ids of the films stored at ``uri``."""
    ids: list[str] = parquet.read(uri, lambda file: file.read(["image_id"]), SCHEMA)["image_id"].to_pylist()
    return ids


def load_films(uri: str, images: ImageSet, side: int, image_ids: Sequence[str] | None = None) -> Films:
    """The films stored at ``uri``, or only those of ``image_ids``, in memory."""
    wanted, kinds = None if image_ids is None else pa.array(image_ids, pa.string()), len(images.mask_classes)

    def read(file: pq.ParquetFile) -> pa.Table:
        groups = (file.read_row_group(group) for group in range(file.num_row_groups))
        kept = [
            group if wanted is None else group.filter(pa.compute.is_in(group["image_id"], wanted)) for group in groups
        ]
        return pa.concat_tables([SCHEMA.empty_table(), *kept])

    table = parquet.read(uri, read, SCHEMA)
    squares = lambda name: [np.frombuffer(each, np.uint8) for each in table[name].to_pylist()]
    film_NRR = np.concatenate([np.zeros(0, np.uint8), *squares("film")]).reshape(-1, side, side)
    bits = [np.unpackbits(each, count=kinds * side * side).astype(bool) for each in squares("masks")]
    listed = table["boxes"].to_pylist()
    return Films(
        table["image_id"].to_pylist(),
        film_NRR,
        np.concatenate([np.zeros(0, bool), *bits]).reshape(len(table), kinds, side, side),
        [np.array([box["kind"] for box in boxes], np.int32) for boxes in listed],
        [
            np.array([[box[edge] for edge in ("x0", "y0", "x1", "y1")] for box in boxes], np.float64).reshape(-1, 4)
            for boxes in listed
        ],
    )
