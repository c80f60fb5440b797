"""SIGTERM as Ctrl-C: how Slurm, Kubernetes, `docker stop` and `timeout` end a job."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class SigtermHandler:
    """Handles SIGTERM as Ctrl-C; ``came`` tells whether one has come."""

    came = False

    def __call__(self, signum: int, frame: Any) -> None:
        self.came = True
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job that a script has started with `&`
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[SigtermHandler]:
    """The handler of SIGTERM until the block ends; a job inside of another one has that one's. Call it after ``ray.init``, which
    sets a handler that ends the process."""
    before = signal.getsignal(signal.SIGTERM)
    if isinstance(before, SigtermHandler):
        yield before
        return
    handler = SigtermHandler()
    if threading.current_thread() is not threading.main_thread():  # Python allows no handler there
        yield handler
        return
    signal.signal(signal.SIGTERM, handler)
    try:
        yield handler
    finally:
        signal.signal(signal.SIGTERM, before)
