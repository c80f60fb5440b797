"""A child process for decoders that may crash: broken files make GDCM abort, which must not kill a Ray worker."""

import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO

import numpy as np
from numpy.typing import NDArray

from cmcgns.errors import BadRow

TIMEOUT_SECONDS = 60.0
_LENGTH = struct.Struct("<Q")
_ANSWER = struct.Struct("<BQQ")  # 0 and height, width, or 1 and the reason's length, 0
_IMAGE, _REASON = 0, 1


class IsolatedDecoder:
    """``module.function`` (bytes to a grey image) in a child process, started on first use and after each crash."""

    def __init__(self, module: str, function: str) -> None:
        self._target = (module, function)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        with self._lock:
            child = self._running_child()
            try:
                return _ask(child, data)
            except (OSError, EOFError, TimeoutError) as error:
                child.kill()
                child.wait()
                self._child = None
                raise BadRow(f"decoder crashed or hung on the film file ({type(error).__name__})") from None

    def _running_child(self) -> "subprocess.Popen[bytes]":
        # after a fork the pipes belong to the parent: each process needs its own child
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            self._child = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve(*{self._target!r})"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # decoders print warnings there
                env={**os.environ, "PYTHONPATH": path},
                bufsize=0,
            )
            self._owner = os.getpid()
        return self._child


def _ask(child: "subprocess.Popen[bytes]", data: bytes) -> NDArray[np.uint8]:
    assert child.stdin is not None
    assert child.stdout is not None
    deadline = time.monotonic() + TIMEOUT_SECONDS
    _write(child.stdin, _LENGTH.pack(len(data)))
    _write(child.stdin, data)
    kind, height, width = _ANSWER.unpack(_read(child.stdout, _ANSWER.size, deadline))
    if kind == _REASON:
        raise BadRow(_read(child.stdout, height, deadline).decode())
    return np.frombuffer(_read(child.stdout, height * width, deadline), dtype=np.uint8).reshape(height, width)


def _write(pipe: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[pipe.write(view) :]


def _read(pipe: IO[bytes], size: int, deadline: float | None = None) -> bytearray:
    """Exactly ``size`` bytes; an error if the other side has exited or is too slow."""
    data = bytearray()
    while len(data) < size:
        if deadline is not None and not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        piece = pipe.read(min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return data


def serve(module: str, function: str) -> None:
    """Main loop of the child: decode one file after another until the parent exits."""
    import importlib

    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a decoder prints must not mix with the answers
    decode: Callable[[bytes], NDArray[np.uint8]] = getattr(importlib.import_module(module), function)
    requests = os.fdopen(0, "rb", buffering=0)
    while True:
        try:
            (size,) = _LENGTH.unpack(_read(requests, _LENGTH.size))
        except EOFError:
            return
        data = bytes(_read(requests, size))
        try:
            grey_HW = np.ascontiguousarray(decode(data))
            head, body = _ANSWER.pack(_IMAGE, *grey_HW.shape), grey_HW.tobytes()
        except BadRow as error:
            body = str(error).encode()
            head = _ANSWER.pack(_REASON, len(body), 0)
        _write(answers, head)
        _write(answers, body)
