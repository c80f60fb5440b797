"""Object storage by S3: Arrow reads, boto3 lists, uploads in parts, commits on a condition and looks a reason up.

Both go by the standard AWS environment: AWS_ENDPOINT_URL, AWS_PROFILE, roles, AWS_REQUEST_CHECKSUM_CALCULATION.
"""

import functools
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyarrow import fs as arrow_fs

from cmcgns.errors import UserError
from cmcgns.storage.errors import ENDPOINT_VARIABLES, HINTS, passes, patiently

log = logging.getLogger(__name__)
DEFAULT_REGION = "us-east-1"
CONNECT_SECONDS = 5.0
STALLED_SECONDS = 15.0
"""A request that brings nothing for so long has failed."""
CONFLICT_S = 10.0
PART_BYTES = 16 * 2**20
PART_THREADS = 4


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of ``s3://BUCKET/KEY``; the key may be empty."""
    bucket, _, key = uri.removeprefix("s3://").strip("/").partition("/")
    if not bucket:
        raise UserError(f"{uri} names no bucket; give s3://BUCKET/FOLDER")
    return bucket, key


def custom_endpoint() -> str | None:
    """The S3 endpoint that the environment or the AWS profile names instead of Amazon's."""
    named = next((os.environ[name] for name in ENDPOINT_VARIABLES if os.environ.get(name)), None)
    return named or _profile_value("endpoint_url", os.environ.get("AWS_PROFILE"))


def arrow_filesystem(bucket: str, attempts: int) -> arrow_fs.S3FileSystem:
    """Arrow's file system, which tries each request so many times by itself; one for each process and bucket."""
    return _arrow_filesystem(bucket, custom_endpoint(), os.environ.get("AWS_PROFILE"), attempts)


@functools.lru_cache(maxsize=32)
def _arrow_filesystem(bucket: str, endpoint: str | None, profile: str | None, attempts: int) -> arrow_fs.S3FileSystem:
    region = _region(profile)
    common = {
        "connect_timeout": CONNECT_SECONDS,
        "request_timeout": STALLED_SECONDS,
        "retry_strategy": arrow_fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
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


def _region(profile: str | None) -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or _profile_value("region", profile)


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


def client() -> Any:
    """The boto3 client of this process; it tries each request once, ``patiently`` does the rest."""
    keys = tuple(os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"))
    return _client(custom_endpoint(), os.environ.get("AWS_PROFILE"), keys)


@functools.lru_cache(maxsize=8)
def _client(endpoint: str | None, profile: str | None, keys: tuple[str | None, ...]) -> Any:
    import boto3
    from botocore.config import Config

    options: dict[str, Any] = {} if endpoint is None else {"s3": {"addressing_style": "path"}}
    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=STALLED_SECONDS,
        max_pool_connections=32,
        **options,
    )
    region = _region(profile) or (DEFAULT_REGION if endpoint else None)
    return boto3.session.Session(profile_name=profile, region_name=region).client(
        "s3", endpoint_url=endpoint, config=config
    )


def entries(uri: str, recursive: bool) -> list[tuple[str, bool]]:
    """(path, whether it is a folder) of everything under ``uri``, relative to it; listed page by page."""
    bucket, key = split(uri)
    prefix = f"{key}/" if key else ""
    found: list[tuple[str, bool]] = []
    for page in _pages(uri, bucket, prefix, "" if recursive else "/"):
        found += [(each["Key"][len(prefix) :], False) for each in page.get("Contents", ())]
        found += [(each["Prefix"][len(prefix) : -1], True) for each in page.get("CommonPrefixes", ())]
    if not found and key:
        raise FileNotFoundError(uri)
    # a key that ends with / is what some tools leave for an empty folder
    return [(path, folder) for path, folder in found if path and not path.endswith("/")]


def _pages(uri: str, bucket: str, prefix: str, delimiter: str) -> Iterator[dict[str, Any]]:
    token: dict[str, str] = {}
    while True:
        request = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter, **token}
        page = patiently(uri, lambda request=request: client().list_objects_v2(**request))  # type: ignore[misc]
        yield page
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def size(uri: str) -> int | None:
    """Bytes of the object at ``uri``; None where there is none."""
    from botocore.exceptions import ClientError

    bucket, key = split(uri)

    def head() -> int | None:
        try:
            return int(client().head_object(Bucket=bucket, Key=key)["ContentLength"])
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise

    return patiently(uri, head)


