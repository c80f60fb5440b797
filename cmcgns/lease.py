"""A lease on a folder, so that two jobs never write into the same one.

The holder keeps a file `lease-N.json` in the folder and renews it. Another job may create `lease-N+1.json`, which only one can,
once the holder is dead: its process is gone from this machine, or it has not renewed the lease for ``DEAD_S``. That needs no
clocks that agree, and a holder that comes back finds that a newer lease exists.
"""

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cmcgns import storage
from cmcgns.cli import STATUS_FAILED
from cmcgns.errors import UserError

logger = logging.getLogger(__name__)
RENEW_S, DEAD_S, POLL_S = 15.0, 60.0, 3.0
NAME = re.compile(r"lease-(\d+)\.json")
_held: set[str] = set()
"""Folders that this process holds."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder."""

    host: str
    machine: str
    """Differs between machines and containers."""
    pid: int
    started: float
    """When the process was created; a later process may have the same number."""
    since: str
    token: str = ""
    """Random, so that a holder recognises its own lease."""
    renewals: int = 0

    @classmethod
    def this_process(cls) -> "Holder":
        pid, now = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return cls(socket.gethostname(), _machine(), pid, psutil.Process(pid).create_time(), now, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def to_json(self, renewals: int = 0) -> bytes:
        """Content of the lease's file."""
        return json.dumps(asdict(self) | {"renewals": renewals}).encode()

    def is_running(self) -> bool | None:
        """Whether the process runs; None if it ran on another machine."""
        if self.machine != _machine():
            return None
        with suppress(psutil.Error):
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1.0
        return False


def _machine() -> str:
    """Identity of this machine, or of this container: process numbers mean the same only within it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not on Linux
        return socket.gethostname()


def is_lease(name: str) -> bool:
    """Whether ``name`` is that of the file of a lease."""
    return NAME.fullmatch(name) is not None


@contextmanager
def hold(uri: str, what: str) -> Iterator[None]:
    """Hold the folder ``uri`` for the length of the block; within it, to hold it again does nothing.

    ``what`` names the folder in messages.

    Raises:
        UserError: another job holds the folder.
    """
    if uri in _held:
        yield
        return
    me = Holder.this_process()
    number = _acquire(uri, what, me)
    _held.add(uri)
    done = threading.Event()
    thread = threading.Thread(target=_renew, args=(uri, what, me, number, done), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        _held.discard(uri)
        done.set()
        thread.join()
        with suppress(UserError):  # a full disk or a bucket that is gone: the lease ends by itself
            storage.delete_file(_path(uri, number))
        if not storage.is_s3(uri):
            with suppress(OSError):  # not empty
                Path(uri).rmdir()


def _path(uri: str, number: int) -> str:
    return storage.join(uri, f"lease-{number}.json")


def _acquire(uri: str, what: str, me: Holder) -> int:
    """Create the next lease on ``uri`` as ``me`` when the last one is free; returns its number."""
    while True:
        numbers = _numbers(uri)
        last = numbers[-1] if numbers else 0
        if last:
            _wait_until_dead(uri, what, last)
        if storage.write_bytes(_path(uri, last + 1), me.to_json(), if_absent=True):
            for number in numbers:
                storage.delete_file(_path(uri, number))
            return last + 1


def _numbers(uri: str) -> list[int]:
    """Numbers of the leases in the folder, ascending."""
    try:
        names = storage.list_files(uri, recursive=False)
    except storage.MissingFileError:
        return []
    return sorted(int(found[1]) for name in names if (found := NAME.fullmatch(name)))


def _wait_until_dead(uri: str, what: str, number: int) -> None:
    """Return once the lease ``number`` is free; raise ``UserError`` if its holder lives."""
    first, seen_at = _read(uri, number), time.monotonic()
    if first is None or first.is_running() is False:
        return
    refusal = UserError(
        f"{what} is in use by another job: {first}. Wait until it ends, or stop it; the lease of a job that was killed ends by "
        f"itself within {DEAD_S:.0f} s"
    )
    if first.is_running():
        raise refusal
    logger.warning("%s was in use by %s; waiting up to %.0f s to see whether it still runs", what, first, DEAD_S)
    while time.monotonic() - seen_at < DEAD_S:
        time.sleep(POLL_S)
        now = _read(uri, number)
        if now is None:
            return
        if now != first:
            raise refusal


def _read(uri: str, number: int) -> Holder | None:
    """The holder in the lease ``number``; None if the file is gone or is not ours."""
    with suppress(storage.MissingFileError, ValueError, TypeError):
        return Holder(**json.loads(storage.read_bytes(_path(uri, number))))
    return None


def _renew(uri: str, what: str, me: Holder, number: int, done: threading.Event) -> None:
    """Renew the lease until ``done``. Ends this process if another job has taken the folder over: it writes there now."""
    renewals = 0
    while not done.wait(RENEW_S):
        renewals += 1
        try:
            if storage.exists(_path(uri, number + 1)):
                logger.error("%s was taken over by another job, since this one did not answer for %.0f s", what, DEAD_S)
                os._exit(STATUS_FAILED)
            storage.write_bytes(_path(uri, number), me.to_json(renewals))
        except storage.FullDiskError:
            pass  # the run itself reports it; nobody else can take over a folder on a full disk
        except UserError as error:
            logger.warning("could not renew the lease on %s: %s", what, error)
