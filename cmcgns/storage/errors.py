"""Errors of object storage: retried if they may pass, otherwise one message with the fix.

Our own retries, because tenacity retries a function call but not one request inside a paginator or transfer of boto3, and
the retry modes of botocore and Arrow limit the attempts but not the time.
"""

import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from cmcgns.errors import UserError, first_line

log = logging.getLogger(__name__)
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
RETRY_LIMIT_VARIABLE = "CMCGNS_STORAGE_PATIENCE_S"
RETRY_LIMIT_S = 60.0
"""A request is retried for this long before the run fails."""
FIRST_RETRY_LIMIT_S = 5.0
"""The same until an endpoint has answered this process: until then a wrong address is likelier than a transient error."""
LONGEST_SHOWN = 80
"""Characters shown of a name that is too long for a file."""
Result = TypeVar("Result")


class MissingFileError(UserError):
    """There is no file or folder at the URI."""


class ForbiddenFileError(UserError):
    """Access to a file is denied; S3 says so of a missing file too if the user may not list the bucket."""


class BrokenFileError(UserError):
    """A file is truncated or is not of the type that its name says."""


class FullDiskError(UserError):
    """There is no space left for a file. Unlike other errors of the user it may come in the middle of a run."""


FULL = "the disk is full; free some space"
NO_SPACE = os.strerror(errno.ENOSPC)
DENIED = "access is denied; check the credentials (AWS_ACCESS_KEY_ID or AWS_PROFILE) and their rights"
_EXPIRED = "the credentials have expired; renew them (AWS_SESSION_TOKEN or AWS_PROFILE) and start again"
_NO_ANSWER = "the endpoint does not answer; check AWS_ENDPOINT_URL and the network"
_BUSY = "the server keeps failing; start again later, or with fewer readers"
_REGION = "the bucket is in another region; set AWS_DEFAULT_REGION"

# Codes as ``error_codes`` returns them: S3's own, HTTP status, or the class of a boto3 error. The most specific come first.
_FIXES = {
    "nosuchbucket": "the bucket does not exist; check its name and AWS_ENDPOINT_URL",
    **dict.fromkeys(("expiredtoken", "tokenrefreshrequired", "invalidtoken"), _EXPIRED),
    "invalidaccesskeyid": "the server does not know the access key; check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "signaturedoesnotmatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "requesttimetooskewed": "this machine's clock is wrong; set it",
    **dict.fromkeys(("nocredentialserror", "accessdenied", "403"), DENIED),
    **dict.fromkeys(("permanentredirect", "301"), _REGION),
}
_NETWORK = {
    "networkconnection", "endpointconnectionerror", "connecttimeouterror", "readtimeouterror", "connectionclosederror",
    "proxyconnectionerror", "httpclienterror", "responsestreamingerror", "incompletereaderror",
}  # fmt: skip
_OVERLOAD = {
    "slowdown", "internalerror", "internalfailure", "serviceunavailable", "throttling", "throttlingexception", "requesttimeout",
    "429", "500", "502", "503", "504",
}  # fmt: skip
_FIXES |= dict.fromkeys(sorted(_NETWORK), _NO_ANSWER) | dict.fromkeys(sorted(_OVERLOAD), _BUSY)
_TRANSIENT = _NETWORK | _OVERLOAD
_MISSING = {"nosuchkey", "resourcenotfound", "404"}
# Arrow has no fields for them: "AWS Error UNKNOWN (HTTP status 400) during ...: Unable to parse ExceptionName: ExpiredToken"
_ARROW_CODE = re.compile(r"(?:AWS Error |HTTP status |ExceptionName: )(\w+)")


class _Requests:
    """What this process has learned from its requests."""

    def __init__(self) -> None:
        self.retries = 0
        self.answered: set[tuple[str, ...]] = set()
        """Endpoints that have answered."""


_requests = _Requests()


def retries() -> int:
    """How many requests this process has retried so far."""
    return _requests.retries


def retry_limit_s() -> float:
    """Seconds for which a request is retried; ``CMCGNS_STORAGE_PATIENCE_S`` overrides the default."""
    setting = os.environ.get(RETRY_LIMIT_VARIABLE)
    if setting:
        return float(setting)
    return RETRY_LIMIT_S if _endpoint() in _requests.answered else FIRST_RETRY_LIMIT_S


