"""SIGTERM handled as Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class SigtermHandler:
    """Raises SIGINT for the first SIGTERM; ``received`` is true once one has arrived.

    Later ones do nothing: `timeout` sends two, Slurm another one at the time limit, and a second Ctrl-C would end without saving.
    """

    received = False

    def __call__(self, signum: int, frame: Any) -> None:
        if self.received:
            return
        self.received = True
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job that a script has started with `&`
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[SigtermHandler]:
    """Handle SIGTERM as Ctrl-C until the block ends. A job inside another one shares its handler.

    Call it after ``ray.init``, which installs a handler that ends the process.
    """
    before = signal.getsignal(signal.SIGTERM)
    if isinstance(before, SigtermHandler):
        yield before
        return
    handler = SigtermHandler()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may install one
        yield handler
        return
    signal.signal(signal.SIGTERM, handler)
    try:
        yield handler
    finally:
        signal.signal(signal.SIGTERM, before)
