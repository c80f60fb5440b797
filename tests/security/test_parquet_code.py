"""Attack: a Parquet file of someone else has a column whose values are pickles, which run code when they are read."""

import base64
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray
from ray.data.extensions import ArrowTensorArray

from cmcgns.clustering.embeddings import Columns, open_embeddings
from cmcgns.data.manifest import read_manifest
from cmcgns.data.prepare.check import read_shard
from cmcgns.data.readers.prepared import PreparedSource
from cmcgns.data.record import LABELS_TYPE, PREPARED_SCHEMA
from cmcgns.errors import UserError
from cmcgns.evaluate.features import read_features
from cmcgns.evaluate.films import film_ids
from cmcgns.evaluate.report import read_results
from cmcgns.storage import parquet
from tests.security.sets import plain_rows, write_prepared_set

SOURCES = Path(__file__).parents[2] / "cmcgns"
REFUSED = r"Arrow extension type \(ray\.data\.arrow_pickled_object\).*run code"


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def pickled(mark: Path, rows: int) -> pa.Array:
    """A column of payloads."""
    return ArrowPythonObjectArray.from_objects([Payload(mark)] * rows)


def replaced(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    """``table`` with another column ``name``."""
    return table.set_column(table.schema.get_field_index(name), name, column)


def test_ray_alone_would_run_it(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": pickled(tmp_path / "mark", 1)}), tmp_path / "evil.parquet")
    pq.read_table(tmp_path / "evil.parquet")["id"].to_pylist()
    assert (tmp_path / "mark").is_dir()


@pytest.mark.parametrize("name", PREPARED_SCHEMA.names)
def test_a_prepared_set_with_pickles_is_refused_before_they_are_read(tmp_path: Path, name: str) -> None:
    write_prepared_set(tmp_path / "set", plain_rows(), replaced(plain_rows(), name, pickled(tmp_path / "mark", 3)))
    uri = str(tmp_path / "set")
    with pytest.raises(UserError, match=REFUSED):
        PreparedSource(uri).index()
    with pytest.raises(UserError, match=REFUSED):
        read_shard(uri, read_manifest(uri).shards[0])
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("where", ["struct", "list", "map", "extra column"])
def test_pickles_inside_of_other_columns_are_found(tmp_path: Path, where: str) -> None:
    inner, offsets = pickled(tmp_path / "mark", 3), pa.array([0, 1, 2, 3], pa.int32())
    table = plain_rows()
    if where == "extra column":
        table = table.append_column("more", inner)
    else:
        column = {
            "struct": lambda: pa.StructArray.from_arrays([inner], ["inner"]),
            "list": lambda: pa.ListArray.from_arrays(offsets, inner),
            "map": lambda: pa.MapArray.from_arrays(offsets, pa.array(["a", "b", "c"]), inner),
        }[where]()
        table = replaced(table, "labels", column)
    write_prepared_set(tmp_path / "set", plain_rows(), table)
    with pytest.raises(UserError, match=REFUSED):
        PreparedSource(str(tmp_path / "set")).index()


@pytest.mark.parametrize("read", [read_features, film_ids], ids=["features", "films"])
def test_kept_features_and_films_with_pickles_are_refused(tmp_path: Path, read: Callable[[str], object]) -> None:
    path = tmp_path / "evil.parquet"
    pq.write_table(pa.table({"image_id": pickled(tmp_path / "mark", 2), "pooled": [[1.0], [2.0]]}), path)
    with pytest.raises(UserError, match=REFUSED):
        read(str(path))
    assert not (tmp_path / "mark").exists()


def test_results_of_an_evaluation_with_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"tests": {}, "seed": 0}))
    pq.write_table(pa.table({"note": pickled(tmp_path / "mark", 1)}), tmp_path / "scores.parquet")
    with pytest.raises(UserError, match=REFUSED):
        read_results("evaluate.compare", str(tmp_path))
    assert not (tmp_path / "mark").exists()


def test_embeddings_with_a_pickled_text_are_refused(tmp_path: Path) -> None:
    columns = {"id": ["a", "b"], "vector": [[1.0, 2.0]] * 2, "text": pickled(tmp_path / "mark", 2)}
    pq.write_table(pa.table(columns), tmp_path / "evil.parquet")
    with pytest.raises(UserError, match=REFUSED):
        open_embeddings(str(tmp_path), Columns("id", "vector", text="text"))
    assert not (tmp_path / "mark").exists()


