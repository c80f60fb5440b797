"""Attacks by other users of the machine, and by files that lie where a run is started."""

import fcntl
import os
import stat
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from cmcgns import storage
from cmcgns.cluster import session
from cmcgns.errors import UserError
from tests.jobs import REPOSITORY, TINY, Running, rows

BESIDE_THE_DATA = (
    "select",
    "socketserver",
    "random",
    "secrets",
    "threading",
    "numpy",
    "yaml",
    "torch",
    "ray",
    "errors",
)
"""Names of modules that any Python program may import."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own, without settings for Ray's token."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder that others may write to."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


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


@pytest.mark.ray
def test_a_local_run_runs_no_code_beside_the_data_and_listens_on_loopback_alone(home: Path) -> None:
    place, marks = home / "corpus", home / "marks"
    place.mkdir()
    marks.mkdir()
    for name in BESIDE_THE_DATA:
        (place / f"{name}.py").write_text(f"open({str(marks / name)!r}, 'w').close()\nraise SystemExit('attacked')\n")
    job = InFolder(
        place, str(TINY), f"--run.storage={home}", "--run.name=run", "--train.stage1_steps=3", "--train.stage2_steps=0",
        "--train.warmup_steps=1", "--train.log_every=1", "--data.phantom_studies=130", "--clustering.actors=1",
        "--train.num_workers=1", "--train.threads_per_worker=1", "--train.engine=torch", "--train.zero_stage=0",
    )  # fmt: skip
    job.wait_for(lambda: bool(rows(home / "run")))
    names = {
        process.pid: process.name()
        for process in [psutil.Process(job.process.pid), *job.processes("")]
        if process.is_running()
    }
    listening = [
        (found.laddr.ip, names[found.pid])
        for found in psutil.net_connections("inet")
        if found.status == psutil.CONN_LISTEN and found.pid in names
    ]
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert not list(marks.iterdir())
    assert mode(home / ".ray" / "auth_token") == 0o600
    assert len(listening) > 10
    open_to_others = [each for each in listening if each[0].removeprefix("::ffff:") not in ("127.0.0.1", "::1")]
    # torch's store takes no address to listen on: docs/security.md
    assert {name for _, name in open_to_others} <= {"ray::RayTrainWorker", "ray::RayTrainWo"}, open_to_others
    assert len(open_to_others) <= 1


class InFolder(Running):
    """A pretraining started from another folder."""

    def __init__(self, folder: Path, config: str, *arguments: str) -> None:
        command = [
            "env",
            "-C",
            str(folder),
            sys.executable,
            str(REPOSITORY / "jobs" / "pretrain.py"),
            "--config",
            config,
        ]
        super().__init__(folder.parent / "said", [*command, *arguments])
