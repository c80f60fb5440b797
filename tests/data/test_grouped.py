"""A large prepared set, known by row group: the same studies in the same order as a list of them, and a few bytes a row group."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cmcgns.config import DataConfig
from cmcgns.data import manifest as manifests
from cmcgns.data import readers
from cmcgns.data.image import Target
from cmcgns.data.order import VALIDATION_EPOCH
from cmcgns.data.readers import open_splits, prepared
from cmcgns.data.readers.grouped import GroupedStudies, grouped_splits
from cmcgns.data.readers.prepared import PreparedSource
from cmcgns.data.studies import ListedStudies, Studies
from cmcgns.errors import BadRow, UserError
from tests.data.large_sets import small_set

SIZES = {"train": 500, "valid": 130}
GROUP, SHARD, WINDOW = 16, 5, 3
LOST = (7, 31)
"""Groups of training without a usable study; the last group is one of them."""


def views(number: int) -> list[str]:
    """Some studies have a second film, some only one of another view."""
    return ["LATERAL"] if number % 7 == 3 else ["PA", "LATERAL"] if number % 5 == 0 else ["AP"]


@pytest.fixture(autouse=True)
def fresh() -> None:
    for cached in (prepared._manifest, prepared._footer, prepared._column_hashes):
        cached.cache_clear()  # as in a new process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_set(tmp_path_factory.mktemp("large") / "set", SIZES, GROUP, SHARD, views, LOST)


def opened(uri: str, listed: bool, monkeypatch: pytest.MonkeyPatch, **settings: object) -> readers.Splits:
    """The set as a small one is opened, or as a large one."""
    monkeypatch.setattr(readers, "LISTED_STUDIES", 10**9 if listed else 0)
    return open_splits("data.uri", DataConfig(uri=uri, **settings), Target(4, "longer"), 256)


def read(studies: Studies, epoch: int, positions: range | None = None) -> list[tuple[dict[str, object], object]]:
    """Each study at ``positions`` of the order with the pixels and sentences of its first film, piece by piece."""
    order = studies.epoch(5, epoch, WINDOW)
    positions = positions or range(len(studies))
    inside = [start for start in order.starts if positions.start < start < positions.stop]
    bounds, found = [positions.start, *inside, positions.stop], []
    for start, stop in pairwise(bounds):
        rows, reader_of = studies.read(order, range(start, stop))
        paths = [row["films"][0]["path"] for row in rows]
        reader = reader_of(paths)
        for row, path in zip(rows, paths, strict=True):
            try:
                pixel = reader.read_image(path).grey_HW[0, 0]
                found.append((row, (pixel, reader.read_sentences(row, path).sentences)))
            except BadRow as bad:
                found.append((row, str(bad)))
    return found


@pytest.mark.parametrize("epoch", [0, 3, VALIDATION_EPOCH])
@pytest.mark.parametrize("wanted", [("PA", "AP", "LATERAL"), ("PA",), ("AP",)])
def test_the_order_is_that_of_a_list_of_all_studies(
    folder: str, epoch: int, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = (opened(folder, listed, monkeypatch, views=wanted) for listed in (True, False))
    assert small.filtered == large.filtered
    assert list(small.studies) == list(large.studies) == ["train", "valid"]
    for split in SIZES:
        expected, found = small.studies[split], large.studies[split]
        assert isinstance(expected, ListedStudies)
        assert isinstance(found, GroupedStudies)
        assert len(found) == len(expected) > 0
        orders = [each.epoch(5, epoch, WINDOW) for each in (expected, found)]
        assert (np.unique(orders[0].starts) == np.unique(orders[1].starts)).all()
        assert read(found, epoch) == read(expected, epoch)
        assert list(found.ids()) == list(expected.ids())


def test_a_restart_in_the_middle_goes_on_in_the_same_order(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train = opened(folder, False, monkeypatch).studies["train"]
    whole = read(train, 1)
    for position in (47, 48, 300):
        assert read(train, 1, range(position, len(train))) == whole[position:]


@pytest.mark.parametrize("most", [None, 1, 16, 40, 129, 500])
def test_the_first_studies_are_those_of_the_list(
    folder: str, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = (opened(folder, listed, monkeypatch).studies["valid"].first(most) for listed in (True, False))
    assert len(large) == len(small)
    assert read(large, VALIDATION_EPOCH) == read(small, VALIDATION_EPOCH)
    assert read(large, 2) == read(small, 2)


def test_the_reports_for_a_vocabulary_are_those_of_the_first_studies(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for most in (1, 50, 10_000):
        sampled = []
        for listed in (True, False):
            portions = opened(folder, listed, monkeypatch).studies["train"].samples(most)
            sampled.append(
                [
                    (study, reader_of([study["films"][0]["path"]]).read_sentences(study, study["films"][0]["path"]))
                    for studies, reader_of in portions
                    for study in studies
                ]
            )
        assert sampled[0] == sampled[1]
        assert len(sampled[0]) == min(most, len(opened(folder, True, monkeypatch).studies["train"]))


def test_studies_of_a_lost_shard_are_bad_rows_and_the_others_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = small_set(tmp_path / "set", SIZES, GROUP, SHARD, views)
    train = opened(uri, False, monkeypatch, views=["PA", "AP", "LATERAL"]).studies["train"]
    whole = [row["study_id"] for row, _ in read(train, 4)]
    (tmp_path / "set" / "train-00002.parquet").unlink()
    prepared._footer.cache_clear()
    found = read(train, 4)
    bad = [what for _, what in found if isinstance(what, str)]
    assert bad == ["shard train-00002.parquet is missing"] * (GROUP * SHARD)
    lost = {f"train {number}" for number in range(2 * SHARD * GROUP, 3 * SHARD * GROUP)}
    good = [row["study_id"] for row, what in found if not isinstance(what, str)]
    assert good == [study for study in whole if study not in lost]
    assert len({row["study_id"] for row, _ in found}) == SIZES["train"]
    for start, stop in pairwise(train.epoch(5, 4, WINDOW).starts):
        of_window = [isinstance(what, str) for _, what in found[start:stop]]
        assert of_window == sorted(of_window)  # the others first


def test_a_row_group_costs_the_same_few_bytes_whatever_it_holds(tmp_path: Path) -> None:
    """200 bytes of arrays a row group: 80 MB for 100 million studies in groups of 256."""
    held = []
    for group in (8, 32):
        uri = small_set(tmp_path / f"of{group}", {"train": 20 * group, "valid": 1}, group, 5, lambda number: ["PA"])
        train = grouped_splits(PreparedSource(uri))[0]["train"]
        held.append(sum(each.nbytes for each in vars(train).values() if isinstance(each, np.ndarray)))
    assert held[0] == held[1] <= 200 * 20


def changed(path: Path, column: str) -> None:
    """Rewrite a shard with the values of ``column`` in reverse order in each row group."""
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
    with pq.ParquetWriter(path, file.schema_arrow) as writer:
        for rows in groups:
            place = rows.schema.get_field_index(column)
            other = rows.set_column(place, rows.schema.field(column), rows[column].take(np.arange(len(rows))[::-1]))
            writer.write_table(other, row_group_size=len(other))


@pytest.mark.parametrize("column", ["study_id", "patient_id", "image_id", "labels"])
def test_a_changed_index_is_refused_when_it_is_read(
    tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = small_set(tmp_path / "set", SIZES, GROUP, SHARD, views)
    changed(tmp_path / "set" / "train-00001.parquet", column)
    message = rf"train-00001\.parquet: column {column} of row group . is not what the manifest says"
    with pytest.raises(UserError, match=message):
        read(opened(uri, False, monkeypatch, views=["PA", "AP", "LATERAL"]).studies["train"], 0)


def test_a_changed_film_is_a_bad_row_for_each_study_of_its_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = small_set(tmp_path / "set", SIZES, GROUP, SHARD, lambda number: ["PA"])
    train = opened(uri, False, monkeypatch).studies["train"]
    whole = read(train, 0)
    changed(tmp_path / "set" / "train-00001.parquet", "image")
    prepared._footer.cache_clear()
    found = read(train, 0)
    assert [row for row, _ in found] == [row for row, _ in whole]
    bad = {row["study_id"]: what for row, what in found if isinstance(what, str)}
    assert set(bad.values()) == {"column image of shard train-00001.parquet is not what was prepared"}
    assert set(bad) == {f"train {number}" for number in range(SHARD * GROUP, 2 * SHARD * GROUP)}


@pytest.mark.parametrize("wanted", [["PA", "AP", "LATERAL"], ["PA"]])
def test_the_same_rows_in_other_row_groups_are_refused(
    tmp_path: Path, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = small_set(tmp_path / "set", SIZES, GROUP, SHARD, views)
    path = tmp_path / "set" / "train-00001.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=9)
    with pytest.raises(UserError, match=r"train-00001\.parquet has .* row groups, the manifest says .* in 5"):
        read(opened(uri, False, monkeypatch, views=wanted).studies["train"], 0)


def test_a_large_set_of_the_first_version_is_read_without_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = small_set(tmp_path / "set", SIZES, GROUP, SHARD, views)
    expected = read(opened(uri, True, monkeypatch).studies["train"], 2)
    path = tmp_path / "set" / "manifest.json"
    fields = json.loads(path.read_text()) | {"version": 1}
    del fields["hash"]
    for shard in fields["shards"]:
        for group in shard["row_groups"]:
            group["columns"] = {}
    path.write_text(json.dumps(fields))
    prepared._manifest.cache_clear()
    assert read(opened(uri, False, monkeypatch).studies["train"], 2) == expected


@pytest.fixture
def in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The set with its manifest in parts of two shards."""
    monkeypatch.setattr(manifests, "INLINE_SHARDS", 3)
    monkeypatch.setattr(manifests, "SHARDS_PER_PART", 2)
    small_set(tmp_path / "parts", SIZES, GROUP, SHARD, views, LOST)
    return tmp_path / "parts"


