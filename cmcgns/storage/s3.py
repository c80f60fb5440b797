"""S3: Arrow reads, boto3 lists, uploads, deletes, writes conditionally and looks up why a request failed.

Both use the standard AWS environment: AWS_ENDPOINT_URL, AWS_PROFILE, roles, AWS_REQUEST_CHECKSUM_CALCULATION.
"""

import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from pyarrow import fs as arrow_fs

from cmcgns.errors import UserError
from cmcgns.storage.errors import ENDPOINT_VARIABLES, error_codes, explained, fix_for, pause_s

log = logging.getLogger(__name__)
DEFAULT_REGION = "us-east-1"
KEY_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
ONLY_BOTO3 = ("assume-role", "config-file", "custom-process", "login", "sso")
"""Sources of credentials (botocore's names) that Arrow does not read."""
CONNECT_SECONDS = 5.0
STALLED_SECONDS = 15.0
"""A request that receives nothing for this long has failed."""
CONFLICT_S = 10.0
"""After a write conflict, wait this long for the other writer's object."""
PART_BYTES = 16 * 2**20
PART_THREADS = 4


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of ``s3://BUCKET/KEY``; the key may be empty."""
    bucket, _, key = uri.removeprefix("s3://").strip("/").partition("/")
    if not bucket:
        raise UserError(f"{uri} names no bucket; give s3://BUCKET/FOLDER")
    return bucket, key


def custom_endpoint() -> str | None:
    """The S3 endpoint of the environment or the AWS profile; None for Amazon's.

    Raises:
        UserError: it has no scheme, or a host name that boto3 refuses.
    """
    variable = next((name for name in ENDPOINT_VARIABLES if os.environ.get(name)), None)
    endpoint = os.environ[variable] if variable else _profile_value("endpoint_url", os.environ.get("AWS_PROFILE"))
    if endpoint is None:
        return None
    where = variable or "endpoint_url of the AWS profile"
    if not endpoint.startswith(("http://", "https://")):
        raise UserError(f"{where} {endpoint}: write http:// or https:// before the host")
    if "_" in (urlsplit(endpoint).hostname or ""):
        raise UserError(f"{where} {endpoint}: a host name has no underscores; use its address or another name")
    return endpoint


def arrow_filesystem(bucket: str, attempts: int) -> arrow_fs.S3FileSystem:
    """Arrow's file system of a bucket, cached; it makes up to ``attempts`` attempts per request.

    It has the credentials of now: where ``are_temporary``, ask again for each use.
    """
    return _arrow_filesystem(bucket, custom_endpoint(), os.environ.get("AWS_PROFILE"), attempts, _keys_for_arrow())


@functools.lru_cache(maxsize=32)
def _arrow_filesystem(
    bucket: str, endpoint: str | None, profile: str | None, attempts: int, keys: tuple[str | None, ...]
) -> arrow_fs.S3FileSystem:
    region = _region(profile)
    proxy = _proxy(endpoint or f"https://{bucket}.s3.amazonaws.com")
    common = {
        **dict(zip(("access_key", "secret_key", "session_token"), keys, strict=False)),
        **({"proxy_options": proxy} if proxy else {}),
        "connect_timeout": CONNECT_SECONDS,
        "request_timeout": STALLED_SECONDS,
        "retry_strategy": arrow_fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    }
    if endpoint is None:
        return arrow_fs.S3FileSystem(region=region or _bucket_region(bucket), **common)
    # before the first client: otherwise servers other than Amazon's answer writes with 411
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    scheme, _, host = endpoint.rpartition("://")
    return arrow_fs.S3FileSystem(
        endpoint_override=host.rstrip("/"),
        scheme=scheme or "https",
        region=region or DEFAULT_REGION,
        force_virtual_addressing=False,  # path style: test servers have no host name per bucket
        **common,
    )


def _proxy(url: str) -> str | None:
    """The proxy for requests to ``url`` by the environment's http_proxy, https_proxy and no_proxy, as boto3 reads it."""
    parts = urlsplit(url)
    proxy = getproxies_environment().get(parts.scheme)
    if not proxy or proxy_bypass(parts.netloc):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def are_temporary() -> bool:
    """Whether the credentials are of a kind that only boto3 can renew: a role, single sign-on or a process in an AWS profile."""
    return bool(_keys_for_arrow())


