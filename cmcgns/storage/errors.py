"""What goes wrong with object storage: tried again where that helps, else one message with the way out."""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import tenacity

from cmcgns.errors import UserError

log = logging.getLogger(__name__)
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
PATIENCE_VARIABLE = "CMCGNS_STORAGE_PATIENCE_S"
PATIENCE_S = 60.0
"""For how long a request is tried again before the run ends."""
FIRST_CONTACT_S = 5.0
"""The same until a process has had its first answer: until then a wrong address is likelier than a fault."""
LONGEST_PAUSE_S = 8.0
LONGEST_SHOWN = 80
"""Characters of a name that is too long for any file."""
Result = TypeVar("Result")


class MissingFileError(UserError):
    """A file or folder that is not where the URI says."""


class ForbiddenFileError(UserError):
    """A file that lies there and may not be read; S3 also answers so where a missing one may not be listed."""


class BrokenFileError(UserError):
    """A file that is shorter than it says or not what its name says."""


DENIED = "access is denied; check the credentials (AWS_ACCESS_KEY_ID or AWS_PROFILE) and their rights"
_NO_BUCKET = "the bucket does not exist; check its name and AWS_ENDPOINT_URL"
_NO_KEY = "the server does not know the access key; check AWS_ACCESS_KEY_ID or AWS_PROFILE"
_WRONG_SECRET = "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
_EXPIRED = "the credentials have expired; renew them (AWS_SESSION_TOKEN or AWS_PROFILE) and start again"
_NO_ANSWER = "the endpoint does not answer; check AWS_ENDPOINT_URL and the network"
_BUSY = "the server keeps failing; try again later, or with fewer readers"

# What a failed request says about itself, in Arrow's words or boto3's, and the way out.
HINTS = (
    ("NoSuchBucket", _NO_BUCKET),
    ("NO_SUCH_BUCKET", _NO_BUCKET),
    ("ExpiredToken", _EXPIRED),
    ("TokenRefreshRequired", _EXPIRED),
    ("InvalidToken", _EXPIRED),
    ("InvalidAccessKeyId", _NO_KEY),
    ("INVALID_ACCESS_KEY_ID", _NO_KEY),
    ("SignatureDoesNotMatch", _WRONG_SECRET),
    ("SIGNATURE_DOES_NOT_MATCH", _WRONG_SECRET),
    ("RequestTimeTooSkewed", "this machine's clock is wrong; set it"),
    ("Unable to locate credentials", DENIED),
    ("AccessDenied", DENIED),
    ("ACCESS_DENIED", DENIED),
    ("HTTP status 403", DENIED),
    ("(403)", DENIED),
    ("HTTP status 301", "the bucket lies in another region; set AWS_DEFAULT_REGION"),
    ("PermanentRedirect", "the bucket lies in another region; set AWS_DEFAULT_REGION"),
    ("HTTP status 404", "nothing lies there; check bucket and path"),
    ("NETWORK_CONNECTION", _NO_ANSWER),
    ("curlCode", _NO_ANSWER),
    ("Could not connect", _NO_ANSWER),
    ("timed out", _NO_ANSWER),
    ("timeout", _NO_ANSWER),
    ("Connection was closed", _NO_ANSWER),
    ("No space left", "the disk is full"),
    ("SLOW_DOWN", _BUSY),
    ("SlowDown", _BUSY),
    ("HTTP status 50", _BUSY),
    ("InternalError", _BUSY),
    ("ServiceUnavailable", _BUSY),
)

# Faults that pass: of the server or on the way to it.
_PASSING = (
    "HTTP status 50", "HTTP status 429", "SLOW_DOWN", "SlowDown", "INTERNAL_FAILURE", "InternalError", "SERVICE_UNAVAILABLE",
    "ServiceUnavailable", "THROTTLING", "Throttling", "RequestTimeout", "REQUEST_TIMEOUT", "NETWORK_CONNECTION", "curlCode",
    "Could not connect", "timed out", "timeout", "Connection was closed", "Connection broken", "IncompleteRead",
    "(500)", "(502)", "(503)", "(504)", "more bytes expected",
)  # fmt: skip

# An object that is not there, or no longer once it has been found.
_GONE = ("(404)", "NoSuchKey", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND")


class _Tally:
    """Requests of this process that were tried again, and the places that have answered one."""

    def __init__(self) -> None:
        self.retries = 0
        self.answered: set[tuple[str, ...]] = set()


_tally = _Tally()


def retries() -> int:
    """How many requests this process has tried again so far."""
    return _tally.retries


def patience_s(uri: str) -> float:
    """Seconds for which a request is tried again; the environment's ``CMCGNS_STORAGE_PATIENCE_S`` comes first."""
    given = os.environ.get(PATIENCE_VARIABLE)
    return float(given) if given else PATIENCE_S if _place(uri) in _tally.answered else FIRST_CONTACT_S


def _place(uri: str) -> tuple[str, ...]:
    """Bucket and endpoint."""
    return (*uri.split("/")[:3], *(os.environ.get(name, "") for name in ENDPOINT_VARIABLES))


def patiently(uri: str, request: Callable[[], Result]) -> Result:
    """What ``request`` returns, tried again with growing pauses while its faults pass; else an error that names ``uri``."""
    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_delay(patience_s(uri)),
        wait=tenacity.wait_random_exponential(multiplier=0.25, max=LONGEST_PAUSE_S),
        retry=tenacity.retry_if_exception(passes),
        before_sleep=_count,
        reraise=True,
    )
    with explained(uri):
        result = attempts(request)
        _tally.answered.add(_place(uri))
        return result


def _count(state: tenacity.RetryCallState) -> None:
    _tally.retries += 1
    if state.attempt_number == 3:
        error = state.outcome.exception() if state.outcome else None
        log.warning("object storage has failed three times in a row, trying on: %s", _said(error) if error else "")


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, FileNotFoundError | PermissionError | UserError):
        return False
    text = _said(error)
    return _is_remote(error) and any(sign in text for sign in _PASSING)


def _is_remote(error: BaseException) -> bool:
    return type(error).__module__.startswith(("botocore", "boto3", "urllib3", "s3transfer")) or isinstance(
        error, OSError
    )


def _said(error: BaseException) -> str:
    """The error's first line, at most 300 characters of it."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what Arrow and boto3 raise into one message with the URI and the way out."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise MissingFileError(f"{uri} does not exist; give an existing file or folder") from None
    except (IsADirectoryError, NotADirectoryError):
        raise MissingFileError(f"{uri} is not of the kind asked for (a folder for a file, or the reverse)") from None
    except PermissionError:
        raise ForbiddenFileError(f"{uri} may not be read or written by this user; change its permissions") from None
    except Exception as error:
        if not _is_remote(error):
            raise
        message = str(error)
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise MissingFileError(f"{uri[:LONGEST_SHOWN]}... is longer than any file's name; mend the path") from None
        if "Too many levels of symbolic links" in message:
            raise BrokenFileError(f"{uri} is a symbolic link that leads in a circle; mend it") from None
        if "is a directory" in message:
            raise MissingFileError(f"{uri}: a folder, where a file was wanted") from None
        hint = next((way_out for sign, way_out in HINTS if sign in message), None)
        if hint is None and any(sign in message for sign in _GONE):
            raise MissingFileError(f"{uri} does not exist; give an existing file or folder") from None
        kind = ForbiddenFileError if hint == DENIED else UserError
        raise kind(f"{uri}: {hint or _said(error)}") from error
