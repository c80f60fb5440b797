"""Damage and attack: a checkpoint has lost or changed a file, or Ray Train's list names folders that are none of ours."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch

from cmcgns import distributed, storage
from cmcgns.cluster import ray_private
from cmcgns.errors import UserError
from cmcgns.run_folder import RunFolder
from cmcgns.train.checkpoint import Contents, Progress, random_state, save_checkpoint
from cmcgns.train.resume import (
    SNAPSHOT,
    checkpoint_damage,
    delete_half_written,
    find_checkpoint,
    keep_best,
    latest_checkpoint,
    list_checkpoints,
    write_snapshot,
)

OLD, NEW = "checkpoint_00000004_of_2_0a1b2c", "checkpoint_00000008_of_2_3d4e5f"
SHARDS, WHOLE = ("weights", "optimizer", "best"), ("clustering", "best_centroids")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run folder with two checkpoints of two ranks, and Ray's list of them."""
    for name, step in ((OLD, 4), (NEW, 8)):
        (tmp_path / "run" / name).mkdir(parents=True)
        for rank in (1, 0):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            shards = {part: {"values": torch.randn(25), "step": torch.tensor(step)} for part in SHARDS}
            whole = {part: {"rows": torch.randn(5, 4)} for part in WHOLE}
            contents = Contents(shards, {"values": 50}, whole)
            save_checkpoint(tmp_path / "run" / name, Progress(step=step, ranks=2), contents, random_state())
    rows = "".join(json.dumps({"step": step, "split": "train"}) + "\n" for step in range(1, 10))
    (tmp_path / "run" / "metrics.jsonl").write_text(rows)
    folder = RunFolder(str(tmp_path), "run", resumed=True)
    write_snapshot(folder, NEW)
    return folder


def files(run: RunFolder, name: str) -> list[Path]:
    """Files of a checkpoint."""
    found = sorted(Path(run.file(name)).iterdir())
    # progress, and for each rank its parts, its random state and its hashes
    assert len(found) == 2 * len(SHARDS) + len(WHOLE) + 5
    return found


def test_the_newest_whole_checkpoint_is_used(run: RunFolder) -> None:
    assert find_checkpoint(run, 4) == NEW
    assert latest_checkpoint(run) == run.file(NEW)


