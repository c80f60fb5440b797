"""The hash of a prepared set depends on its values, not on Arrow's memory layout."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cmcgns.data.manifest import Manifest, RowGroup, Shard, content_hash, joint_hash, read_manifest
from cmcgns.data.record import PREPARED_SCHEMA, index_table
from cmcgns.errors import UserError


def row(number: int) -> dict[str, object]:
    texts = {name: f"{name} {number}" for name in ("patient_id", "study_id", "group", "image_id", "report", "source")}
    return texts | {
        "view": "PA", "split": "train", "image": bytes([number]) * number, "height": 10 + number, "width": 20,
        "crop": [0, 1, 2, number], "sentences": ["one two"] * number, "labels": [("Edema", float(number))] * (number % 2),
    }  # fmt: skip


ROWS = pa.Table.from_pylist([row(number) for number in range(7)], schema=PREPARED_SCHEMA)


def test_equal_rows_have_equal_hashes_in_any_memory_layout(tmp_path: Path) -> None:
    wanted = content_hash(ROWS)
    pq.write_table(ROWS, tmp_path / "rows.parquet", row_group_size=2)
    padded = pa.concat_tables([ROWS.slice(3), ROWS, ROWS])
    for held in (
        pa.concat_tables([ROWS.slice(0, 3), ROWS.slice(3)]),
        padded.slice(4, 7),
        pa.Table.from_pylist(ROWS.to_pylist(), schema=PREPARED_SCHEMA),
        pq.read_table(tmp_path / "rows.parquet"),
    ):
        assert content_hash(held.select(PREPARED_SCHEMA.names)) == wanted


@pytest.mark.parametrize("column", PREPARED_SCHEMA.names)
def test_any_changed_value_changes_the_hash(column: str) -> None:
    values = ROWS[column].to_pylist()
    values[2], values[3] = values[3], values[2]
    field = PREPARED_SCHEMA.field(column)
    changed = ROWS.set_column(ROWS.schema.get_field_index(column), field, pa.array(values, field.type))
    same = ROWS[column].to_pylist()[2] == ROWS[column].to_pylist()[3]
    assert (content_hash(changed) == content_hash(ROWS)) == same


def test_text_boundaries_change_the_hash() -> None:
    schema = pa.schema([pa.field("report", pa.string())])
    hashes = {
        content_hash(pa.table({"report": texts}, schema=schema)) for texts in (["ab", "c"], ["a", "bc"], ["abc", ""])
    }
    assert len(hashes) == 3
    assert joint_hash(["ab", "c"]) != joint_hash(["c", "ab"])


def test_a_manifest_reads_back_as_itself(tmp_path: Path) -> None:
    shard = Shard("train-0.parquet", "train", 123, [RowGroup(0, 7, 6, "ab"), RowGroup(2, 1, 1, "cd")])
    manifest = Manifest(
        8, 7, "ef", {"train": 3}, [shard], {"uri": "x"}, {"image_size": 512}, 2, {"view L": 3}, {"a": [1]}
    )
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert read_manifest(str(tmp_path)) == manifest
    assert (shard.rows, shard.studies) == (8, 7)


@pytest.mark.parametrize("text", ["", "{}", '{"version": 99}', '{"version": 1, "shards": [{}]}'])
def test_an_invalid_manifest_raises(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(str(tmp_path))


def test_the_hash_of_an_index_ignores_memory_layout_and_changes_with_a_path() -> None:
    def study(number: int, film: str = "") -> dict[str, object]:
        films = [{"image_id": f"i{number}", "path": f"{number}{film}.png", "view": None if number % 2 else "PA"}]
        return {"study_id": f"s{number}", "films": films * (1 + number % 3), "labels": [("Edema", 1.0)]}

    table = index_table([study(number) for number in range(9)])
    again = index_table([study(number) for number in range(9)])
    cut = pa.concat_tables([table.slice(0, 4), table.slice(4)])
    padded = pa.concat_tables([table.slice(5), table]).combine_chunks().slice(4)
    assert content_hash(table) == content_hash(again) == content_hash(cut) == content_hash(padded)
    assert content_hash(index_table([study(n, "x" if n == 8 else "") for n in range(9)])) != content_hash(table)
