"""Damage and attack: a file of a prepared set has changed, or its reports were exchanged for others."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cmcgns.data.manifest import read_manifest
from cmcgns.data.readers.grouped import grouped_splits
from cmcgns.data.readers.prepared import PreparedSource, _column_hashes, _footer, _manifest
from cmcgns.data.studies import ListedStudies
from cmcgns.errors import BadRow, UserError
from cmcgns.run_folder import RunFolder
from cmcgns.train.setup import Corpus, check_corpus, write_corpus
from tests.security.sets import plain_rows, write_prepared_set
from tests.security.test_parquet_code import replaced
from tests.small import small_config


def read_all(folder: Path) -> list[tuple[bytes, list[str], str]]:
    """Every film, its sentences and its report, as pretraining reads them."""
    for cached in (_manifest, _footer, _column_hashes):
        cached.cache_clear()  # as in a new process
    source = PreparedSource(str(folder))
    studies = source.index().table.to_pylist()
    paths = [study["films"][0]["path"] for study in studies]
    reader = source.reader(paths)
    return [
        (
            reader.read_image(path).grey_HW.tobytes(),
            reader.read_sentences(study, path).sentences,
            source.read_report(study),
        )
        for study, path in zip(studies, paths, strict=True)
    ]


def test_an_intact_set_is_read(tmp_path: Path) -> None:
    write_prepared_set(tmp_path / "set", plain_rows())
    assert [report for *_, report in read_all(tmp_path / "set")] == plain_rows()["report"].to_pylist()


@pytest.mark.parametrize("name", ["manifest.json", "train-00000.parquet"])
def test_every_byte_of_a_set_counts(tmp_path: Path, name: str) -> None:
    write_prepared_set(tmp_path / "set", plain_rows())
    expected, path = read_all(tmp_path / "set"), tmp_path / "set" / name
    whole, refusals = path.read_bytes(), list[str]()
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        try:
            found = read_all(tmp_path / "set")
        except (UserError, BadRow) as error:
            refusals.append(str(error))
        else:  # a byte that nobody reads, such as the statistics of a column
            assert found == expected, f"byte {place} of {name} changed what was read"
    assert len(refusals) > 10
    assert all(name.split(".")[0] in each for each in refusals)
    path.unlink()
    with pytest.raises(UserError, match=name):
        read_all(tmp_path / "set")


@pytest.mark.parametrize("column", ["image", "sentences", "report", "patient_id", "labels"])
def test_other_content_in_a_valid_file_is_refused(tmp_path: Path, column: str) -> None:
    rows = plain_rows()
    other = rows[column].combine_chunks().take(pa.array([1, 0, 2]))
    if column == "labels":
        other = pa.array([[("clear", 0.0)]] * 3, rows.schema.field("labels").type)
    write_prepared_set(tmp_path / "set", rows, replaced(rows, column, other))
    with pytest.raises(
        (BadRow, UserError), match=rf"column {column} .*(not what was prepared|not what the manifest says)"
    ):
        read_all(tmp_path / "set")


def test_the_same_rows_cut_into_other_row_groups_are_refused(tmp_path: Path) -> None:
    write_prepared_set(tmp_path / "set", plain_rows())
    pq.write_table(plain_rows(), tmp_path / "set" / "train-00000.parquet", row_group_size=2)
    with pytest.raises(UserError, match="has 3 rows in 2 row groups, the manifest says 3 in 1; prepare the set again"):
        read_all(tmp_path / "set")


def test_a_run_whose_studies_were_listed_resumes_on_the_same_set_by_row_group_and_on_no_other(tmp_path: Path) -> None:
    folder, rows = RunFolder(str(tmp_path), "run", resumed=True), plain_rows()
    (tmp_path / "run").mkdir()
    write_prepared_set(tmp_path / "set", rows)
    write_prepared_set(tmp_path / "other", replaced(rows, "study_id", pa.array(["a", "b", "c"])))

    def corpus(name: str, grouped: bool) -> Corpus:
        source = PreparedSource(str(tmp_path / name))
        if grouped:
            train = grouped_splits(source)[0]["train"]
            return Corpus(source, train, train.first(2), False, {}, {})
        studies = ListedStudies(source, *source.arrange(source.index().table, 1))
        return Corpus(source, studies, studies.first(2), False, {}, {})

    write_corpus(folder, corpus("set", grouped=False))
    check_corpus(folder, small_config(), corpus("set", grouped=True))
    with pytest.raises(UserError, match="no longer has the studies that the run started with"):
        check_corpus(folder, small_config(), corpus("other", grouped=True))
    write_corpus(folder, corpus("set", grouped=True))
    check_corpus(folder, small_config(), corpus("set", grouped=True))
    with pytest.raises(UserError, match="no longer has the studies that the run started with"):
        check_corpus(folder, small_config(), corpus("other", grouped=True))


def test_a_run_does_not_resume_on_a_set_with_other_reports(tmp_path: Path) -> None:
    folder, rows = RunFolder(str(tmp_path), "run", resumed=True), plain_rows()
    (tmp_path / "run").mkdir()
    write_prepared_set(tmp_path / "first", rows)
    write_prepared_set(tmp_path / "second", replaced(rows, "report", pa.array(["Pneumonia."] * 3)))

    def corpus(name: str) -> Corpus:
        source = PreparedSource(str(tmp_path / name))
        studies = ListedStudies(source, *source.arrange(source.index().table, 1))
        return Corpus(source, studies, studies, False, {}, {})

    write_corpus(folder, corpus("first"))
    check_corpus(folder, small_config(), corpus("first"))
    with pytest.raises(UserError, match="has other films or reports than the run started with"):
        check_corpus(folder, small_config(), corpus("second"))
    recorded = json.loads((tmp_path / "run" / "corpus.json").read_text())["content_hash"]
    assert recorded == read_manifest(str(tmp_path / "first")).content_hash
