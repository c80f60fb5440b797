"""One small door to local folders and ``s3://``; everything travels as a URI and is opened where it is used."""

import fcntl
import functools
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as arrow_fs

from cmcgns.errors import UserError
from cmcgns.storage import s3
from cmcgns.storage.errors import (
    BrokenFileError,
    ForbiddenFileError,
    MissingFileError,
    explained,
    passes,
    patiently,
    retries,
)

__all__ = ["BrokenFileError", "ForbiddenFileError", "MissingFileError", "explained", "retries"]
ARROW_ATTEMPTS = 4
"""Times that Arrow tries a request by itself where we hand its file system on."""
SCRATCH, LOCK = "cmcgns-write-", "lock"
JUST_MADE_S = 60
"""So long after it was made a folder may not be locked yet."""
Result = TypeVar("Result")


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def absolute(key: str, uri: str) -> str:
    """``uri``, which the setting ``key`` names, as processes that start in other folders than the driver understand it."""
    try:
        path = filesystem(uri)[1]
    except UserError as error:
        raise UserError(f"{key} {error}") from None
    return uri if is_s3(uri) else path


def join(uri: str, path: str) -> str:
    """The URI of ``path`` inside the folder ``uri``."""
    return f"{uri.rstrip('/')}/{path}" if path else uri


def filesystem(uri: str, attempts: int = ARROW_ATTEMPTS) -> tuple[arrow_fs.FileSystem, str]:
    """The Arrow file system of ``uri``, one for each process and bucket, and the path in it."""
    if is_s3(uri):
        bucket, key = s3.split(uri)
        return s3.arrow_filesystem(bucket, attempts), f"{bucket}/{key}".rstrip("/")
    if "://" in uri and not uri.startswith("file://"):
        raise UserError(f"{uri}: only local folders and s3:// are understood")
    # absolute here: Ray workers start in another folder
    return _local(), str(Path(uri.removeprefix("file://")).expanduser().absolute())


@functools.cache
def _local() -> arrow_fs.LocalFileSystem:
    return arrow_fs.LocalFileSystem()


def read(uri: str, reader: Callable[[Any], Result]) -> Result:
    """What ``reader`` makes of the open file at ``uri``; from S3 tried again, whole, while its faults pass."""
    files, path = filesystem(uri, attempts=1)

    def attempt() -> Result:
        with files.open_input_file(path) as file:
            return reader(file)

    return _with_reason(uri, attempt)


def _with_reason(uri: str, request: Callable[[], Result]) -> Result:
    """What Arrow's ``request`` returns, tried again while its faults pass; else an error that says why."""
    if not is_s3(uri):
        with explained(uri):
            return request()
    try:
        return patiently(uri, request)
    except BrokenFileError:
        raise
    except UserError as error:
        # Arrow begins with a HEAD, whose answer says no more than a number
        reason = None if error.__cause__ is not None and passes(error.__cause__) else s3.reason(uri)
        if reason is None:
            raise
        with explained(uri):
            raise OSError(reason) from None


def read_bytes(uri: str) -> bytes:
    """The content of the file at ``uri``."""
    return read(uri, lambda file: bytes(file.read()))


def read_parquet(uri: str, reader: Callable[[pq.ParquetFile], Result], footer: pq.FileMetaData | None = None) -> Result:
    """What ``reader`` makes of the Parquet file at ``uri``; ``BrokenFileError`` where it is none.

    ``footer``: the file's, where it has been read before.
    """

    def parse(file: Any) -> Result:
        try:
            return reader(pq.ParquetFile(file, metadata=footer, pre_buffer=True))
        except (pa.ArrowException, OSError, EOFError) as error:
            # the file's own faults come without a number of the operating system
            if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None or "AWS Error" in str(error):
                raise
            kind = type(error).__name__
            raise BrokenFileError(f"{uri} is no Parquet file, or truncated ({kind}); write it again") from None

    return read(uri, parse)


def write_bytes(uri: str, data: bytes, if_absent: bool = False) -> bool:
    """Write the file at ``uri`` whole; it appears complete or not at all.

    ``if_absent``: False, and nothing is written, where a file lies there already.
    """
    if is_s3(uri):
        return s3.put(uri, data, if_absent)
    with scratch_file(uri) as local:
        with explained(uri):
            local.write_bytes(data)
        return put_file(local, uri, if_absent)


