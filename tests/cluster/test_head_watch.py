"""A head that refuses connections is reported once, and one that comes back in time is not."""

import socket
import threading
import time

import pytest

from cmcgns.cluster import head_watch


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_watch, "CHECK_S", 0.05)
    monkeypatch.setattr(head_watch, "LOST_S", 1.0)


def watched(gone_s: float) -> list[str]:
    """What is said of a head that listens, is gone for ``gone_s``, and listens again for a while."""
    head, said, done = socket.create_server(("127.0.0.1", 0)), [], threading.Event()
    address = head.getsockname()
    where = f"{address[0]}:{address[1]}"
    thread = threading.Thread(target=head_watch._watch, args=(where, said.append, done))
    thread.start()
    time.sleep(0.2)
    head.close()
    time.sleep(gone_s)
    with socket.create_server(address):
        time.sleep(0.3)
        done.set()
        thread.join()
    return said


def test_a_head_that_is_gone_for_too_long_is_reported_once_with_its_address() -> None:
    [message] = watched(2.0)
    assert message.startswith("Ray's head at 127.0.0.1:")
    assert "Connection refused" in message


def test_a_head_that_comes_back_in_time_is_not_reported() -> None:
    assert watched(0.3) == []
