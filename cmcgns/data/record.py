"""One study from the reader to the rank: the columns of each stage and the conversions between them.

A reader gives an index row per study (no pixels). ``jobs/prepare.py`` makes a prepared row per film of it. The stream reads
an index row and its film into a stream row, and a rank receives a ``Block`` of those. To add a field, add it to the stages
that need it here, fill it in the reader, and use it where the block is used.
"""

# S studies, B studies of a block, R side of the stored square, T tokens

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

    from cmcgns.data.reports import ParsedReport
    from cmcgns.data.tokenizer import EncodedReport

LABELS_TYPE = pa.map_(pa.string(), pa.float32())  # 1, 0, -1 uncertain; may be empty
IDS = ("patient_id", "study_id", "group")
"""Ids of a study; ``group`` is what splits keep together: the patient unless the data say more."""


# --- index row: one per study ---

FILM_TYPE = pa.struct([(name, pa.string()) for name in ("image_id", "path", "view")])
INDEX_SCHEMA = pa.schema(
    [
        pa.field("study_id", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("group", pa.string()),
        pa.field("split", pa.string()),  # train, valid or test
        pa.field("films", pa.list_(FILM_TYPE)),  # at least one
        pa.field("report", pa.string()),  # the text, or null if it is at report_path
        pa.field("report_path", pa.string()),
        pa.field("labels", LABELS_TYPE),
    ]
)


@dataclass(frozen=True)
class StudyIndex:
    """Every usable study of a corpus, and what was excluded before any pixel was read."""

    table: pa.Table
    """``INDEX_SCHEMA``, in a fixed order."""
    filtered: dict[str, int] = field(default_factory=dict)
    """Number of films excluded on purpose, by reason (``view LATERAL``: 120). These are not bad rows."""
    bad_rows: list[dict[str, str]] = field(default_factory=list)
    """Studies that cannot be used, each with ``source`` and ``reason``."""
    repaired: dict[str, int] = field(default_factory=dict)
    """Rows of the corpus's tables by the rule by which they were read, where they were not read as they stand."""

    def split(self, name: str) -> pa.Table:
        """The studies of one split (train, valid or test), in index order."""
        return self.table.filter(pc.equal(self.table["split"], name))


def index_table(rows: list[dict[str, Any]]) -> pa.Table:
    """``rows`` as a table of ``INDEX_SCHEMA``."""
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


def index_of_films(films: "pd.DataFrame", labels: "pd.DataFrame | pa.ChunkedArray | None" = None) -> pa.Table:
    """``INDEX_SCHEMA`` from one row per film, in the order in which studies first appear.

    ``films`` has the string columns of ``INDEX_SCHEMA`` and ``FILM_TYPE``; a missing one is null. Columns of the study are
    taken from its first film, and so are ``labels``: a column per label with NaN for blank, or an Arrow column of maps, both
    with the rows that the index of ``films`` names.
    """
    import pandas as pd  # not needed on a rank

    code, _ = pd.factorize(films["study_id"])
    order = np.argsort(code, kind="stable")
    films = films.iloc[order]
    counts = np.bincount(code) if len(code) else np.zeros(0, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    first = films.iloc[offsets[:-1]]
    film_columns = [_strings(films, name) for name in (each.name for each in FILM_TYPE)]
    columns = {
        "films": pa.ListArray.from_arrays(
            pa.array(offsets), pa.StructArray.from_arrays(film_columns, fields=list(FILM_TYPE))
        ),
        "labels": _maps(labels, first),
    }
    return pa.table(
        {name: columns[name] if name in columns else _strings(first, name) for name in INDEX_SCHEMA.names},
        schema=INDEX_SCHEMA,
    )


def _strings(rows: "pd.DataFrame", name: str) -> pa.Array:
    """One Arrow array, whatever pandas stores its strings in."""
    if name not in rows.columns:
        return pa.nulls(len(rows), pa.string())
    return pa.array(rows[name].to_numpy(dtype=object), type=pa.string(), from_pandas=True)


def _maps(labels: "pd.DataFrame | pa.ChunkedArray | None", rows: "pd.DataFrame") -> pa.Array:
    """One map per row: the labels that are not blank."""
    if isinstance(labels, pa.ChunkedArray):
        return labels.combine_chunks().take(pa.array(rows.index))
    if labels is None or labels.empty:
        return pa.array([[]] * len(rows), LABELS_TYPE)
    values = labels.loc[rows.index].to_numpy(dtype=np.float32)
    given = ~np.isnan(values)
    offsets = np.concatenate([[0], np.cumsum(given.sum(axis=1))]).astype(np.int32)
    names = np.tile(np.array(labels.columns, dtype=object), (len(values), 1))[given]
    return pa.MapArray.from_arrays(
        pa.array(offsets), pa.array(names, pa.string()), pa.array(values[given], pa.float32())
    )


def first_films(studies: pa.Table) -> dict[str, pa.Array]:
    """The columns of the first film of each index row."""
    first = pc.list_element(studies["films"].combine_chunks(), 0)
    return {each.name: first.field(each.name) for each in FILM_TYPE}


# --- prepared row: one per film; this order of columns is part of the content hash ---

PREPARED_SCHEMA = pa.schema(
    [
        pa.field("patient_id", pa.string()),
        pa.field("study_id", pa.string()),
        pa.field("group", pa.string()),
        pa.field("image_id", pa.string()),
        pa.field("view", pa.string()),
        pa.field("split", pa.string()),
        pa.field("image", pa.binary()),  # 8-bit grey, PNG or JPEG
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("crop", pa.list_(pa.int32())),  # left, top, right, bottom of the part kept, in pixels of the raw film
        pa.field("report", pa.string()),
        pa.field("sentences", pa.list_(pa.string())),  # normalised, as the model reads them
        pa.field("labels", LABELS_TYPE),
        pa.field("source", pa.string()),  # the film's path in the raw set
    ]
)
"""The rows of a study follow each other."""
PREPARED_INDEX = ("patient_id", "study_id", "group", "image_id", "view", "split", "labels")
"""Columns from which the index of a prepared set is made."""


def prepared_row(
    study: dict[str, Any], film: dict[str, str], rename: Callable[[str], str], **content: Any
) -> dict[str, Any]:
    """``PREPARED_SCHEMA`` of one film of an index row, its ids replaced by ``rename``; ``content``: image, size and text."""
    return {
        **{name: rename(study[name]) for name in IDS},
        "split": study["split"],
        "labels": study["labels"],
        "image_id": rename(film["image_id"]),
        "view": film["view"],
        "source": rename(film["path"]),
        **content,
    }


def index_of_prepared(films: "pd.DataFrame", labels: pa.ChunkedArray) -> pa.Table:
    """``INDEX_SCHEMA`` from the ``PREPARED_INDEX`` columns of a prepared set and the path of each row."""
    return index_of_films(films.assign(report_path=films["path"]), labels)


# --- stream row: one per study and epoch; only in memory ---


NO_LABELS = np.zeros(0, np.float32)


def labels_of(study: dict[str, Any], names: Sequence[str]) -> NDArray[np.float32]:
    """The labels ``names`` of an index row, NaN where it has none."""
    if not names:
        return NO_LABELS
    given = dict(study["labels"] or ())
    return np.array([given.get(name, np.nan) for name in names], np.float32)


class StreamStudy(NamedTuple):
    """A study ready for training: its film as a grey square, its report as tokens."""

    draw_key: int
    image_RR: NDArray[np.uint8]
    tokens_T: NDArray[np.int32]
    sentence_of_token_T: NDArray[np.int16]
    sentence_hashes: list[int]
    report_hash: int
    labels_L: NDArray[np.float32]
    """1, 0, -1 uncertain, NaN without an entry; of the labels that a method asks for."""
    sentences: list[str]

    @classmethod
    def of(
        cls,
        draw_key: int,
        image_RR: NDArray[np.uint8],
        report: "ParsedReport",
        encoded: "EncodedReport",
        labels_L: NDArray[np.float32] = NO_LABELS,
    ) -> "StreamStudy":
        """The study with those sentences of ``report`` that were ``encoded``."""
        return cls(
            draw_key,
            image_RR,
            encoded.tokens_T,
            encoded.sentence_of_token_T,
            report.sentence_hashes[: encoded.sentences],
            report.report_hash,
            labels_L,
            report.sentences[: encoded.sentences],
        )

    @classmethod
    def without_report(
        cls, draw_key: int, image_RR: NDArray[np.uint8], labels_L: NDArray[np.float32] = NO_LABELS
    ) -> "StreamStudy":
        """The study with one token in place of a report."""
        return cls(draw_key, image_RR, np.zeros(1, np.int32), np.zeros(1, np.int16), [0], 0, labels_L, [""])


@lru_cache(maxsize=8)
def stream_schema(resize: int, with_text: bool = False) -> pa.Schema:
    """The position in the epoch and the fields of ``StreamStudy``, in order; images stay uint8 until they reach the device."""
    return pa.schema(
        {
            "position": pa.int64(),
            "draw_key": pa.int64(),
            "image": pa.binary(resize * resize),
            "tokens": pa.list_(pa.int32()),
            "sentence_of_token": pa.list_(pa.int16()),
            "sentence_hashes": pa.list_(pa.int64()),
            "report_hash": pa.int64(),
            "labels": pa.list_(pa.float32()),
        }
        | ({"sentences": pa.list_(pa.string())} if with_text else {})
    )


def stream_table(
    positions: Sequence[int], studies: Sequence[StreamStudy], resize: int, with_text: bool = False
) -> pa.Table:
    """``studies`` as rows of ``stream_schema``, each with its position in the epoch's order."""
    schema = stream_schema(resize, with_text)
    if not studies:
        return schema.empty_table()
    columns = [positions, *zip(*studies, strict=True)]
    arrays = [_column(kind, values) for kind, values in zip(schema.types, columns, strict=False)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _column(kind: pa.DataType, values: Sequence[Any]) -> pa.Array:
    """``values`` as Arrow; numbers go through whole numpy arrays, because lists of Python numbers take longer than decoding."""
    if pa.types.is_fixed_size_binary(kind):
        pixels = np.concatenate([image_RR.reshape(-1) for image_RR in values])
        return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(pixels)])
    if pa.types.is_list(kind) and not pa.types.is_string(kind.value_type):
        offsets = np.concatenate([[0], np.cumsum([len(each) for each in values])]).astype(np.int32)
        numbers = np.concatenate([np.asarray(each, kind.value_type.to_pandas_dtype()) for each in values])
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(numbers))
    return pa.array(values, kind)


