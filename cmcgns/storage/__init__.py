"""Files in local folders and on ``s3://``, named by URI."""

import fcntl
import logging
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from pyarrow import fs as arrow_fs

from cmcgns.errors import UserError
from cmcgns.storage import s3
from cmcgns.storage.errors import (
    BrokenFileError,
    ForbiddenFileError,
    FullDiskError,
    MissingFileError,
    explained,
    is_full_disk,
    is_transient,
    retries,
    with_retries,
)
from cmcgns.storage.renewed import Renewed

__all__ = [
    "BrokenFileError",
    "ForbiddenFileError",
    "FullDiskError",
    "MissingFileError",
    "explained",
    "is_full_disk",
    "retries",
]
ARROW_ATTEMPTS = 4
"""Attempts per request that Arrow makes itself when others use its file system."""
LASTING_ATTEMPTS = 10
"""The same for those who write, who cannot repeat it: 1 to 2 minutes where nobody listens, 4 where nobody answers."""
SCRATCH, LOCK = "cmcgns-scratch-", "lock"
LOCK_GRACE_S = 60
"""A folder younger than this may not be locked yet."""
COPY_BYTES = 8 * 2**20
LOCAL_FILES = arrow_fs.LocalFileSystem()
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def absolute(key: str, uri: str) -> str:
    """``uri``, the value of the setting ``key``, valid in processes that start in other folders than the driver."""
    try:
        path = filesystem(uri)[1]
    except UserError as error:
        raise UserError(f"{key} {error}") from None
    return uri if is_s3(uri) else path


def join(uri: str, path: str) -> str:
    """The URI of ``path`` inside the folder ``uri``."""
    return f"{uri.rstrip('/')}/{path}" if path else uri


def filesystem(uri: str, attempts: int = ARROW_ATTEMPTS) -> tuple[arrow_fs.FileSystem, str]:
    """The Arrow file system of ``uri`` (cached per process and bucket) and the path in it."""
    if is_s3(uri):
        bucket, key = s3.split(uri)
        return s3.arrow_filesystem(bucket, attempts), f"{bucket}/{key}".rstrip("/")
    if "://" in uri and not uri.startswith("file://"):
        raise UserError(f"{uri}: unknown scheme; give a local folder or s3://BUCKET/FOLDER")
    # absolute here: Ray workers start in another folder
    return LOCAL_FILES, str(Path(uri.removeprefix("file://")).expanduser().absolute())


def lasting_filesystem(uri: str) -> tuple[arrow_fs.FileSystem, str]:
    """``filesystem`` for those who keep it and write: expired credentials are renewed, and storage may be away for a minute."""
    files, path = filesystem(uri, LASTING_ATTEMPTS)
    if is_s3(uri):  # made anew in each process: Arrow's own forgets the number of attempts when it is pickled
        files = arrow_fs.PyFileSystem(Renewed(partial(s3.arrow_filesystem, s3.split(uri)[0], LASTING_ATTEMPTS)))
    return files, path


def read(uri: str, reader: Callable[[Any], Result]) -> Result:
    """The result of ``reader`` on the open file at ``uri``; on S3 the whole read is retried after transient errors."""
    files, path = filesystem(uri, attempts=1)

    def attempt() -> Result:
        if not is_s3(uri):
            _refuse_special(uri, path)
        with files.open_input_file(path) as file:
            return reader(file)

    return _request(uri, attempt)


def _refuse_special(uri: str, path: str) -> None:
    """Raise for a file that may never end, such as a named pipe."""
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise BrokenFileError(f"{uri} is not a regular file")


def _request(uri: str, request: Callable[[], Result]) -> Result:
    """The result of Arrow's ``request``, on S3 retried after transient errors; otherwise an error with the reason."""
    if not is_s3(uri):
        with explained(uri):
            return request()
    try:
        return with_retries(uri, request)
    except BrokenFileError:
        raise
    except UserError as error:
        if error.__cause__ is None or not is_transient(error.__cause__):
            s3.raise_if_unreachable(uri)
        raise