def test_any_other_extension_type_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "tensors.parquet"
    pq.write_table(pa.table({"film": ArrowTensorArray.from_numpy(np.zeros((2, 3, 3)))}), path)
    with pytest.raises(UserError, match=r"\(ray\.data\.arrow_tensor_v2\)"):
        parquet.read(str(path), pq.ParquetFile.read)


def evil_file(mark: Path, rows: int = 1) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": pickled(mark, rows)}), file)
    return file.getvalue()


def test_a_footer_with_two_schemas_is_refused(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"]}).replace_schema_metadata({"second": "ARROW:schema"})
    pq.write_table(table, tmp_path / "two.parquet", store_schema=True)
    with pytest.raises(UserError, match="two Arrow schemas"):
        parquet.read(str(tmp_path / "two.parquet"), pq.ParquetFile.read)


def test_a_schema_in_bad_base64_is_refused(tmp_path: Path) -> None:
    data = evil_file(tmp_path / "mark")
    found = re.search(rb"ARROW:schema\x18..", data, re.DOTALL)
    assert found
    # one letter that lenient decoders skip
    damaged = data[: found.end()] + b"-" + data[found.end() + 1 :]
    (tmp_path / "bad.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match="Arrow schema in its footer is damaged"):
        parquet.read(str(tmp_path / "bad.parquet"), pq.ParquetFile.read)


def test_columns_of_other_types_are_named_with_the_type_that_is_right(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    expected = pa.schema([("a", pa.string()), ("b", pa.list_(pa.int32())), ("c", LABELS_TYPE)])
    good = pa.table({"a": ["x"], "b": [[1]], "c": [[("x", 1.0)]]}, schema=expected)
    for name, column, said in (
        ("a", pa.array([1]), "column a is int64, not string"),
        ("b", pa.array([["x"]]), "column b is list<element: string>, not list<item: int32>"),
        ("c", pa.array(["x"]), "column c is string, not map<string, float>"),
    ):
        pq.write_table(replaced(good, name, column), path)
        with pytest.raises(UserError, match=re.escape(said)):
            parquet.read(str(path), pq.ParquetFile.read, expected)
    pq.write_table(good.drop_columns(["b"]), path)
    with pytest.raises(UserError, match="has no column b"):
        parquet.read(str(path), pq.ParquetFile.read, expected)


def test_plain_files_are_read_whatever_wrote_them(tmp_path: Path) -> None:
    path, expected = tmp_path / "plain.parquet", pa.schema([("a", pa.string()), ("b", pa.list_(pa.float32()))])
    table = pa.table({"a": [f"row {i}" for i in range(1000)], "b": [[float(i)] for i in range(1000)]}, schema=expected)
    for options in ({}, {"store_schema": False}, {"compression": "zstd", "row_group_size": 1}):
        pq.write_table(table, path, **options)  # the last one has a footer of over 64 KiB
        read = parquet.read(str(path), pq.ParquetFile.read, expected)
        assert read.to_pylist() == table.to_pylist()
        with parquet.open_file(str(path), 2**20) as file:
            assert file.read().to_pylist() == table.to_pylist()


def test_no_other_code_opens_parquet() -> None:
    doors = re.compile(
        r"ParquetFile\(|pq\.read_|parquet\.read_table|read_parquet\(|ParquetDataset|import dataset|pa\.dataset|read_metadata\("
    )
    found = [
        f"{path.relative_to(SOURCES)}: {line.strip()}"
        for path in sorted(SOURCES.rglob("*.py"))
        for line in path.read_text().splitlines()
        if doors.search(line) and path != SOURCES / "storage" / "parquet.py"
    ]
    assert not found, "read Parquet through cmcgns.storage.parquet"


def test_the_schema_in_a_footer_is_found_by_its_bytes() -> None:
    data = evil_file(Path("/nowhere"))
    schema = re.search(rb"ARROW:schema\x18[\x80-\xff]*[\x00-\x7f]([A-Za-z0-9+/=]+)", data)
    assert schema
    assert b"ray.data.arrow_pickled_object" in base64.b64decode(schema[1])
