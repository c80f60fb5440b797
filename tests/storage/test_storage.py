"""Local folders: files are written completely or not at all, and unreadable files raise."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cmcgns import storage
from cmcgns.storage import parquet


def test_a_conditional_write_keeps_an_existing_file(tmp_path: Path) -> None:
    place = f"{tmp_path}/folder/once"
    assert storage.write_bytes(place, b"first", if_absent=True)
    assert not storage.write_bytes(place, b"second", if_absent=True)
    assert storage.read_bytes(place) == b"first"
    assert storage.write_bytes(place, b"third")
    assert storage.read_bytes(place) == b"third"
    assert storage.list_files(str(tmp_path)) == ["folder/once"]


HOLDER = """
import time
from cmcgns import storage
with storage.scratch_folder() as folder:
    (folder / "shard").write_bytes(b"films")
    print(folder.parent.name, flush=True)
    time.sleep(600)
"""


def test_scratch_folders_of_killed_processes_are_deleted_and_those_of_running_ones_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER], env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE
        )
        for _ in range(3)
    ]
    try:
        killed, alive, young = (holder.stdout.readline().decode().strip() for holder in holders)
        for number in (0, 2):
            holders[number].kill()
            holders[number].wait()
        for name in (killed, alive):
            os.utime(tmp_path / name, (0, 0))
        assert {folder.name for folder in tmp_path.iterdir()} == {killed, alive, young}
        with storage.scratch_folder() as folder:
            assert not list(folder.iterdir())
            assert {folder.name for folder in tmp_path.iterdir()} == {alive, young, folder.parent.name}
        assert {folder.name for folder in tmp_path.iterdir()} == {alive, young}
        assert (tmp_path / alive / "files" / "shard").read_bytes() == b"films"
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not read a folder")
def test_a_forbidden_folder_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="cmcgns-test-") as name:
        os.chmod(name, 0o755)
        closed = Path(name) / "closed"
        closed.mkdir(mode=0o700)
        (Path(name) / "lost+found").mkdir(mode=0o700)
        (Path(name) / "film.png").write_bytes(b"")
        os.seteuid(65534)
        try:
            with pytest.raises(storage.ForbiddenFileError, match="closed: permission denied"):
                storage.list_files(name)
        finally:
            os.seteuid(0)
        assert storage.list_files(name) == ["film.png"]


def test_a_too_long_name_is_a_missing_file_with_a_short_message(tmp_path: Path) -> None:
    with pytest.raises(storage.MissingFileError, match="too long for a file name") as caught:
        storage.read_bytes(f"{tmp_path}/{'the heart is enlarged ' * 20}")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), pa.ArrowMemoryError("malloc failed")])
def test_errors_of_the_machine_are_not_broken_files(tmp_path: Path, error: Exception) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "whole")

    def fail(file: pq.ParquetFile) -> None:
        raise error

    with pytest.raises(Exception) as caught:
        parquet.read(str(tmp_path / "whole"), fail)
    assert not isinstance(caught.value, storage.BrokenFileError)
