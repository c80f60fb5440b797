"""One small door to local folders and ``s3://``; everything travels as a URI and is opened where it is used."""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow import fs as arrow_fs

from cmcgns.errors import UserError

log = logging.getLogger(__name__)

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
DEFAULT_REGION = "us-east-1"
CONNECT_SECONDS = 10.0
REQUEST_SECONDS = 60.0


class MissingFileError(UserError):
    """A file or folder that is not where the URI says."""


class ForbiddenFileError(UserError):
    """A file that lies there and may not be read; S3 also answers so where a missing one may not be listed."""


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


def filesystem(uri: str) -> tuple[arrow_fs.FileSystem, str]:
    """The Arrow file system of ``uri``, one for each process and bucket, and the path in it."""
    if is_s3(uri):
        path = uri.removeprefix("s3://").strip("/")
        if not path:
            raise UserError(f"{uri} names no bucket; give s3://BUCKET/FOLDER")
        return _s3(path.split("/", 1)[0], custom_endpoint(), os.environ.get("AWS_PROFILE")), path
    if "://" in uri and not uri.startswith("file://"):
        raise UserError(f"{uri}: only local folders and s3:// are understood")
    # absolute here: Ray workers start in another folder
    return _local(), str(Path(uri.removeprefix("file://")).expanduser().absolute())


def custom_endpoint() -> str | None:
    """The S3 endpoint that the environment or the AWS profile names instead of Amazon's."""
    named = next((os.environ[name] for name in ENDPOINT_VARIABLES if os.environ.get(name)), None)
    return named or _profile_value("endpoint_url", os.environ.get("AWS_PROFILE"))


@functools.cache
def _local() -> arrow_fs.LocalFileSystem:
    return arrow_fs.LocalFileSystem()


@functools.lru_cache(maxsize=32)
def _s3(bucket: str, endpoint: str | None, profile: str | None) -> arrow_fs.S3FileSystem:
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or _profile_value("region", profile)
    common = {
        "connect_timeout": CONNECT_SECONDS,
        "request_timeout": REQUEST_SECONDS,
        "retry_strategy": arrow_fs.AwsStandardS3RetryStrategy(max_attempts=4),
    }
    if endpoint is None:
        return arrow_fs.S3FileSystem(region=region or _bucket_region(bucket), **common)
    # before the first client: else writes to servers other than Amazon's are answered 411
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    scheme, _, host = endpoint.rpartition("://")
    return arrow_fs.S3FileSystem(
        endpoint_override=host.rstrip("/"),
        scheme=scheme or "https",
        region=region or DEFAULT_REGION,
        force_virtual_addressing=False,  # path style: test servers have no name for each bucket
        **common,
    )


def _bucket_region(bucket: str) -> str:
    try:
        return str(arrow_fs.resolve_s3_region(bucket))
    except OSError:
        log.info("region of s3://%s is unknown; %s is assumed", bucket, DEFAULT_REGION)
        return DEFAULT_REGION


@functools.lru_cache(maxsize=32)
def _profile_value(name: str, profile: str | None) -> str | None:
    """A setting of the AWS profile in force; None without one."""
    import botocore.session  # slow to import, and needed by S3 alone

    session = botocore.session.Session(profile=profile)
    try:
        value = session.get_scoped_config().get(name)
    except Exception as error:  # botocore has one class for each way to misread a profile
        raise UserError(f"AWS profile {profile}: {error}; see AWS_PROFILE and ~/.aws/config") from None
    return str(value) if value else None


def read_bytes(uri: str) -> bytes:
    """The content of the file at ``uri``."""
    files, path = filesystem(uri)
    with explained(uri), files.open_input_file(path) as file:
        return bytes(file.read())


def write_bytes(uri: str, data: bytes) -> None:
    """Write the file at ``uri`` whole; it appears complete or not at all."""
    with writing(uri) as file:
        file.write(data)


