"""Attacks by other users of the machine. Those on a running job: ``tests/train/test_survival.py``."""

import fcntl
import os
import tempfile
import time
from pathlib import Path

import pytest

from cmcgns import storage
from cmcgns.cluster import session
from cmcgns.errors import UserError
from tests.attacks import mode


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder that others may write to."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_token_is_private_before_ray_starts(home: Path) -> None:
    os.umask(before := os.umask(0))
    session.protect_token()
    path = home / ".ray" / "auth_token"
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    assert len(path.read_text()) == 64
    token, _ = path.read_text(), os.umask(before)
    path.chmod(0o644)
    session.protect_token()
    assert (mode(path), path.read_text()) == (0o600, token)


def test_a_token_file_of_someone_else_is_refused(home: Path) -> None:
    (home / ".ray").mkdir()
    (home / "victim").write_text("theirs")
    (home / ".ray" / "auth_token").symlink_to(home / "victim")
    with pytest.raises(UserError, match=r"auth_token is a link or belongs to another user"):
        session.protect_token()
    assert (home / "victim").read_text() == "theirs"


def make_old(path: Path) -> None:
    past = time.time() - 2 * storage.LOCK_GRACE_S
    os.utime(path, (past, past), follow_symlinks=False)


def test_a_planted_lock_does_not_empty_the_file_that_it_points_to(temporary: Path) -> None:
    victim, planted = temporary / "victim", temporary / f"{storage.SCRATCH}planted"
    victim.write_text("precious")
    planted.mkdir()
    (planted / storage.LOCK).symlink_to(victim)
    make_old(planted)
    with storage.scratch_file("s3://bucket/key"):
        pass
    assert victim.read_text() == "precious"


def test_a_planted_link_does_not_delete_the_folder_that_it_points_to(temporary: Path) -> None:
    victim = temporary / "victim"
    victim.mkdir()
    (victim / storage.LOCK).touch()
    (temporary / f"{storage.SCRATCH}planted").symlink_to(victim)
    make_old(victim)
    make_old(temporary / f"{storage.SCRATCH}planted")
    with storage.scratch_file("s3://bucket/key"):
        pass
    assert (victim / storage.LOCK).exists()


def test_folders_of_killed_writers_are_still_deleted_and_those_in_use_kept(temporary: Path) -> None:
    for name in ("dead", "alive"):
        (temporary / f"{storage.SCRATCH}{name}").mkdir()
        (temporary / f"{storage.SCRATCH}{name}" / storage.LOCK).touch()
    with (temporary / f"{storage.SCRATCH}alive" / storage.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in temporary.iterdir():
            make_old(path)
        with storage.scratch_file("s3://bucket/key"):
            pass
        assert [path.name for path in temporary.iterdir()] == [f"{storage.SCRATCH}alive"]