def test_a_manifest_in_parts_says_what_one_file_says(
    folder: str, in_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (manifests.read_manifest(uri) for uri in (folder, str(in_parts)))
    assert len(sorted((in_parts / "manifest").iterdir())) > 3
    assert list(parts.shards) == list(whole.shards)
    assert len(parts.shards) == len(whole.shards)
    assert (parts.rows, parts.studies, parts.content_hash) == (whole.rows, whole.studies, whole.content_hash)
    for listed in (True, False):
        assert read(opened(str(in_parts), listed, monkeypatch).studies["train"], 1) == read(
            opened(folder, listed, monkeypatch).studies["train"], 1
        )


def test_every_byte_of_a_part_counts(in_parts: Path) -> None:
    path = in_parts / "manifest" / "00001.jsonl"
    whole = path.read_bytes()
    for place in range(0, len(whole), 499):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"00001\.jsonl is not what was written"):
            grouped_splits(PreparedSource(str(in_parts)))
    path.write_bytes((in_parts / "manifest" / "00002.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"00001\.jsonl is not what was written"):
        list(manifests.read_manifest(str(in_parts)).shards)
    path.unlink()
    with pytest.raises(UserError, match=r"00001\.jsonl does not exist"):
        list(manifests.read_manifest(str(in_parts)).shards)