@contextmanager
def writing(uri: str) -> Iterator[Any]:
    """A file to write to, which appears at ``uri`` once it is complete; after an error nothing does."""
    files, path = filesystem(uri)
    with explained(uri):
        if is_s3(uri):
            file = files.open_output_stream(path)
            try:
                yield file
            except BaseException:
                file.close()  # Arrow has no way to abort an upload: it becomes an object, which goes again
                files.delete_file(path)
                raise
            file.close()
            return
        folder = Path(path).parent
        files.create_dir(str(folder), recursive=True)
        # hidden: who reads a folder of Parquet files passes over what a killed process left
        partial = str(folder / f".{Path(path).name}.partial-{os.getpid()}")
        try:
            with files.open_output_stream(partial) as file:
                yield file
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        os.replace(partial, path)


def delete_folder(uri: str) -> None:
    """Delete the folder at ``uri`` with all that is in it, where there is one."""
    files, path = filesystem(uri)
    with explained(uri):
        files.delete_dir_contents(path, missing_dir_ok=True)


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
    files, path = filesystem(uri)
    with explained(uri):
        return bool(files.get_file_info(path).type != arrow_fs.FileType.NotFound)


def is_folder(uri: str) -> bool:
    """Whether a folder (on S3: anything under the prefix) lies at ``uri``."""
    files, path = filesystem(uri)
    with explained(uri):
        return bool(files.get_file_info(path).type == arrow_fs.FileType.Directory)


def list_files(uri: str, recursive: bool = True) -> list[str]:
    """Paths of the files under the folder ``uri``, relative to it and sorted."""
    return [path for path, folder in _entries(uri, recursive) if not folder]


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly in the folder ``uri``, sorted."""
    return [path for path, folder in _entries(uri, recursive=False) if folder]


def _entries(uri: str, recursive: bool) -> list[tuple[str, bool]]:
    files, path = filesystem(uri)
    with explained(uri):
        found = files.get_file_info(arrow_fs.FileSelector(path, recursive=recursive))
    prefix = len(path.rstrip("/")) + 1
    return sorted((entry.path[prefix:], entry.type == arrow_fs.FileType.Directory) for entry in found)


DENIED = "access is denied; check the credentials (AWS_ACCESS_KEY_ID or AWS_PROFILE) and their rights"
# What a failed request says about itself, and the way out.
_HINTS = (
    ("NoSuchBucket", "the bucket does not exist; check its name and AWS_ENDPOINT_URL"),
    ("NO_SUCH_BUCKET", "the bucket does not exist; check its name and AWS_ENDPOINT_URL"),
    ("ACCESS_DENIED", DENIED),
    ("InvalidAccessKeyId", "the server does not know the access key; check AWS_ACCESS_KEY_ID or AWS_PROFILE"),
    (
        "INVALID_ACCESS_KEY_ID",
        "the server does not know the access key; check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    ),
    ("SIGNATURE_DOES_NOT_MATCH", "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or AWS_PROFILE"),
    ("SignatureDoesNotMatch", "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or AWS_PROFILE"),
    ("HTTP status 403", DENIED),
    ("HTTP status 301", "the bucket lies in another region; set AWS_DEFAULT_REGION"),
    ("HTTP status 404", "nothing lies there; check bucket and path"),
    ("NETWORK_CONNECTION", "the endpoint does not answer; check AWS_ENDPOINT_URL and the network"),
    ("curlCode", "the endpoint does not answer; check AWS_ENDPOINT_URL and the network"),
    ("is a directory", "a folder, where a file was wanted"),
    ("No space left", "the disk is full"),
)


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what Arrow raises into one message with the URI and the way out."""
    try:
        yield
    except FileNotFoundError:
        raise MissingFileError(f"{uri} does not exist; give an existing file or folder") from None
    except (IsADirectoryError, NotADirectoryError):
        raise MissingFileError(f"{uri} is not of the kind asked for (a folder for a file, or the reverse)") from None
    except PermissionError:
        raise ForbiddenFileError(f"{uri} may not be read or written by this user; change its permissions") from None
    except OSError as error:
        message = str(error)
        hint = next((way_out for sign, way_out in _HINTS if sign in message), None)
        kind = ForbiddenFileError if hint == DENIED else UserError
        raise kind(f"{uri}: {hint or message.splitlines()[0][:300]}") from error
