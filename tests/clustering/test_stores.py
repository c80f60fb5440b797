"""Rows from Parquet: every actor's part, in memory or in a file, equals the array that was written."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from cmcgns.clustering.embeddings import (
    BATCH_ROWS,
    Columns,
    Embeddings,
    MemoryRows,
    RowFile,
    StreamedRows,
    load_rows,
    open_embeddings,
)
from cmcgns.clustering.kmeans import BLOCK_ROWS, kmeans, numpy_assign
from cmcgns.clustering.rows import RowArray, round_to_grid
from cmcgns.errors import UserError
from tests.clustering.sets import heavy_tailed, write_parquet

ROWS = 3 * BATCH_ROWS + 123
COLUMNS = Columns("id", "vector")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Embeddings:
    folder = write_parquet(
        tmp_path_factory.mktemp("set"), heavy_tailed(ROWS), [0, 5000, 5100, ROWS], row_group_size=4500
    )
    return open_embeddings(str(folder), COLUMNS)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_are_the_rows_in_order_and_equally_many(written: Embeddings, parts: int) -> None:
    dealt = written.split(parts)
    assert max(part.rows for part in dealt) - min(part.rows for part in dealt) <= 1
    assert np.array_equal(np.concatenate([part.ordinals_N for part in dealt]), np.arange(ROWS))
    ids = [id for part in dealt for batch in part.batches(["id"]) for id in batch.column(0).to_pylist()]
    assert ids == [f"row-{i}" for i in range(ROWS)]


@pytest.mark.parametrize("kind", [MemoryRows, RowFile, StreamedRows])
def test_rows_are_the_same_in_every_store(written: Embeddings, kind: type, tmp_path: Path) -> None:
    part = written.split(3)[1]
    if kind is StreamedRows:
        store = StreamedRows(part)
    else:
        store, _ = load_rows(part, 2**40 if kind is MemoryRows else 0, str(tmp_path))
    assert isinstance(store, kind)
    wanted_ND = round_to_grid(heavy_tailed(ROWS))[part.ordinals_N]
    assert store.shape == wanted_ND.shape
    random = np.random.default_rng(0)
    for _ in range(20):
        start, stop = np.sort(random.integers(0, part.rows + 1, 2))
        assert np.array_equal(store[start:stop], wanted_ND[start:stop])
        i = int(random.integers(part.rows))
        assert np.array_equal(store[i], wanted_ND[i])
    assert not list(tmp_path.iterdir())  # the file has no name and disappears with the process


@pytest.mark.parametrize("kind", ["file", "streamed"])
def test_a_fit_is_the_same_with_every_store(written: Embeddings, kind: str, tmp_path: Path) -> None:
    store = StreamedRows(written) if kind == "streamed" else load_rows(written, 0, str(tmp_path))[0]
    ours, theirs = RowArray(store, assign=numpy_assign), RowArray(heavy_tailed(ROWS), assign=numpy_assign)
    start_KD = theirs.subset(20, 0)
    assert np.array_equal(ours.subset(20, 0), start_KD)
    for batch_rows in (None, BLOCK_ROWS):
        fits = [kmeans(rows, start_KD, 3, 0.0, batch_rows) for rows in (ours, theirs)]
        assert np.array_equal(fits[0].centroids_KD, fits[1].centroids_KD)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("fixed", [True, False])
def test_lists_of_any_precision_are_read(dtype: type, fixed: bool, tmp_path: Path) -> None:
    rows_ND = heavy_tailed(100).astype(dtype)
    folder = write_parquet(tmp_path, rows_ND, [0, 60, 100], fixed=fixed)
    store, _ = load_rows(open_embeddings(str(folder), COLUMNS), 2**30, None)
    assert np.array_equal(store[0:100], round_to_grid(rows_ND))


def test_weights_come_with_their_rows(tmp_path: Path) -> None:
    weights_N = np.linspace(0.5, 2.0, 100)
    folder = write_parquet(tmp_path, heavy_tailed(100), [0, 60, 100], weights_N=weights_N)
    part = open_embeddings(str(folder), Columns("id", "vector", "weight")).split(3)[1]
    assert np.array_equal(load_rows(part, 2**30, None)[1], weights_N[part.ordinals_N])
    folder = write_parquet(
        tmp_path / "wrong", heavy_tailed(100), [0, 100], 30, weights_N=np.where(np.arange(100) == 71, -1, 1.0)
    )
    with pytest.raises(UserError, match=r"part-000.parquet, row group 2, row 11: weight -1.0 in column 'weight'"):
        load_rows(open_embeddings(str(folder), Columns("id", "vector", "weight")), 2**30, None)


@pytest.mark.parametrize(("value", "what"), [(0.0, "is zero"), (np.nan, "has NaN or infinity"), (np.inf, "has NaN")])
def test_a_row_without_direction_is_refused_by_file_row_group_and_row(value: float, what: str, tmp_path: Path) -> None:
    rows_ND = heavy_tailed(200)
    rows_ND[173] = value
    part = open_embeddings(str(write_parquet(tmp_path, rows_ND, [0, 90, 200], 40)), COLUMNS).split(2)[1]
    with pytest.raises(UserError, match=rf"part-001.parquet, row group 2, row 3 {what}"):
        load_rows(part, 2**30, None)
    with pytest.raises(UserError, match="row group 2, row 3 "):
        StreamedRows(part)[0:100]


def test_a_vector_of_another_length_is_refused_by_its_row(tmp_path: Path) -> None:
    vectors = [[1.0, 2.0]] * 5 + [[1.0]] + [[1.0, None]]
    parquet.write_table(pa.table({"id": list(range(7)), "vector": vectors}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 5: column 'vector' has 1 numbers instead of 2"):
        load_rows(open_embeddings(str(tmp_path), COLUMNS), 2**30, None)


def test_files_that_are_no_embeddings_are_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.parquet files"):
        open_embeddings(str(tmp_path), COLUMNS)
    write_parquet(tmp_path, heavy_tailed(10), [0, 10])
    with pytest.raises(UserError, match=r"data\.vector_column embedding: .* it has id, vector, text"):
        open_embeddings(str(tmp_path), Columns("id", "embedding"))
    with pytest.raises(UserError, match=r"data\.vector_column text is string"):
        open_embeddings(str(tmp_path), Columns("id", "text"))
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"b\.parquet"):
        open_embeddings(str(tmp_path), COLUMNS)


def test_a_full_disk_is_reported_in_advance_with_the_numbers(
    written: Embeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shutil import _ntuple_diskusage  # type: ignore[attr-defined]

    monkeypatch.setattr("shutil.disk_usage", lambda folder: _ntuple_diskusage(2**30, 2**30, 2**10))
    with pytest.raises(UserError, match=r"clustering.scratch .* has 0.0 GiB free; 12411 rows of 64 need 0.0"):
        load_rows(written, 0, None)


def test_lists_of_unequal_length_with_the_right_total_are_refused_by_row(tmp_path: Path) -> None:
    lists = pa.array([[1.0, 0, 0, 0], [1.0, 0, 0], [0, 1.0, 0, 0, 1.0]], pa.list_(pa.float32()))
    parquet.write_table(pa.table({"id": ["a", "b", "c"], "vector": lists}), tmp_path / "set.parquet")
    with pytest.raises(UserError, match="row 1: column 'vector' has 3 numbers instead of 4"):
        load_rows(open_embeddings(str(tmp_path / "set.parquet"), Columns("id", "vector", None, None)), 2**30, None)


@pytest.mark.parametrize("memory", [0, 2**30])
def test_a_file_that_has_become_shorter_is_refused(memory: float, tmp_path: Path) -> None:
    before = open_embeddings(str(write_parquet(tmp_path, heavy_tailed(100), [0, 100])), COLUMNS)
    write_parquet(tmp_path, heavy_tailed(60), [0, 60])
    with pytest.raises(UserError, match="had 100 rows and now has 60; it must not change"):
        load_rows(before, memory, None)


def test_id_and_weight_columns_of_the_wrong_type_are_refused(tmp_path: Path) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 0.0, 0.0, 1.0]), 2)
    parquet.write_table(
        pa.table({"id": [b"a", b"b"], "w": ["x", "y"], "n": [1, 2], "vector": vectors}), tmp_path / "set.parquet"
    )
    uri = str(tmp_path / "set.parquet")
    with pytest.raises(UserError, match=r"data.id_column id is binary .* must hold strings or integers"):
        open_embeddings(uri, Columns("id", "vector", None, None))
    with pytest.raises(UserError, match=r"data.weight_column w is string .* must hold numbers"):
        open_embeddings(uri, Columns("n", "vector", "w", None))