def read_bytes(uri: str) -> bytes:
    """The content of the file at ``uri``."""
    return read(uri, lambda file: bytes(file.read()))


def write_bytes(uri: str, data: bytes, if_absent: bool = False) -> bool:
    """Write the file at ``uri``; it appears complete or not at all.

    ``if_absent``: if the file exists, keep it and return False.
    """
    if is_s3(uri):
        return s3.put(uri, data, if_absent)
    with scratch_file(uri) as local:
        with explained(uri):
            local.write_bytes(data)
        return put_file(local, uri, if_absent)


def put_file(local: Path, uri: str, if_absent: bool = False) -> bool:
    """Move the finished file ``local`` to ``uri``, where it appears complete.

    ``if_absent``: if the file exists, keep it and return False.
    """
    if is_s3(uri):
        return s3.upload(local, uri, if_absent)
    path = filesystem(uri)[1]
    with explained(uri):
        if if_absent:
            try:
                os.link(local, path)  # unlike a rename, fails if the file exists
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                if os.path.exists(path):
                    return False
                os.replace(local, path)
        else:
            os.replace(local, path)
    return True


@contextmanager
def scratch_file(uri: str) -> Iterator[Path]:
    """A local path for writing the content of ``uri``; for a local ``uri`` it is hidden and in the same folder."""
    if is_s3(uri):
        with scratch_folder() as folder:
            yield folder / uri.rpartition("/")[2]
        return
    path = Path(filesystem(uri)[1])
    with explained(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty temporary folder, deleted at the end; those left by killed processes are deleted first.

    It lies in one with a lock: other containers may share the folder for temporary files, so a process id would not do.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError):  # another process was faster
            if time.time() - old.lstat().st_mtime > LOCK_GRACE_S and _abandoned(old):
                shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as name, (Path(name) / LOCK).open("w") as lock:
        with suppress(OSError):  # a file system without locks: then _abandoned fails too, and the folder stays
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends
        folder = Path(name) / "files"
        folder.mkdir()
        yield folder


