"""An index over a few films of the phantom, made without Ray: vectors by the library, files by the code of the build."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import pyarrow as pa

from cmcgns.library.films import read_squares
from cmcgns.library.model import Model
from cmcgns.phantom import PhantomCorpus
from cmcgns.search.build import complete
from cmcgns.search.nearest import Kind
from cmcgns.search.shard import ShardWriter

PHANTOM = PhantomCorpus(studies=24, seed=3, height=60, width=48)
FILMS = [(number, film) for number in range(24) for film in range(len(PHANTOM.study(number).films))]
"""Study and number of each film."""
PIXELS = [PHANTOM.render(*film) for film in FILMS]
REPORTS = [PHANTOM.study(number).report for number, _ in FILMS]
Where = TypeVar("Where", Path, str)
FIRST = [film == 0 for _, film in FILMS]


def make_index(
    folder: Where, model: Model, kind: Kind = "flat", pictures: bool = True, bounds: Sequence[int] = (0, 10, 20)
) -> Where:
    """An index over all of ``FILMS``, in a new folder or at a URI, whose shards begin at ``bounds``."""
    squares = list(read_squares(PIXELS, model.config.data, ahead=8))
    read = model._read(REPORTS)
    vector = lambda rows_ND: pa.FixedSizeListArray.from_arrays(pa.array(rows_ND.ravel()), model.dim)
    table = pa.table(
        {
            "position": np.arange(len(FILMS)),
            "study_id": [PHANTOM.study(number).study_id for number, _ in FILMS],
            "path": [f"{number}/{film}" for number, film in FILMS],
            "view": [PHANTOM.study(number).films[film].view for number, film in FILMS],
            "split": [PHANTOM.study(number).split for number, _ in FILMS],
            "report_hash": [parsed.report_hash for parsed, _ in read],
            "sentences": [parsed.sentences[: encoded.sentences] for parsed, encoded in read],
            "png": pa.array([cv2.imencode(".png", square)[1].tobytes() for square in squares], pa.binary()),
            "film": vector(model.embed_films(PIXELS)),
            "report": vector(model.embed_reports(REPORTS)),
        }
    )
    shards = []
    for number, (start, stop) in enumerate(zip(bounds, [*bounds[1:], len(FILMS)], strict=True)):
        with ShardWriter(str(folder), number, kind, model.dim, pictures) as writer:
            for row in range(start, stop, 4):
                writer.add(table.slice(row, min(4, stop - row)))
            shards.append(writer.finish())
    corpus = {"uri": "phantom:24:3", "format": "phantom", "split": "all", "digest": "0"}
    complete(str(folder), model.run, model.run.identity(), corpus, kind, 0.9, shards)
    return folder
