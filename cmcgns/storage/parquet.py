"""The only way in for Parquet files: no file of others is parsed before its schema is known to be plain.

Arrow restores extension types from the footer, and Ray registers some whose values are pickles: reading such a column runs code.
pyarrow restores them while it opens a file, so the footer is checked as bytes first.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cmcgns import storage
from cmcgns.errors import UserError
from cmcgns.storage.errors import BrokenFileError, error_codes

Result = TypeVar("Result")
MAGIC = b"PAR1"
TAIL_BYTES = 64 * 2**10
"""Read at once from the end of a file; most footers fit."""
ARROW_SCHEMA = b"ARROW:schema"
"""Key under which Arrow stores its own schema, in base64, in a footer."""
EXTENSION = b"ARROW:extension:name"
"""Key that an Arrow schema has for each column of an extension type."""
STRING_FIELD = 0x18
"""Thrift compact protocol: a string in the field after the last one."""


def read(
    uri: str,
    reader: Callable[[pq.ParquetFile], Result],
    expected: pa.Schema | None = None,
    footer: pq.FileMetaData | None = None,
) -> Result:
    """The result of ``reader`` on the Parquet file at ``uri``.

    ``expected``: columns that the file must have. ``footer``: the file's metadata if this function has read it before.

    Raises:
        BrokenFileError: the file is not valid Parquet.
        UserError: a column has an extension type, is missing, or has another type than ``expected``.
    """

    def parse(file: Any) -> Result:
        with _broken_if_unreadable(uri):
            checked = footer or _read_footer(file, uri)
            parquet = pq.ParquetFile(file, metadata=checked, pre_buffer=True)
            if footer is None:
                check_schema(uri, parquet.schema_arrow, expected)
            return reader(parquet)

    return storage.read(uri, parse)


@contextmanager
def open_file(uri: str, buffer_bytes: int) -> Iterator[pq.ParquetFile]:
    """The Parquet file at ``uri``, checked as in ``read``, for a reader that goes on while others use the rows.

    Pages are read by ``buffer_bytes``; Arrow itself retries requests.
    """
    files, path = storage.filesystem(uri)
    with files.open_input_file(path) as file:
        with _broken_if_unreadable(uri):
            footer = _read_footer(file, uri)
            # pre_buffer would load whole row groups; without it memory is a few pages
            parquet = pq.ParquetFile(file, metadata=footer, pre_buffer=False, buffer_size=buffer_bytes)
        check_schema(uri, parquet.schema_arrow, None)
        yield parquet


@contextmanager
def _broken_if_unreadable(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        # errors of the system or of S3 carry a number or a code, errors in the file do not
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None or error_codes(error):
            raise
        kind = type(error).__name__
        raise BrokenFileError(f"{uri} is not a Parquet file, or it is truncated ({kind}); write it again") from None


def _read_footer(file: Any, uri: str) -> pq.FileMetaData:
    """Metadata of the open ``file``, parsed once its bytes name no extension type."""
    size = file.size()
    tail = file.read_at(min(size, TAIL_BYTES), max(size - TAIL_BYTES, 0))
    length = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != MAGIC or not 0 < length <= size - 12:
        raise EOFError("no footer")
    if length + 8 > len(tail):
        tail = file.read_at(length + 8, size - length - 8)
    footer = bytes(tail[-8 - length :])
    _refuse_extensions(uri, footer[:-8])
    # metadata needs no more of a file than its two ends
    return pq.ParquetFile(pa.BufferReader(MAGIC + footer)).metadata


def _refuse_extensions(uri: str, footer: bytes) -> None:
    """Raise if the Arrow schema in ``footer`` names an extension type."""
    if footer.count(ARROW_SCHEMA) > 1:  # Arrow and this check might each look at another one
        raise UserError(f"{uri}: its footer has two Arrow schemas; {_REWRITE}")
    if ARROW_SCHEMA not in footer:
        return
    schema = _decode_schema(footer[footer.index(ARROW_SCHEMA) + len(ARROW_SCHEMA) :])
    if schema is None:
        raise UserError(f"{uri}: the Arrow schema in its footer is damaged; {_REWRITE}")
    if EXTENSION in schema:
        named = {name.decode() for name in re.findall(rb"[A-Za-z_][\w-]*(?:\.[\w-]+)+", schema)}
        raise UserError(
            f"{uri}: a column has an Arrow extension type ({', '.join(sorted(named)) or 'without a name'}), and reading "
            f"such types can run code of whoever wrote the file; {_REWRITE}"
        )


_REWRITE = "write it again with plain columns: strings, numbers, bytes, lists, structs and maps"


def _decode_schema(rest: bytes) -> bytes | None:
    """The Arrow schema whose value follows its key in a Thrift struct; None unless it is written as Arrow writes it."""
    length, shift, position = 0, 0, 1
    if rest[:1] != bytes([STRING_FIELD]):
        return None
    while shift <= 28 and position < len(rest):
        byte = rest[position]
        length |= (byte & 0x7F) << shift
        shift, position = shift + 7, position + 1
        if byte < 0x80:
            break
    try:
        return base64.b64decode(rest[position : position + length], validate=True)
    except binascii.Error:
        return None


def check_schema(uri: str, schema: pa.Schema, expected: pa.Schema | None) -> None:
    """Raise ``UserError`` unless every column of ``schema`` has a plain type and those in ``expected`` have theirs."""
    for column in schema:
        if not _is_plain(column.type):
            raise UserError(f"{uri}: column {column.name} is {column.type}; {_REWRITE}")
    for column in expected or ():
        if schema.get_field_index(column.name) < 0:
            raise UserError(
                f"{uri} has no column {column.name}, or has it twice; its columns: {', '.join(schema.names)}"
            )
        kind = schema.field(column.name).type
        if not _is_same(kind, column.type):
            raise UserError(f"{uri}: column {column.name} is {kind}, not {column.type}; write the file again")


def _is_plain(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return False
    return all(_is_plain(child) for child in _children(kind))


def _is_same(kind: pa.DataType, expected: pa.DataType) -> bool:
    """Whether types are equal but for the names of list items."""
    if pa.types.is_struct(kind):
        return bool(kind == expected)
    ours, theirs = _children(kind), _children(expected)
    if not ours or len(ours) != len(theirs) or kind.id != expected.id:
        return bool(kind == expected)
    return getattr(kind, "list_size", 0) == getattr(expected, "list_size", 0) and all(map(_is_same, ours, theirs))


def _children(kind: pa.DataType) -> list[pa.DataType]:
    if pa.types.is_dictionary(kind):
        return [kind.value_type]
    return [kind.field(index).type for index in range(kind.num_fields)]
