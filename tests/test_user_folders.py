"""Machines as people have them: no entry for the user, a home that cannot be written, long temporary folders, killed builds."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cmcgns import user_folders
from cmcgns.cluster import machine_checks
from cmcgns.cluster.check_results import Requirements
from cmcgns.cluster.session import local_variables
from cmcgns.config import Config, TrainConfig
from cmcgns.errors import UserError
from cmcgns.train.setup import setup_pretraining
from cmcgns.user_folders import EXAMPLE_SOCKET, LONGEST_TEMP, OP, private_folder, ray_temp_folder, torch_extensions
from tests.small import small_config

REQUIRED = Requirements(use_gpu=False, deepspeed=True, faiss_gpu=False)
OTHER_USER = ("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups")
READS_ALL = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
"""The other user may read this Python, wherever it is, and write nothing of it."""
needs_another_user = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can become another user, by setpriv"
)


@needs_another_user
def test_a_user_whom_the_system_does_not_know_gets_a_home_and_a_cache_of_their_own(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    code = (
        "import os; from cmcgns.user_folders import *; os.environ.update(user_variables()); "
        "print(os.environ['HOME'], os.environ['USER'], torch_extensions())"
    )
    command = [*OTHER_USER, *READS_ALL, "env", "-i", f"TMPDIR={tmp_path}", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    home = tmp_path / "cmcgns-12345" / "home"
    assert done.stdout.split() == [str(home), "12345", str(home / ".cache" / "cmcgns" / "torch_extensions")], (
        done.stderr
    )
    assert home.stat().st_uid == 12345
    assert stat.S_IMODE(home.parent.stat().st_mode) == 0o700


def test_a_folder_that_another_user_may_write_is_not_taken_for_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    planted = tmp_path / f"cmcgns-{os.getuid()}"
    planted.mkdir(mode=0o700)
    planted.chmod(0o777)
    with pytest.raises(UserError, match="is not a folder of this user alone; delete it"):
        private_folder("home")
    planted.rmdir()
    planted.symlink_to(tmp_path)
    with pytest.raises(UserError, match="is not a folder of this user alone"):
        private_folder("home")


def test_sockets_fit_into_the_longest_temporary_folder_that_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    fits = "/" + "x" * (LONGEST_TEMP - 1)
    assert len(fits + EXAMPLE_SOCKET) in (103, 107)  # sun_path of macOS and of Linux, less its end
    monkeypatch.setenv("TMPDIR", fits)
    assert ray_temp_folder() == Path(fits)
    monkeypatch.setenv("TMPDIR", f"{fits}x")
    assert ray_temp_folder() == Path("/tmp")


def test_a_temporary_folder_that_fits_gives_no_warning_however_it_is_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/")  # as on macOS
    assert local_variables() == {"RAY_TMPDIR": "/tmp"}
    assert not caplog.records


def test_a_folder_for_ray_that_was_asked_for_and_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/scratch/" + "x" * 60)
    with pytest.raises(
        UserError, match=rf"RAY_TMPDIR .* has 69 bytes; .* it may have {LONGEST_TEMP}. Set a shorter one"
    ):
        ray_temp_folder()
    (line,) = machine_checks.disk_checks("here")
    assert (line.level, "RAY_TMPDIR" in line.detail) == ("failed", True)


def left_lock(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """The lock of a build that was killed."""
    patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    lock = folder / OP / "lock"
    lock.parent.mkdir()
    lock.touch()
    return lock


def test_the_lock_of_a_killed_build_is_named_before_ray_starts_and_by_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = left_lock(tmp_path, monkeypatch)
    config = small_config()
    deepspeed = TrainConfig.model_validate(config.train.model_dump() | {"engine": "deepspeed", "zero_stage": 1})
    with pytest.raises(UserError, match=f"{lock} is left over from a build .*; delete it"):
        setup_pretraining(Config.model_validate(config.model_dump() | {"train": deepspeed.model_dump()}))
    (line,) = machine_checks.deepspeed_checks("here", REQUIRED)
    assert (line.level, str(lock) in line.detail) == ("failed", True)


def test_the_lock_of_a_build_that_runs_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with left_lock(tmp_path, monkeypatch).open():
        user_folders.check_extension_lock()


def test_ops_are_compiled_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert torch_extensions() == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    if os.access(sys.prefix, os.W_OK):
        assert torch_extensions() == Path(sys.prefix) / "torch_extensions"
