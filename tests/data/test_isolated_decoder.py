"""A decoder that crashes costs one film, not the process."""

import os
import signal
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from cmcgns.data import isolated_decoder as expendable
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
    return IsolatedDecoder(__name__, "moody")


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
    monkeypatch.setattr(expendable, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(BadRow, match="crashed or hung"):
        decode(b"hang")
    monkeypatch.undo()
    assert decode(b"film").tobytes() == b"film"


def test_the_child_exits_with_its_decoder(decode: IsolatedDecoder) -> None:
    decode(b"film")
    child = decode._child
    assert child is not None
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(10) == 0