def _abandoned(folder: Path) -> bool:
    """Whether ``folder`` is ours and no process holds its lock; ``OSError`` if it cannot be checked.

    Other users may make folders and links of these names, so nothing is followed or truncated.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return False
    with os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def is_leftover(name: str) -> bool:
    """Whether ``name`` is that of a partial file of a killed writer in a local folder."""
    return name.startswith(".") and ".partial-" in name


def clear_leftovers(uri: str) -> int:
    """Delete partial files of killed writers in the folder ``uri``; returns their number."""
    if is_s3(uri):
        return s3.abort_uploads(uri)
    leftovers = [path for path in Path(filesystem(uri)[1]).glob("*") if is_leftover(path.name)]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


@contextmanager
def writing(uri: str) -> Iterator[IO[bytes]]:
    """An open file that appears at ``uri`` once it is complete, and not at all after an error."""
    with scratch_file(uri) as local:
        with explained(uri), local.open("wb") as file:
            yield file
        put_file(local, uri)


def delete_folder(uri: str) -> None:
    """Delete the folder at ``uri`` and its content if it exists."""
    files, path = filesystem(uri, attempts=1)
    with_retries(uri, lambda: files.delete_dir_contents(path, missing_dir_ok=True))
    if not is_s3(uri):
        with suppress(MissingFileError), explained(uri):
            Path(path).rmdir()


def upload_folder(local: Path, uri: str) -> None:
    """Copy every file under ``local`` to the same path under ``uri``, in pieces."""
    for path in sorted(each for each in local.rglob("*") if each.is_file()):
        target = join(uri, path.relative_to(local).as_posix())
        if is_s3(uri):
            s3.upload(path, target)
            continue
        with path.open("rb") as source, writing(target) as copy:
            shutil.copyfileobj(source, copy, COPY_BYTES)


def copy_folder(uri: str, target: str) -> None:
    """Copy the files in the folder ``uri`` to the folder ``target`` beside it; on a local disk without taking more space.

    The files must never be written again."""
    for name in list_files(uri):
        if is_s3(uri):
            s3.copy(join(uri, name), join(target, name))
            continue
        source, path = Path(filesystem(uri)[1]) / name, Path(filesystem(target)[1]) / name
        with explained(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            try:
                os.link(source, path)
            except OSError:  # a file system without links
                shutil.copyfile(source, path)


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """The path of a local file, or of a temporary copy of one on S3."""
    if not is_s3(uri):
        yield Path(filesystem(uri)[1])
        return
    with scratch_folder() as folder:
        path = folder / uri.rpartition("/")[2]

        def copy(source: Any) -> None:
            with explained(str(path)), path.open("wb") as target:
                shutil.copyfileobj(source, target, COPY_BYTES)

        read(uri, copy)
        yield path


def download_folder(uri: str, local: Path) -> None:
    """Copy every file under ``uri`` to the same path under ``local``."""
    for name in list_files(uri):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(read_bytes(join(uri, name)))


def exists(uri: str) -> bool:
    """Whether there is a file or folder at ``uri``."""
    return _type(uri) != arrow_fs.FileType.NotFound


def is_folder(uri: str) -> bool:
    """Whether there is a folder (on S3: anything under the prefix) at ``uri``."""
    return _type(uri) == arrow_fs.FileType.Directory


def _type(uri: str) -> arrow_fs.FileType:
    files, path = filesystem(uri, attempts=1)
    return _request(uri, lambda: files.get_file_info(path).type)


def file_size(uri: str) -> int:
    """Bytes of the file at ``uri``."""
    files, path = filesystem(uri, attempts=1)
    return int(_request(uri, lambda: files.get_file_info(path).size))


def delete_file(uri: str) -> None:
    """Delete the file at ``uri`` if it exists."""
    if is_s3(uri):
        s3.delete(uri)
        return
    with explained(uri):
        Path(filesystem(uri)[1]).unlink(missing_ok=True)


def list_files(uri: str, recursive: bool = True) -> list[str]:
    """Paths of the files under the folder ``uri``, relative to it and sorted."""
    return [path for path, folder in _entries(uri, recursive) if not folder]


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly in the folder ``uri``, sorted."""
    return [path for path, folder in _entries(uri, recursive=False) if folder]


def _entries(uri: str, recursive: bool) -> list[tuple[str, bool]]:
    path = filesystem(uri)[1]
    with explained(uri):
        if is_s3(uri):
            return sorted(s3.entries(uri, recursive))
        if recursive:
            with os.scandir(path):  # raises for a folder that is missing
                return [(name, False) for name in _named_in_utf8(path, _walk(path))]
        with os.scandir(path) as entries:
            found = {entry.name: os.path.isdir(entry.path) for entry in entries}  # False for a circular link
    return sorted((name, found[name]) for name in _named_in_utf8(path, list(found)))


def _named_in_utf8(folder: str, names: list[str]) -> list[str]:
    """``names`` without those that are not UTF-8, which neither Arrow nor JSON can hold; warns about these."""
    odd = [name for name in names if not name.isascii() and any("\ud800" <= each <= "\udfff" for each in name)]
    if odd:
        logger.warning(
            "%s: %d files are left out because their names are not UTF-8, such as %s; rename them (convmv)",
            folder, len(odd), ascii(odd[0]),
        )  # fmt: skip
    return [name for name in names if name not in odd]


def _walk(root: str) -> list[str]:
    """Files under ``root``, relative to it and sorted; symbolic links to a folder already seen are not followed."""
    paths, seen = [], set()
    for folder, folders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        paths += [os.path.relpath(os.path.join(folder, name), root) for name in names]
    return sorted(paths)


def _refuse_folder(error: OSError) -> None:
    """Raise for a folder that cannot be listed, except lost+found and hidden ones."""
    if Path(error.filename).name.startswith(("lost+found", ".")):
        return
    with explained(str(error.filename)):
        raise error