def _keys_for_arrow() -> tuple[str | None, ...]:
    """Key, secret and token that boto3 has found, renewed when they expire; empty if Arrow finds its credentials itself."""
    profile = os.environ.get("AWS_PROFILE")
    if profile is None and os.environ.get("AWS_ACCESS_KEY_ID"):
        return ()
    try:
        credentials = _session(profile).get_credentials()
        if credentials is None or credentials.method not in ONLY_BOTO3:
            return ()
        return tuple(credentials.get_frozen_credentials())
    except Exception as error:  # botocore raises many classes for a role that cannot be taken on
        raise UserError(f"AWS profile {profile or 'default'}: {error}; see AWS_PROFILE and ~/.aws/config") from None


def _session(profile: str | None) -> Any:
    """botocore's session, whose credentials renew themselves."""
    return _cached_session(profile, tuple(os.environ.get(name) for name in KEY_VARIABLES))


@functools.lru_cache(maxsize=8)
def _cached_session(profile: str | None, keys: tuple[str | None, ...]) -> Any:
    import botocore.session  # slow to import and only needed for S3

    return botocore.session.Session(profile=profile)


def _region(profile: str | None) -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or _profile_value("region", profile)


def _bucket_region(bucket: str) -> str:
    try:
        return str(arrow_fs.resolve_s3_region(bucket))
    except OSError:
        log.info("region of s3://%s is unknown; assuming %s", bucket, DEFAULT_REGION)
        return DEFAULT_REGION


@functools.lru_cache(maxsize=32)
def _profile_value(name: str, profile: str | None) -> str | None:
    """A setting of the active AWS profile; None if it has none."""
    try:
        value = _session(profile).get_scoped_config().get(name)
    except Exception as error:  # botocore raises many classes for a bad profile
        raise UserError(f"AWS profile {profile}: {error}; see AWS_PROFILE and ~/.aws/config") from None
    return str(value) if value else None


@functools.lru_cache(maxsize=8)
def _boto3_session(profile: str | None, keys: tuple[str | None, ...]) -> Any:
    """boto3's session around botocore's; a second one would add boto3's methods to its clients twice, which raises."""
    import boto3

    return boto3.session.Session(botocore_session=_cached_session(profile, keys))


_making_client = threading.Lock()
"""boto3's sessions are not safe for threads."""


def client(if_absent: bool = False) -> Any:
    """The boto3 client of this process. ``if_absent``: its writes fail with status 412 if the object exists."""
    keys = tuple(os.environ.get(name) for name in KEY_VARIABLES)
    return _client(custom_endpoint(), os.environ.get("AWS_PROFILE"), keys, if_absent)


@functools.lru_cache(maxsize=8)
def _client(endpoint: str | None, profile: str | None, keys: tuple[str | None, ...], if_absent: bool) -> Any:
    from botocore.config import Config

    options: dict[str, Any] = {} if endpoint is None else {"s3": {"addressing_style": "path"}}
    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},  # _pause decides instead
        connect_timeout=CONNECT_SECONDS,
        read_timeout=STALLED_SECONDS,
        max_pool_connections=32,
        **options,
    )
    region = _region(profile) or (DEFAULT_REGION if endpoint else None)
    with _making_client:
        s3 = _boto3_session(profile, keys).client("s3", region_name=region, endpoint_url=endpoint, config=config)
    s3.meta.events.register("before-call.s3", lambda context, **_: context.update(started=time.monotonic()))
    s3.meta.events.register_last("needs-retry.s3", _pause)
    if if_absent:
        # s3transfer 0.19 does not accept IfNoneMatch as an extra argument of an upload
        for operation in ("PutObject", "CompleteMultipartUpload"):
            add_condition = lambda params, **_: {**params, "IfNoneMatch": "*"}
            s3.meta.events.register(f"provide-client-params.s3.{operation}", add_condition)
    return s3


def _pause(
    attempts: int, operation: Any, response: Any, caught_exception: Any, request_dict: dict[str, Any], **_: Any
) -> float | None:
    """botocore's retry event: seconds until the request is sent again, also inside a paginator or an upload in parts."""
    from botocore.exceptions import ClientError

    error = caught_exception
    if response is not None and response[0].status_code >= 300:
        error = ClientError(response[1], operation.name)
    return pause_s(error, attempts, request_dict["context"]["started"])


