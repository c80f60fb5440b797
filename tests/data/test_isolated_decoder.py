"""A decoder that crashes costs one film, not the process."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from cmcgns.data import isolated_decoder
from cmcgns.data.isolated_decoder import IsolatedDecoder
from cmcgns.errors import BadRow


def moody(data: bytes) -> NDArray[np.uint8]:
    """A decoder that does what the file says."""
    if data == b"abort":
        os.kill(os.getpid(), signal.SIGABRT)
    if data == b"hang":
        time.sleep(60)
    if data == b"refuse":
        raise BadRow("not a film, says the decoder")
    if data == b"chatter":
        os.write(1, b"decoders print to stdout\n")
    return np.frombuffer(data, np.uint8).reshape(1, -1)


@pytest.fixture
def decode() -> IsolatedDecoder:
    return IsolatedDecoder(moody)


def test_films_and_reasons_are_returned(decode: IsolatedDecoder) -> None:
    big = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8)
    assert np.array_equal(decode(big.tobytes())[0], big)
    assert decode(b"chatter").tobytes() == b"chatter"
    with pytest.raises(BadRow, match="says the decoder"):
        decode(b"refuse")
    assert decode(b"film").shape == (1, 4)


def test_a_crash_costs_one_film(decode: IsolatedDecoder) -> None:
    with pytest.raises(BadRow, match="crashed or hung"):
        decode(b"abort")
    assert decode(b"film").tobytes() == b"film"


def test_a_decoder_that_hangs_is_killed(decode: IsolatedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    decode(b"film")
    monkeypatch.setattr(isolated_decoder, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(BadRow, match="crashed or hung"):
        decode(b"hang")
    monkeypatch.undo()
    assert decode(b"film").tobytes() == b"film"


def test_no_child_outlives_a_process_that_has_decoded() -> None:
    code = (
        "import os, psutil; from tests.data.test_isolated_decoder import IsolatedDecoder, moody; "
        "IsolatedDecoder(moody)(b'film'); print(*[c.pid for c in psutil.Process().children(recursive=True)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    children = [int(pid) for pid in done.stdout.split()]
    assert children
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in children if psutil.pid_exists(pid)], timeout=10)
    assert not alive
