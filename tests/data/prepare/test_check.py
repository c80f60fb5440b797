"""`jobs/prepare.py --check` on intact, damaged and leaking sets."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cmcgns.data.manifest import read_manifest, self_hash
from cmcgns.data.prepare.check import check_set, read_shards
from cmcgns.data.prepare.leaks import facts_on_disk
from cmcgns.errors import UserError
from tests.data.prepare.sets import run, shards

pytestmark = pytest.mark.ray


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "set")
    return tmp_path / "set"


def findings(folder: Path) -> list[dict[str, Any]]:
    path = folder / "findings.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [each for each in found if each["kind"] != "report in two splits"]


def rewrite(path: Path, change: Any) -> None:
    """Rewrite the shard at ``path`` with its rows changed by ``change``, in the same row groups."""
    file = pq.ParquetFile(path)
    groups = [change(file.read_row_group(number).to_pylist()) for number in range(file.num_row_groups)]
    with pq.ParquetWriter(path, file.schema_arrow) as writer:
        for rows in groups:
            writer.write_table(pa.Table.from_pylist(rows, schema=file.schema_arrow), row_group_size=len(rows))


def test_an_intact_set_passes(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_set(str(prepared)) == 0
    assert "shards are unchanged" in capsys.readouterr().out
    assert findings(prepared) == []
    (prepared / "findings.jsonl").unlink(missing_ok=True)


def test_damage_is_reported_with_its_location(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, short, changed, silent = sorted(shards(str(copied)))[:4]
    (copied / missing).unlink()
    (copied / short).write_bytes((copied / short).read_bytes()[:-1000])
    data = bytearray((copied / changed).read_bytes())
    data[len(data) // 3] ^= 0xFF
    (copied / changed).write_bytes(bytes(data))
    (copied / "notes.txt").write_text("mine")
    assert check_set(str(copied)) == 1
    found = findings(copied)
    where = {(each["kind"], each["ids"][0].partition("#")[0]) for each in found if each["kind"] != "film"}
    assert where == {("shard", missing), ("shard", short), ("file", "notes.txt"), ("row group", changed)}
    assert not any(silent in each["ids"][0] for each in found)
    assert "faults" in capsys.readouterr().out


def test_a_changed_value_in_an_intact_file_is_found(copied: Path) -> None:
    name = sorted(shards(str(copied)))[1]

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[0]["sentences"][0] += " not"
        return rows

    rewrite(copied / name, change)
    assert check_set(str(copied)) == 1
    kinds = {each["kind"] for each in findings(copied)}
    assert "shard" in kinds  # it has another size, so it is not read


def test_storage_failing_during_the_check_is_one_message(copied: Path) -> None:
    manifest = read_manifest(str(copied))
    (copied / manifest.shards[1].name).unlink()
    with (
        facts_on_disk(manifest.rows) as facts,
        pytest.raises(UserError, match=f"{manifest.shards[1].name} does not exist"),
    ):
        read_shards(str(copied), manifest.shards, facts)


def test_a_patient_moved_into_another_split_is_found(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    train, test = (
        next(shard for shard in manifest["shards"] if shard["split"] == split) for split in ("train", "test")
    )
    patient = pq.read_table(copied / train["name"], columns=["patient_id"])["patient_id"][0].as_py()

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[0] |= {"patient_id": patient, "group": patient}
        return rows

    rewrite(copied / test["name"], change)
    test["bytes"] = (copied / test["name"]).stat().st_size
    manifest["hash"] = self_hash(manifest)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert check_set(str(copied)) == 1
    assert {each["kind"] for each in findings(copied)} == {"row group", "patient in two splits"}
    assert read_manifest(str(copied)).rows == sum(shard["rows"] for shard in manifest["shards"])


def test_an_invalid_set_raises(tmp_path: Path) -> None:
    done = run("--check", f"--prepare.out={tmp_path}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no complete prepared set" in done.stderr