def entries(uri: str, recursive: bool) -> list[tuple[str, bool]]:
    """(path, whether it is a folder) of everything under ``uri``, relative to it."""
    bucket, key = split(uri)
    prefix = f"{key}/" if key else ""
    listing = (
        client()
        .get_paginator("list_objects_v2")
        .paginate(Bucket=bucket, Prefix=prefix, Delimiter="" if recursive else "/")
    )
    listed: list[tuple[str, bool]] = []
    with explained(uri):
        for page in listing:
            listed += [(each["Key"][len(prefix) :], False) for each in page.get("Contents", ())]
            listed += [(each["Prefix"][len(prefix) : -1], True) for each in page.get("CommonPrefixes", ())]
        if not listed and key:
            raise FileNotFoundError(uri)
    # some tools mark an empty folder by a key that ends with /
    return [(path, folder) for path, folder in listed if path and not path.endswith("/")]


def size(uri: str) -> int | None:
    """Bytes of the object at ``uri``; None if there is none."""
    from botocore.exceptions import ClientError

    bucket, key = split(uri)
    with explained(uri):
        try:
            return int(client().head_object(Bucket=bucket, Key=key)["ContentLength"])
        except ClientError as error:
            if "404" in error_codes(error):
                return None
            raise


def put(uri: str, data: bytes, if_absent: bool = False) -> bool:
    """Write an object; False with ``if_absent`` if it exists."""
    bucket, key = split(uri)
    return _written(uri, lambda: client(if_absent).put_object(Bucket=bucket, Key=key, Body=data))


def delete(uri: str) -> None:
    """Delete the object at ``uri`` if it exists; safe to retry, unlike Arrow's deletion."""
    bucket, key = split(uri)
    with explained(uri):
        client().delete_object(Bucket=bucket, Key=key)


def upload(local: Path, uri: str, if_absent: bool = False) -> bool:
    """Write the file ``local`` to ``uri``, large ones in parts; it appears complete or not at all.

    False with ``if_absent`` if the object exists. A failed upload leaves nothing behind.
    """
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    if if_absent and size(uri) is not None:  # servers that ignore the condition would replace it
        return False
    bucket, key = split(uri)
    config = TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_concurrency=PART_THREADS,
        preferred_transfer_client="classic",  # the CRT client ignores our retries and condition
    )

    def send() -> None:
        with create_transfer_manager(client(if_absent), config) as transfers:
            transfers.upload(str(local), bucket, key).result()

    return _written(uri, send)


def copy(uri: str, target: str) -> None:
    """Copy an object within S3, a large one in parts, without downloading it."""
    (bucket, key), (to_bucket, to_key) = split(uri), split(target)
    with explained(target):
        client().copy({"Bucket": bucket, "Key": key}, to_bucket, to_key)


def _written(uri: str, request: Callable[[], object]) -> bool:
    """Whether a conditional write took place."""
    from botocore.exceptions import ClientError

    with explained(uri):
        try:
            request()
        except ClientError as error:
            codes = error_codes(error)
            if "412" in codes or ("409" in codes and _appears(uri)):  # 409: another writer is about to finish
                return False
            raise
        return True


def _appears(uri: str) -> bool:
    """Whether an object exists at ``uri`` within ``CONFLICT_S``."""
    end = time.monotonic() + CONFLICT_S
    while size(uri) is None:
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def abort_uploads(uri: str) -> int:
    """Abort the unfinished uploads that killed processes left directly in the folder ``uri``; returns their number."""
    bucket, key = split(uri)
    prefix = f"{key}/" if key else ""
    aborted = 0
    with explained(uri):
        for page in client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for each in page.get("Uploads", ()):
                if "/" not in each["Key"][len(prefix) :]:  # subfolders belong to others
                    client().abort_multipart_upload(Bucket=bucket, Key=each["Key"], UploadId=each["UploadId"])
                    aborted += 1
    return aborted


def raise_if_unreachable(uri: str) -> None:
    """Raise with the server's reason if nothing in the bucket of ``uri`` can be read; return if only this object cannot.

    Arrow starts with a HEAD request, and answers to HEAD carry no reason.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split(uri)
    with explained(uri):
        try:
            client().get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
        except (ClientError, BotoCoreError) as error:
            if fix_for(error) and error_codes(error).isdisjoint({"nosuchkey", "accessdenied"}):
                raise