def test_every_bit_counts(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    for path in files(run, NEW):
        whole = path.read_bytes()
        for place in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            flipped = bytearray(whole)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            caplog.clear()
            assert find_checkpoint(run, 4) == OLD, f"{path.name}, byte {place}"
            assert NEW in caplog.text
        path.write_bytes(whole[:-1])
        assert find_checkpoint(run, 4) == OLD, f"{path.name} cut"
        path.write_bytes(whole)
    assert find_checkpoint(run, 4) == NEW


def test_every_file_counts(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for path in files(run, NEW):
        whole = path.read_bytes()
        path.unlink()
        caplog.clear()
        assert find_checkpoint(run, 4) == OLD, path.name
        assert f"{NEW} is damaged: {path.name} is missing" in caplog.text
        path.write_bytes(whole)


def test_a_run_with_metrics_never_begins_again_at_step_0(run: RunFolder) -> None:
    for name in (OLD, NEW):
        files(run, name)[0].unlink()
    with pytest.raises(
        UserError, match=rf"run.resume run: metrics.jsonl has 9 steps.*{NEW} is damaged.*{OLD} is damaged"
    ):
        find_checkpoint(run, 4)
    for name in (OLD, NEW):
        shutil.rmtree(run.file(name))
    with pytest.raises(UserError, match=r"has 9 steps, but no whole checkpoint is left\. Restore one"):
        find_checkpoint(run, 4)
    # before the first checkpoint there is nothing to lose
    assert find_checkpoint(run, 10) is None


def test_a_lost_or_damaged_list_is_written_anew(run: RunFolder) -> None:
    path = Path(run.file(SNAPSHOT))
    expected = path.read_text()
    for content in (None, "", "{", '{"checkpoint_results": 3}'):
        path.unlink()
        if content is not None:
            path.write_text(content)
        write_snapshot(run, find_checkpoint(run, 4))
        assert path.read_text() == expected


@pytest.mark.parametrize(
    "name", ["../victim", "/elsewhere/victim", "victim", "checkpoint_1", ".", "", f"{NEW}/../../victim", None]
)
@pytest.mark.parametrize("field", ["checkpoint_results", "latest_checkpoint_result", "pending_training_results"])
def test_a_list_that_names_other_folders_is_refused(run: RunFolder, field: str, name: str | None) -> None:
    path = Path(run.file(SNAPSHOT))
    snapshot = json.loads(path.read_text())
    entry = {"checkpoint_dir_name": name, "metrics": {}}
    snapshot[field] = entry if field == "latest_checkpoint_result" else [entry]
    path.write_text(json.dumps(snapshot))
    with pytest.raises(UserError, match=f"{SNAPSHOT} lists .* Ray would delete"):
        find_checkpoint(run, 4)


def test_folders_of_other_names_are_no_checkpoints(run: RunFolder) -> None:
    for name in ("checkpoint_00000012", "checkpoint_00000012_of_2_xyz", "victim"):
        shutil.copytree(run.file(NEW), run.file(name))
    assert list_checkpoints(run) == [OLD, NEW]


def test_a_copy_under_another_number_of_ranks_is_refused(run: RunFolder) -> None:
    shutil.move(run.file(NEW), run.file("checkpoint_00000008_of_1_3d4e5f"))
    assert find_checkpoint(run, 4) == OLD


def test_ray_train_resumes_from_the_checkpoint_that_it_is_given(run: RunFolder) -> None:
    from pyarrow.fs import LocalFileSystem
    from ray.train import CheckpointConfig
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
    from ray.train.v2._internal.execution.context import StorageContext

    for chosen, known in ((NEW, [OLD, NEW]), (OLD, [OLD])):
        write_snapshot(run, chosen)
        place = StorageContext(run.storage, "run", storage_filesystem=LocalFileSystem(), read_only=True)
        manager = CheckpointManager(CheckpointConfig(num_to_keep=2), place)
        assert manager.latest_checkpoint_result.checkpoint.path == run.file(chosen)
        assert [Path(each.checkpoint.path).name for each in manager._checkpoint_results] == known
    assert ray_private.checkpoint_snapshot([OLD]) == Path(run.file(SNAPSHOT)).read_text()


def test_a_half_written_checkpoint_is_deleted_and_nothing_else(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    half = Path(run.file("checkpoint_00000012_of_2_777777"))
    shutil.copytree(run.file(NEW), half)
    (half / "weights_1.safetensors").write_bytes(b"")
    whole = Path(run.file("checkpoint_00000010_of_2_888888"))
    shutil.copytree(run.file(NEW), whole)  # whole, though Ray was not told of it
    (Path(run.file(NEW)) / "weights_1.safetensors").write_bytes(b"")  # Ray lists it: someone damaged it later
    older = Path(run.file("checkpoint_00000009_of_2_999999"))  # damaged before this attempt
    shutil.copytree(half, older)
    delete_half_written(run, [OLD, NEW, older.name])
    assert sorted(list_checkpoints(run)) == [OLD, NEW, older.name, whole.name]
    assert "checkpoint_00000012_of_2_777777, whose writing had failed" in caplog.text


def test_a_half_written_checkpoint_of_a_killed_run_is_deleted_when_it_is_resumed_and_no_other(run: RunFolder) -> None:
    half = Path(run.file("checkpoint_00000012_of_2_777777"))
    shutil.copytree(run.file(NEW), half)
    (half / "progress.json").unlink()
    (Path(run.file(OLD)) / "weights_0.safetensors").write_bytes(b"")  # listed: someone damaged it later
    delete_half_written(run, (), if_listed=True)
    assert list_checkpoints(run) == [OLD, NEW]
    shutil.copytree(run.file(OLD), half)
    Path(run.file(SNAPSHOT)).unlink()  # nothing says what is half-written
    delete_half_written(run, (), if_listed=True)
    assert list_checkpoints(run) == [OLD, NEW, half.name]


def test_the_best_checkpoint_is_a_whole_copy_that_outlives_its_original(run: RunFolder) -> None:
    for name, step, others in ((OLD, 4, []), (NEW, 8, [OLD])):
        keep_best(run.uri, step)
        assert sorted(path.name for path in Path(run.uri).glob("best_*")) == [f"best_{name}"], others
    for path in files(run, NEW):
        path.unlink()
    assert checkpoint_damage(run.file(f"best_{NEW}"), NEW) is None
    assert list_checkpoints(run) == [OLD, NEW]
    Path(run.file(NEW)).rmdir()
    shutil.move(run.file(f"best_{NEW}"), run.file(NEW))  # to go on from it
    assert find_checkpoint(run, 4) == NEW


def full_disk(write: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:
        write()
    return caught.value


def test_errors_of_a_full_disk_are_told_from_others_whoever_writes() -> None:
    writers = (
        lambda: Path("/dev/full").write_text("x" * 100_000),
        lambda: pafs.LocalFileSystem().open_output_stream("/dev/full", buffer_size=None).write(b"x" * 100_000),
    )
    for write in writers:
        assert storage.is_full_disk(full_disk(write))
    assert not storage.is_full_disk(full_disk(lambda: Path("/dev/null/x").write_text("x")))
    message = r"^runs/result.json: the disk is full; free some space$"
    with pytest.raises(storage.FullDiskError, match=message), storage.explained("runs/result.json"):
        writers[0]()
