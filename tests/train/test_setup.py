"""Contents of a run folder."""

import logging
from pathlib import Path

import pytest

from cmcgns import storage
from cmcgns.bad_rows import read_bad_rows, write_bad_rows
from cmcgns.config import Config
from cmcgns.data.readers.base import FileSource
from cmcgns.errors import BadRow
from cmcgns.run_folder import RunFolder
from cmcgns.train.resume import end_last_attempt
from cmcgns.train.setup import with_absolute_paths
from tests.small import small_config


def test_bad_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert read_bad_rows(str(tmp_path)) == {}
    rows = {"b.png": "film file is missing", "a.png": "row has no report"}
    write_bad_rows(str(tmp_path), rows)
    assert read_bad_rows(str(tmp_path)) == rows


def test_local_folders_become_absolute_and_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    config = small_config(data__uri="films", model__image_encoder="encoder", model__text_encoder="bert-tiny")
    found = with_absolute_paths(config)
    assert found.data.uri == f"{tmp_path}/films"
    assert (found.model.image_encoder, found.model.text_encoder) == (f"{tmp_path}/encoder", "bert-tiny")
    for uri in ("phantom", "phantom:200", "s3://bucket/films"):
        assert with_absolute_paths(small_config(data__uri=uri)).data.uri == uri
    assert Config.model_validate(found.model_dump()) == found


def test_a_film_that_may_not_be_read_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(uri: str) -> bytes:
        with storage.explained(uri):
            raise OSError("When reading information for key: AWS Error ACCESS_DENIED during HeadObject operation")

    monkeypatch.setattr(storage, "read_bytes", refuse)
    with pytest.raises(BadRow, match="access to the film file is denied"):
        FileSource(str(tmp_path), "pairs-csv").read_image("one.png")


def test_a_resumed_run_says_that_its_last_attempt_was_killed_if_that_has_left_no_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, result = RunFolder(str(tmp_path.parent), tmp_path.name, resumed=True), tmp_path / "result.json"
    (tmp_path / "metrics.jsonl").write_text('{"step": 11, "split": "train"}\n{"step": 12, "spl')
    result.write_text('{"status": "stopped"}')
    with caplog.at_level(logging.WARNING, logger="cmcgns"):
        end_last_attempt(folder, "checkpoint_00000008_of_2_abcdef")
        assert not caplog.text
        assert not result.exists(), "the next one that is killed has stopped nowhere"
        end_last_attempt(folder, "checkpoint_00000008_of_2_abcdef")
        end_last_attempt(folder, None)
    name = f"run {tmp_path.name} was killed after step 11, without a result: it "
    assert [each.getMessage() for each in caplog.records] == [
        f"{name}goes on from checkpoint_00000008_of_2_abcdef",
        f"{name}begins again",
    ]
