"""`jobs/prepare.py`: the content of a prepared set, which is the same after any interruptions."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from cmcgns.data.image import Target, shrink
from cmcgns.data.manifest import read_manifest
from cmcgns.data.order import study_key
from cmcgns.data.prepare.config import PrepareConfig
from cmcgns.data.prepare.shard import encode
from cmcgns.data.readers import open_source
from cmcgns.data.readers.prepared import decode_prepared
from cmcgns.data.record import PREPARED_SCHEMA
from cmcgns.data.reports import parse_report
from cmcgns.errors import BadRow, UserError
from tests.data.prepare.sets import (
    GROUP,
    SIZE,
    STUDIES,
    files,
    fingerprint,
    kill_when,
    prepare_here,
    rows,
    run,
    settings,
    shards,
)

pytestmark = pytest.mark.ray


def test_each_row_equals_the_pair_from_the_raw_set(raw: Path, prepared: Path) -> None:
    """The slow way: one film and report after another through the raw source."""
    source = open_source(str(raw), target=Target(SIZE, "shorter"))
    studies = {study["study_id"]: study for study in source.index().table.to_pylist()}
    found = rows(str(prepared))
    for row in found:
        study = studies[row["study_id"]]
        film = next(film for film in study["films"] if film["image_id"] == row["image_id"])
        pixels = source.read_image(film["path"])
        image_HW = cv2.imdecode(np.frombuffer(row["image"], np.uint8), cv2.IMREAD_UNCHANGED)
        assert image_HW.dtype == np.uint8
        assert np.array_equal(image_HW, shrink(pixels.grey_HW, SIZE))
        assert (row["height"], row["width"]) == image_HW.shape
        assert min(image_HW.shape) <= SIZE
        assert tuple(row["crop"]) == tuple(pixels.frame)
        assert row["report"] == study["report"]
        assert row["sentences"] == parse_report(study["report"]).sentences
        assert (row["source"], row["view"]) == (film["path"], film["view"])
        for name in ("patient_id", "group", "split"):
            assert row[name] == study[name]
        assert sorted(row["labels"]) == sorted(study["labels"])
    assert list(found[0]) == PREPARED_SCHEMA.names
    films = sum(len(study["films"]) for study in studies.values())
    assert len({row["image_id"] for row in found}) == len(found) == films - 3


def test_nothing_is_lost_without_a_reason(raw: Path, prepared: Path) -> None:
    bad = [json.loads(line) for line in (prepared / "bad_rows.jsonl").read_text().splitlines()]
    assert sorted(row["reason"] for row in bad) == [
        "film file is empty (0 bytes)",
        "film file is missing",
        "film file is neither JPEG, PNG, TIFF, BMP, WebP nor DICOM",
    ]
    # a bad film is named if its study has another one
    assert all("/" in row["source"] for row in bad)
    manifest = read_manifest(str(prepared))
    assert manifest.bad_rows == 3
    assert manifest.studies == STUDIES - 2


def test_the_manifest_matches_the_files(prepared: Path) -> None:
    manifest = read_manifest(str(prepared))
    found = rows(str(prepared))
    assert manifest.rows == len(found)
    assert sorted(files(str(prepared))) == sorted(
        ["manifest.json", "bad_rows.jsonl", *(shard.name for shard in manifest.shards)]
    )
    for shard in manifest.shards:
        footer = pq.read_metadata(prepared / shard.name)
        assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [
            g.rows for g in shard.row_groups
        ]
        assert (prepared / shard.name).stat().st_size == shard.bytes
        assert shard.studies <= GROUP * len(shard.row_groups)
    splits = manifest.summary["splits"]
    assert {name: facts["rows"] for name, facts in splits.items()} == {
        name: sum(row["split"] == name for row in found) for name in ("train", "valid", "test")
    }
    assert sum(facts["views"]["AP"] for facts in splits.values()) == sum(row["view"] == "AP" for row in found)


def test_patients_are_in_one_split_and_studies_in_one_group(prepared: Path) -> None:
    splits: dict[str, set[str]] = {}
    groups: dict[str, set[str]] = {}
    for name in shards(str(prepared)):
        file = pq.ParquetFile(prepared / name)
        for number in range(file.num_row_groups):
            for row in file.read_row_group(number, ["patient_id", "study_id", "split"]).to_pylist():
                splits.setdefault(row["patient_id"], set()).add(row["split"])
                groups.setdefault(row["study_id"], set()).add(f"{name}#{number}")
    assert all(len(found) == 1 for found in [*splits.values(), *groups.values()])


def test_the_prepared_set_is_a_corpus_like_the_raw_one(raw: Path, prepared: Path) -> None:
    """The same studies in the same order in any epoch, except the bad ones."""
    there, here = open_source(str(raw)), open_source(str(prepared))
    assert here.format == "parquet"
    raw_index, index = there.index(), here.index()
    for split in ("train", "valid", "test"):
        raw_table, raw_arrangement = there.arrange(raw_index.split(split), GROUP)
        table, arrangement = here.arrange(index.split(split), 999)
        kept = set(table["study_id"].to_pylist())
        for epoch in (0, 1, 7):
            wanted = raw_table["study_id"].take(raw_arrangement.epoch(5, epoch, 2).row_S).to_pylist()
            found = table["study_id"].take(arrangement.epoch(5, epoch, 2).row_S).to_pylist()
            assert found == [study for study in wanted if study in kept]
        first = table.to_pylist()[0]
        path = first["films"][0]["path"]
        reader = here.reader([path])
        assert reader.read_sentences(first, path).sentences == parse_report(here.read_report(first)).sentences
        assert min(reader.read_image(path).grey_HW.shape) <= SIZE


def test_a_killed_prepare_resumes_to_the_same_set(raw: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert kill_when(lambda: len(shards(str(out))) >= 2, *settings(raw, out))
    (out / ".train-00099.parquet.partial-1").write_bytes(b"half")
    left = len(shards(str(out)))
    with pytest.raises(UserError, match="incomplete prepared set"):
        open_source(str(out))
    with pytest.raises(UserError, match=r"started with image_size 96, not 64"):
        prepare_here(raw, out, "--prepare.image_size=64")
    assert prepare_here(raw, out) == 0
    manifest = read_manifest(str(out))
    assert 2 <= left < len(manifest.shards)
    assert manifest.content_hash == read_manifest(str(prepared)).content_hash
    assert files(str(out)) == files(str(prepared))
    assert fingerprint(str(out)) == fingerprint(str(prepared))
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_running_prepare_twice_makes_nothing_twice(
    raw: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert prepare_here(raw, prepared) == 0
    assert "was already complete" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_ids_become_keyed_hashes(local_ray: None, raw: Path, prepared: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a secret of the hospital")
    key.chmod(0o600)
    secret = f"--prepare.pseudonymise_key_file={key}"
    assert prepare_here(raw, tmp_path / "set", secret) == 0
    plain, hashed = rows(str(prepared)), rows(str(tmp_path / "set"))
    names = {}
    renamed = {row["image"]: row for row in hashed}
    assert len(renamed) == len(plain) == len(hashed)
    for before in plain:
        after = renamed[before["image"]]
        for column in ("patient_id", "study_id", "group", "image_id", "source"):
            assert names.setdefault(before[column], after[column]) == after[column]
            assert len(after[column]) == 20
    assert len(set(names.values())) == len(names)
    written = "".join(path.read_text() for path in (tmp_path / "set").glob("*.json*"))
    assert not any(name in written for name in names)
    # in another order: sorted by id, pseudonyms could be matched with the ids
    for split in ("train", "valid", "test"):
        studies = list(dict.fromkeys(row["study_id"] for row in hashed if row["split"] == split))
        assert studies == sorted(studies, key=study_key)
    # the same key gives the same pseudonyms; another key is rejected for a started set
    key.write_text("a secret of another hospital")
    with pytest.raises(UserError, match="pseudonym_key"):
        prepare_here(raw, tmp_path / "set", secret)


def test_too_many_bad_films_stop_it_and_finished_shards_are_kept(
    local_ray: None, raw: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    assert prepare_here(raw, out, "--data.max_bad_fraction=0.001") == 1
    said = capsys.readouterr().out
    assert "max_bad_fraction 0.001" in said
    assert "film file is" in said
    assert prepare_here(raw, out) == 0
    assert read_manifest(str(out)).content_hash == read_manifest(str(prepared)).content_hash


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--prepare.out="], "prepare.out is missing"),
        (["--prepare.out=gs://bucket/x"], "prepare.out gs://bucket/x"),
        (["--prepare.pseudonymise_key_file=nowhere"], "pseudonymise_key_file nowhere"),
        (["--prepare.encoding=gif"], "prepare.encoding"),
        (["--data.format=parquet"], "already"),
        (["--prepare.size=3"], "there is no setting 'prepare.size'"),
        (["--data.max_bad_fraction=2"], "data.max_bad_fraction"),
    ],
)
def test_what_cannot_be_prepared_raises(raw: Path, tmp_path: Path, change: list[str], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        prepare_here(raw, tmp_path / "set", *change)
    assert not (tmp_path / "set").exists()


def test_invalid_settings_give_one_message_and_status_2(raw: Path, tmp_path: Path) -> None:
    done = run(*settings(raw, tmp_path / "set"), "--data.uri=nowhere")
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "nowhere does not exist" in done.stderr


def test_a_folder_with_other_files_is_not_changed(local_ray: None, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(UserError, match="is not empty"):
        prepare_here(raw, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_prepare_does_not_resume_after_reports_have_changed(raw: Path, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(raw, tmp_path / "raw")
    table = tmp_path / "raw" / "pairs.csv"
    table.write_text(table.read_text().replace("effusion", "oedema", 1))
    with pytest.raises(UserError, match=r"now has \d+ studies, or their content changed; give a new folder"):
        prepare_here(tmp_path / "raw", prepared)


def test_tasks_larger_than_the_machine_raise(local_ray: None, raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prepare.cpus_per_task 64 is more than the 2 CPUs"):
        prepare_here(raw, tmp_path / "set", "--prepare.cpus_per_task=64")


def test_a_film_too_large_for_its_format_is_a_bad_row() -> None:
    long_HW = np.zeros((70_000, 4), np.uint8)
    with pytest.raises(BadRow, match="film of 4 x 70000 pixels is too large for jpeg"):
        encode(long_HW, PrepareConfig())
    assert np.array_equal(decode_prepared(encode(long_HW, PrepareConfig(encoding="png"))), long_HW)
    assert decode_prepared(b"") is None


def test_preparing_a_prepared_set_raises(local_ray: None, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is already a prepared set"):
        prepare_here(prepared, tmp_path / "set")


def test_a_missing_or_broken_shard_gives_bad_rows(local_ray: None, raw: Path, tmp_path: Path, prepared: Path) -> None:
    """Its studies are bad rows with the reason; the others are read."""
    shutil.copytree(prepared, tmp_path / "set")
    source: Any = open_source(str(tmp_path / "set"))
    studies, _ = source.arrange(source.index().split("train"), GROUP)
    paths = [study["films"][0]["path"] for study in studies.to_pylist()]
    first, second = sorted({path.partition("#")[0] for path in paths})[:2]
    (tmp_path / "set" / first).unlink()
    data = (tmp_path / "set" / second).read_bytes()
    (tmp_path / "set" / second).write_bytes(data[: len(data) // 3])
    reader = source.reader(paths)
    reasons = {first: "is missing", second: "truncated or broken"}
    for path in paths:
        shard = path.partition("#")[0]
        if shard in reasons:
            with pytest.raises(BadRow, match=reasons[shard]):
                reader.read_image(path)
        else:
            assert reader.read_image(path).grey_HW.size