def put_file(local: Path, uri: str, if_absent: bool = False) -> bool:
    """Move the finished file ``local`` to ``uri``, where it appears complete.

    ``if_absent``: False, and what lies there stays, where something does.
    """
    if is_s3(uri):
        return s3.upload(local, uri, if_absent)
    path = filesystem(uri)[1]
    with explained(uri):
        if if_absent:
            try:
                os.link(local, path)  # unlike a rename it fails where a file is
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
    """A local file to write what is to lie at ``uri``: beside it where that is a local folder, and hidden."""
    if is_s3(uri):
        with _scratch_folder() as folder:
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
def _scratch_folder() -> Iterator[Path]:
    """A folder for what is on its way to object storage; what killed processes have left of theirs is deleted first."""
    for old in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError):  # another process was faster, or it is another user's
            if time.time() - old.stat().st_mtime > JUST_MADE_S and _abandoned(old):
                shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as name, (Path(name) / LOCK).open("w") as lock:
        with suppress(OSError):  # a file system without locks: then nobody takes it for abandoned either
            fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process
        yield Path(name)


def _abandoned(folder: Path) -> bool:
    """Whether nobody holds the lock of ``folder``; ``OSError`` where that cannot be told."""
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def is_leftover(name: str) -> bool:
    """Whether a file of that name is what a killed writer has left in a local folder."""
    return name.startswith(".") and ".partial-" in name


def clear_leftovers(uri: str) -> int:
    """Delete what killed writers have left under the folder ``uri``; how many there were."""
    if is_s3(uri):
        return s3.abort_uploads(uri)
    found = [path for path in Path(filesystem(uri)[1]).glob("*") if is_leftover(path.name)]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


@contextmanager
def writing(uri: str) -> Iterator[IO[bytes]]:
    """A file to write to, which appears at ``uri`` once it is complete; after an error nothing does."""
    with scratch_file(uri) as local:
        with explained(uri), local.open("wb") as file:
            yield file
        put_file(local, uri)


def delete_folder(uri: str) -> None:
    """Delete the folder at ``uri`` with all that is in it, where there is one."""
    files, path = filesystem(uri, attempts=1)
    patiently(uri, lambda: files.delete_dir_contents(path, missing_dir_ok=True))


def upload_folder(local: Path, uri: str) -> None:
    """Copy every file under ``local`` to the same place under ``uri``."""
    for path in sorted(local.rglob("*")):
        if path.is_file():
            write_bytes(join(uri, path.relative_to(local).as_posix()), path.read_bytes())


def download_folder(uri: str, local: Path) -> None:
    """Copy every file under ``uri`` to the same place under ``local``."""
    for name in list_files(uri):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(read_bytes(join(uri, name)))


def exists(uri: str) -> bool:
    """Whether a file or folder lies at ``uri``."""
    return _type(uri) != arrow_fs.FileType.NotFound


def is_folder(uri: str) -> bool:
    """Whether a folder (on S3: anything under the prefix) lies at ``uri``."""
    return _type(uri) == arrow_fs.FileType.Directory


def _type(uri: str) -> arrow_fs.FileType:
    files, path = filesystem(uri, attempts=1)
    return _with_reason(uri, lambda: files.get_file_info(path).type)


def file_size(uri: str) -> int:
    """Bytes of the file at ``uri``."""
    files, path = filesystem(uri, attempts=1)
    return int(_with_reason(uri, lambda: files.get_file_info(path).size))


def delete_file(uri: str) -> None:
    """Delete the file at ``uri``, where there is one."""
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
    files, path = filesystem(uri)
    with explained(uri):
        if is_s3(uri):
            return sorted(s3.entries(uri, recursive))
        found = files.get_file_info(arrow_fs.FileSelector(path))
        if recursive:
            return [(name, False) for name in _walk(path)]
    prefix = len(path.rstrip("/")) + 1
    return sorted((entry.path[prefix:], entry.type == arrow_fs.FileType.Directory) for entry in found)


def _walk(root: str) -> list[str]:
    """Files under ``root``, relative to it and sorted; a folder that a link leads back to is entered once."""
    found, seen = [], set()
    for folder, folders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders.sort()
        found += [os.path.relpath(os.path.join(folder, name), root) for name in names]
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    """What cannot be listed is not left out in silence, save the system's own and hidden folders."""
    if Path(error.filename).name.startswith(("lost+found", ".")):
        return
    with explained(str(error.filename)):
        raise error