def _endpoint() -> tuple[str, ...]:
    return tuple(os.environ.get(name, "") for name in ENDPOINT_VARIABLES)


def pause_s(error: BaseException | None, attempt: int, started: float) -> float | None:
    """Seconds to wait before a request that failed at its ``attempt`` is repeated; None if it must not be repeated.

    ``error``: None after a success; ``started``: when the first attempt started, on ``time.monotonic``'s clock.
    """
    if error is None or not is_transient(error):
        _requests.answered.add(_endpoint())
        return None
    if time.monotonic() - started >= retry_limit_s():
        return None
    _requests.retries += 1
    if attempt == 3:
        log.warning("a request to object storage failed three times, still retrying: %s", _shown(error))
    return random.uniform(0, 0.25 * 2 ** min(attempt - 1, 5))  # 8 s at most


def with_retries(uri: str, request: Callable[[], Result]) -> Result:
    """The result of a ``request`` by Arrow, repeated after transient errors; other errors name ``uri`` and the fix."""
    attempt, started = 1, time.monotonic()
    with explained(uri):
        while True:
            try:
                result = request()
            except Exception as error:
                pause = pause_s(error, attempt, started)
                if pause is None:
                    raise
            else:
                pause_s(None, attempt, started)
                return result
            time.sleep(pause)
            attempt += 1


def error_codes(error: BaseException) -> set[str]:
    """S3 error code (lower case, no underscores) and HTTP status of a failed request of boto3 or Arrow."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's ClientError
        codes = [response.get("Error", {}).get("Code"), response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    elif _is_boto(error):
        codes = [type(error).__name__]
    else:
        codes = _ARROW_CODE.findall(str(error)) if isinstance(error, OSError) else []
    return {str(code).replace("_", "").lower() for code in codes}


def fix_for(error: BaseException) -> str | None:
    """The problem and its fix if S3 or the network rejected the whole request, not one missing object."""
    codes = error_codes(error)
    return next((fix for code, fix in _FIXES.items() if code in codes), None)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    return not error_codes(error).isdisjoint(_TRANSIENT)


def is_missing(error: BaseException) -> bool:
    """Whether S3 answered that there is no such object."""
    return not error_codes(error).isdisjoint(_MISSING)


def _is_boto(error: BaseException) -> bool:
    return type(error).__module__.startswith(("botocore", "boto3", "s3transfer"))


def _shown(error: BaseException) -> str:
    return first_line(error)[:300]


def is_full_disk(error: BaseException) -> bool:
    """True for an error of a write to a full disk or beyond a quota. Arrow and safetensors set no number."""
    number = getattr(error, "errno", None)
    return isinstance(error, FullDiskError) or number in (errno.ENOSPC, errno.EDQUOT) or NO_SPACE in str(error)


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn errors of Arrow, boto3 and the operating system into one message with the URI and the fix."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise MissingFileError(f"{uri} does not exist; give an existing file or folder") from None
    except IsADirectoryError:
        raise MissingFileError(f"{uri} is a folder; give a file") from None
    except NotADirectoryError:
        raise MissingFileError(f"{uri} is a file or inside one; give a folder") from None
    except PermissionError:
        raise ForbiddenFileError(f"{uri}: permission denied; change the permissions of this path") from None
    except Exception as error:
        if not (_is_boto(error) or isinstance(error, OSError)):
            raise
        number = getattr(error, "errno", None)
        if number == errno.ENAMETOOLONG:
            raise MissingFileError(f"{uri[:LONGEST_SHOWN]}... is too long for a file name; fix the path") from None
        if number == errno.ELOOP or "Too many levels of symbolic links" in str(error):  # Arrow sets no number
            raise BrokenFileError(f"{uri} is a circular symbolic link; fix it") from None
        if "is a directory" in str(error):  # Arrow's open of a local folder
            raise MissingFileError(f"{uri} is a folder; give a file") from None
        if is_full_disk(error):
            raise FullDiskError(f"{uri}: {FULL}") from error
        fix = fix_for(error)
        if fix is None and is_missing(error):
            raise MissingFileError(f"{uri} does not exist; give an existing file or folder") from None
        kind = ForbiddenFileError if fix == DENIED else UserError
        raise kind(f"{uri}: {fix or _shown(error)}") from error
