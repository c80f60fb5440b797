"""Notices that the cluster's head is lost. Ray then ends a driver within a minute, without an error that it could catch."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

CHECK_S, LOST_S = 3.0, 40.0
"""Less than the 60 s after which Ray ends the driver (RAY_gcs_rpc_server_reconnect_timeout_s)."""


@contextmanager
def watch_head(lost: Callable[[str], None]) -> Iterator[None]:
    """Within the block, ``lost`` is called with a message, in a thread, once the head has refused connections for ``LOST_S``."""
    done = threading.Event()
    address = ray.get_runtime_context().gcs_address
    thread = threading.Thread(target=_watch, args=(address, lost, done), name="head-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def _watch(address: str, lost: Callable[[str], None], done: threading.Event) -> None:
    host, port = address.rsplit(":", 1)
    seen = time.monotonic()
    while not done.wait(CHECK_S):
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CHECK_S).close()
            seen = time.monotonic()
        except OSError as error:
            silent_s = time.monotonic() - seen
            if silent_s >= LOST_S and not done.is_set():
                lost(
                    f"Ray's head at {address} has not answered for {silent_s:.0f} s ({error}): its process (GCS) was killed, or "
                    "the machine or the network between is gone"
                )
                return
