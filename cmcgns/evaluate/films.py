"""Films of a set as squares, with boxes and masks on them, for heads that are trained: read once by Ray Data, kept in Parquet.

N films, K mask classes, R pixels of the square.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from cmcgns.data import storage
from cmcgns.data.dataset import FETCH_THREADS, fetched, ordered_context
from cmcgns.data.transforms import resize_film
from cmcgns.errors import BadRow
from cmcgns.evaluate.features import PIECE_FILMS, PIECES_AHEAD, set_digest
from cmcgns.evaluate.sets.base import BOX_TYPE, ImageSet
from cmcgns.evaluate.squares import square_boxes, square_masks

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("film", pa.binary()),
        pa.field("masks", pa.binary()),  # one bit a pixel, class after class
        pa.field("boxes", pa.list_(BOX_TYPE)),
        pa.field("reason", pa.string()),  # why it cannot be used; null where it can
    ]
)


@dataclass(frozen=True)
class Films:
    """The films of some images, whole: nothing is cropped away."""

    image_ids: list[str]
    film_NRR: NDArray[np.uint8]
    mask_NKRR: NDArray[np.bool_]
    kinds: list[NDArray[np.int32]]
    """Classes of each film's boxes."""
    boxes: list[NDArray[np.float64]]
    """(x0, y0, x1, y1) of each one, in pixels of the square."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def take(self, places: Sequence[int]) -> "Films":
        """The films at ``places``."""
        pick = lambda parts: [parts[i] for i in places]
        index = np.asarray(places, np.int64)
        return Films(
            pick(self.image_ids), self.film_NRR[index], self.mask_NKRR[index], pick(self.kinds), pick(self.boxes)
        )


def make_films(images: ImageSet, side: int, cpus_per_task: float, folder: str) -> tuple[str, dict[str, str]]:
    """URI of the films of ``images`` as squares of ``side`` pixels, made now unless they lie in ``folder`` already; and the
    reason by id of each one that could not be used now."""
    where = images.table.select(["boxes", "masks"]).to_pylist()  # labels may be corrected while films stay
    of_set = set_digest(images, images.box_classes, images.mask_classes, where)
    uri, bad = storage.join(folder, f"{images.name}-{of_set}-films-{side}.parquet"), dict[str, str]()
    if storage.exists(uri):
        return uri, bad
    rows = images.table.combine_chunks()
    pieces = [rows.slice(start, PIECE_FILMS) for start in range(0, len(rows), PIECE_FILMS)]
    read = partial(read_films, images_ref=ray.put(images), side=side)
    context = ordered_context(0.0, PIECES_AHEAD * PIECE_FILMS * 2 * side**2, None)
    with context, storage.writing(uri) as file, pq.ParquetWriter(file, SCHEMA) as writer:
        found = ray.data.from_arrow(pieces).map_batches(
            read, batch_format="pyarrow", batch_size=None, num_cpus=cpus_per_task
        )
        for part in found.iter_batches(batch_size=None, batch_format="pyarrow"):
            refused = part.filter(pa.compute.is_valid(part["reason"]))
            bad |= dict(zip(refused["image_id"].to_pylist(), refused["reason"].to_pylist(), strict=True))
            writer.write_table(part.filter(pa.compute.is_null(part["reason"])).cast(SCHEMA))
    return uri, bad


def read_films(rows: pa.Table, images_ref: Any, side: int) -> pa.Table:
    """``SCHEMA`` of some rows of a set's table."""
    images: ImageSet = fetched(images_ref)
    listed = rows.to_pylist()
    reader = images.source.reader([row["path"] for row in listed])

    def read(row: dict[str, Any]) -> dict[str, Any]:
        try:
            film = reader.read_film(row["path"])
            places = images.places(row, film)  # masks are files of their own
        except BadRow as reason:
            return {"image_id": row["image_id"], "reason": str(reason)}
        box_N4 = square_boxes(places.box_N4, film.grey_HW.shape, side)
        boxes = [
            dict(zip(("kind", "x0", "y0", "x1", "y1"), (int(kind), *map(float, box)), strict=True))
            for kind, box in zip(places.kind_N, box_N4, strict=True)
        ]
        return {
            "image_id": row["image_id"],
            "film": resize_film(film.grey_HW, side).tobytes(),
            "masks": np.packbits(square_masks(places.mask_KHW, side)).tobytes(),
            "boxes": boxes,
        }

    with ThreadPoolExecutor(FETCH_THREADS) as threads:
        return pa.Table.from_pylist(list((threads.map if reader.waits else map)(read, listed)), schema=SCHEMA)


def load_films(uri: str, images: ImageSet, side: int) -> Films:
    """The films that lie at ``uri``, in memory."""
    table, kinds = storage.read_parquet(uri, lambda file: file.read()), len(images.mask_classes)
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
