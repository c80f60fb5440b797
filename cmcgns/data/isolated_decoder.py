"""A child process for decoders that may crash, hang or take all memory: a broken or hostile file must not kill a Ray worker."""

import os
import resource
import sys
import threading
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import ModuleType
from typing import Generic, TypeVar

import psutil
from pebble import ProcessExpired, ProcessPool

from cmcgns.errors import BadRow

TIMEOUT_SECONDS = 60.0
MEMORY_BYTES = 2 * 2**30
"""What the child may allocate for a film: enough for the largest that is accepted, in its decoder's widest format."""

Result = TypeVar("Result")


class IsolatedDecoder(Generic[Result]):
    """``decode`` (bytes to a grey image, perhaps with notes) in a child process, started on first use and after each crash."""

    def __init__(self, decode: Callable[[bytes], Result]) -> None:
        self._decode = decode
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None
        self._owner = 0

    def __call__(self, data: bytes) -> Result:
        with self._lock:
            task = self._running_pool().schedule(self._decode, (data,), timeout=TIMEOUT_SECONDS)
            try:
                result: Result = task.result()
                return result
            except (ProcessExpired, TimeoutError) as error:
                raise BadRow(f"decoder crashed or hung on the film file ({type(error).__name__})") from None

    def _running_pool(self) -> ProcessPool:
        # after a fork the pool belongs to the parent: each process needs its own
        if self._pool is None or self._owner != os.getpid():
            # not fork: Ray's workers have many threads
            self._pool, self._owner = (
                ProcessPool(max_workers=1, initializer=_prepare_child, context=_Context()),
                os.getpid(),
            )
        return self._pool


class _Process(ForkServerProcess):
    """A child that does not import the parent's main script: one without a guard would run again in it.

    While it starts, other threads of the parent see an empty `__main__`.
    """

    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _Context(ForkServerContext):
    Process = _Process


def _prepare_child() -> None:
    """Limit the child's memory, and print nothing: decoders print warnings."""
    limit = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
