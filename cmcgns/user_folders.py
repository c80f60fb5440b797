"""Folders of the user who runs a job: home, Ray's temporary files, compiled ops. The user may own neither Python nor a home."""

import getpass
import os
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import platformdirs
import psutil

from cmcgns.errors import UserError

EXAMPLE_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""What Ray adds to its temporary folder for a socket, with a process number of seven digits."""
LONGEST_TEMP = (104 if sys.platform == "darwin" else 108) - 1 - len(EXAMPLE_SOCKET)
"""Bytes of the longest temporary folder: the path of a socket is limited."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
OP = "deepspeed_shm_comm"
"""DeepSpeed's communication op on CPUs."""


def user_variables() -> dict[str, str]:
    """HOME and USER for a user without an entry in the system's list (`docker run --user`), where they are not set."""
    variables = {}
    try:
        getpass.getuser()
    except (KeyError, OSError):
        variables["USER"] = str(os.getuid())
    try:
        Path.home()
    except RuntimeError:
        variables["HOME"] = str(private_folder("home"))
    return variables


def private_folder(name: str) -> Path:
    """A folder of this user alone among the temporary files, which later runs find again.

    Raises:
        UserError: another user has made a folder of this name.
    """
    root = Path(tempfile.gettempdir()) / f"cmcgns-{os.getuid()}"
    with suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(f"{root} is not a folder of this user alone; delete it, or set TMPDIR to a folder of your own")
    (root / name).mkdir(exist_ok=True)
    return root / name


def ray_temp_folder() -> Path:
    """Where a Ray that is started here keeps logs, sockets and spilled objects.

    RAY_TMPDIR, or TMPDIR if sockets fit into it, as that of a Slurm job may not; otherwise a short folder.

    Raises:
        UserError: RAY_TMPDIR is too long.
    """
    given = os.environ.get("RAY_TMPDIR")
    if given is not None:
        if len(os.fsencode(given)) > LONGEST_TEMP:
            raise UserError(
                f"RAY_TMPDIR {given} has {len(os.fsencode(given))} bytes; for the paths of Ray's sockets it may have "
                f"{LONGEST_TEMP}. Set a shorter one"
            )
        return Path(given)
    usual = os.environ.get("TMPDIR") or SHORT_FOLDERS[0]
    if len(os.fsencode(usual)) <= LONGEST_TEMP:
        return Path(usual)
    short = next((folder for folder in SHORT_FOLDERS if os.access(folder, os.W_OK | os.X_OK)), None)
    if short is None:
        raise UserError(
            f"TMPDIR {usual} has {len(os.fsencode(usual))} bytes; for the paths of Ray's sockets it may have {LONGEST_TEMP}. "
            "Set RAY_TMPDIR to a shorter folder"
        )
    return Path(short)


def torch_extensions() -> Path:
    """Where DeepSpeed's ops are compiled: TORCH_EXTENSIONS_DIR, this Python's folder if it is writable, or the user's cache."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    shared = Path(sys.prefix) / "torch_extensions"
    if os.access(shared if shared.exists() else sys.prefix, os.W_OK):
        return shared
    cache = platformdirs.user_cache_path("cmcgns") if os.access(Path.home(), os.W_OK) else private_folder("cache")
    return cache / "torch_extensions"


def check_extension_lock() -> None:
    """Raise ``UserError`` if a build that was killed has left its lock: every run would wait for it without a word."""
    lock = torch_extensions() / OP / "lock"
    if lock.exists() and not _is_open(lock):
        raise UserError(
            f"{lock} is left over from a build of DeepSpeed's op that was killed, and every run would wait for it; delete it"
        )


def _is_open(path: Path) -> bool:
    """Whether a process of this user has the file open, as the process that builds has its lock."""
    for process in psutil.process_iter(["open_files"]):
        if any(file.path == str(path) for file in process.info["open_files"] or ()):
            return True
    return False