# --- block: one microbatch on a rank ---

FACTS = ("studies", "sentences", "first position", "last position", "digest")
"""What every rank needs to know of every other rank's block, as int64. The digest is the sum of the films' keys, which does not
depend on their order and wraps around."""
DEALT = "dealt"
"""Column of dealt rows: in the first row of a block, ``FACTS`` of the blocks of all ranks in its round; empty in the others."""


@dataclass(frozen=True)
class Block:
    """Stream rows of one microbatch on the host, as numpy views."""

    positions: np.ndarray
    draw_keys: np.ndarray
    images_BRR: np.ndarray
    tokens: Sequence[np.ndarray]
    sentence_of_token: Sequence[np.ndarray]
    sentence_hashes: Sequence[np.ndarray]
    report_hashes: np.ndarray
    labels_BL: NDArray[np.float32] | None = None
    """1, 0, -1 uncertain, NaN without an entry; None if no label is asked for."""
    dealt_W5: NDArray[np.int64] | None = None
    """``FACTS`` of the blocks that were dealt to the ranks together with this one; None: a single rank gets all blocks."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def facts_5(self) -> NDArray[np.int64]:
        """``FACTS`` of this block."""
        sentences, digest = self.sentence_counts.sum(), self.draw_keys.sum(dtype=np.int64)
        return np.array([len(self), sentences, self.positions[0], self.positions[-1], digest], np.int64)

    @property
    def facts_W5(self) -> NDArray[np.int64]:
        """``FACTS`` of the blocks of all ranks that belong to the same round."""
        return self.facts_5[None] if self.dealt_W5 is None else self.dealt_W5

    @property
    def sentence_counts(self) -> np.ndarray:
        """Sentences of each study."""
        return np.array([len(hashes) for hashes in self.sentence_hashes])

    def padded(self, size: int) -> "Block":
        """``size`` studies: the first one is repeated at the end. Dealt alone."""
        index = np.concatenate([np.arange(len(self)), np.zeros(size - len(self), np.int64)])
        parts: dict[str, Any] = {
            name: part[index] if isinstance(part, np.ndarray) else [part[i] for i in index]
            for name, part in vars(self).items()
            if name != "dealt_W5" and part is not None
        }
        return Block(**parts)


def to_block(table: pa.Table, resize: int) -> Block:
    """Stream rows as numpy views."""
    image = table["image"].chunk(0)
    start, stop = image.offset * resize * resize, (image.offset + len(image)) * resize * resize
    pixels = np.frombuffer(image.buffers()[1], np.uint8)[start:stop]
    return Block(
        positions=table["position"].to_numpy(),
        draw_keys=table["draw_key"].to_numpy(),
        images_BRR=pixels.reshape(-1, resize, resize),
        tokens=_ragged(table["tokens"]),
        sentence_of_token=_ragged(table["sentence_of_token"]),
        sentence_hashes=_ragged(table["sentence_hashes"]),
        report_hashes=table["report_hash"].to_numpy(),
        labels_BL=_rectangle(table["labels"]),
        dealt_W5=_ragged(table[DEALT])[0].reshape(-1, len(FACTS)) if DEALT in table.column_names else None,
    )


def _ragged(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Each row of a list column as an array."""
    lists = column.chunk(0)
    offsets = lists.offsets.to_numpy()
    return np.split(lists.values.to_numpy()[offsets[0] : offsets[-1]], (offsets - offsets[0])[1:-1])


def _rectangle(column: pa.ChunkedArray) -> NDArray[np.float32] | None:
    """Rows of a list column of equal lengths; None if they are empty."""
    lists = column.chunk(0)
    offsets = lists.offsets.to_numpy()
    values = lists.values.to_numpy()[offsets[0] : offsets[-1]]
    return values.reshape(len(lists), -1) if len(values) else None


def blank_block(size: int, resize: int) -> Block:
    """``size`` blank studies, for a rank that has run out of validation studies before the others."""
    blank = StreamStudy.without_report(0, np.zeros((resize, resize), np.uint8))
    return to_block(stream_table([0], [blank], resize), resize).padded(size)