def put(uri: str, data: bytes, if_absent: bool = False) -> bool:
    """Write an object whole; False where one lies there already and ``if_absent`` was asked."""
    bucket, key = split(uri)
    condition = {"IfNoneMatch": "*"} if if_absent else {}
    return _unless_there(uri, lambda: client().put_object(Bucket=bucket, Key=key, Body=data, **condition))


def delete(uri: str) -> None:
    """Delete the object at ``uri``, where there is one; unlike Arrow's deletion it may be tried again."""
    bucket, key = split(uri)
    patiently(uri, lambda: client().delete_object(Bucket=bucket, Key=key))


def upload(local: Path, uri: str, if_absent: bool = False) -> bool:
    """Write the file ``local`` to ``uri`` in parts; it appears whole or not at all.

    False where an object lies there already and ``if_absent`` was asked; nothing is left of a failed upload.
    """
    if local.stat().st_size <= PART_BYTES:
        return put(uri, local.read_bytes(), if_absent)
    if if_absent and size(uri) is not None:  # servers that do not know the condition would replace it
        return False
    bucket, key = split(uri)
    target = {"Bucket": bucket, "Key": key}
    target["UploadId"] = patiently(uri, lambda: client().create_multipart_upload(Bucket=bucket, Key=key))["UploadId"]
    condition = {"IfNoneMatch": "*"} if if_absent else {}
    try:
        with ThreadPoolExecutor(PART_THREADS) as threads:
            numbers = range(1, -(-local.stat().st_size // PART_BYTES) + 1)
            parts = list(threads.map(lambda number: _upload_part(uri, target, local, number), numbers))
        complete = functools.partial(client().complete_multipart_upload, MultipartUpload={"Parts": parts}, **condition)
        written = _unless_there(uri, lambda: complete(**target))
    except BaseException:
        _abort(target)
        raise
    if not written:
        _abort(target)
    return written


def _abort(target: dict[str, str]) -> None:
    """Give an upload up; where that fails too, ``abort_uploads`` finds it later."""
    from botocore.exceptions import BotoCoreError, ClientError

    with suppress(ClientError, BotoCoreError):
        client().abort_multipart_upload(**target)


def _upload_part(uri: str, target: dict[str, str], local: Path, number: int) -> dict[str, Any]:
    with local.open("rb") as file:
        file.seek((number - 1) * PART_BYTES)
        body = file.read(PART_BYTES)
    answer = patiently(uri, lambda: client().upload_part(**target, PartNumber=number, Body=body))
    return {"PartNumber": number, "ETag": answer["ETag"]}


def _unless_there(uri: str, request: Any) -> bool:
    """Whether a conditional write took place."""
    from botocore.exceptions import ClientError

    def attempt() -> bool:
        try:
            request()
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == 412 or (status == 409 and _appears(uri)):  # 409: another writer is about to finish
                return False
            raise
        return True

    return patiently(uri, attempt)


def _appears(uri: str) -> bool:
    """Whether an object lies at ``uri`` within ``CONFLICT_S``."""
    end = time.monotonic() + CONFLICT_S
    while size(uri) is None:
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def abort_uploads(uri: str) -> int:
    """End all unfinished uploads into the folder ``uri`` itself, which a killed process has left; how many there were."""
    bucket, key = split(uri)
    prefix, aborted = f"{key}/" if key else "", 0
    request: dict[str, str] = {"Bucket": bucket, "Prefix": prefix}
    while True:
        page = patiently(uri, functools.partial(client().list_multipart_uploads, **request))
        for each in page.get("Uploads", []):
            if "/" in each["Key"][len(prefix) :]:  # somebody else's folder
                continue
            target = {"Bucket": bucket, "Key": each["Key"], "UploadId": each["UploadId"]}
            patiently(uri, functools.partial(client().abort_multipart_upload, **target))
            aborted += 1
        if not page.get("IsTruncated"):
            return aborted
        request |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def reason(uri: str) -> str | None:
    """Why nothing in the bucket of ``uri`` can be read, in the server's words; None where only this object cannot.

    Answers to HEAD, which Arrow begins with, carry no reason.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split(uri)

    def attempt() -> str | None:
        try:
            client().get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].read()
            return None
        except (ClientError, BotoCoreError) as error:
            if passes(error):
                raise
            message = str(error)
            if "NoSuchKey" in message or "AccessDenied" in message:
                return None
            return message if any(sign in message for sign, _ in HINTS) else None

    return patiently(uri, attempt)
