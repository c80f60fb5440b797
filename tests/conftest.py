"""Fixtures that more than one folder of tests needs."""

import os
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# before torch: on a shared machine its threads spend more time waiting for each other than computing
os.environ.setdefault("OMP_NUM_THREADS", "1")
# else a thread that outlives its Ray and asks for something starts another one, beside that of the next test: the end of pytest
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
# Ray reads these once in each process, and this one is a driver of several clusters in turn
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from tests.ray_head import RayHead, connected, running_head
from tests.s3 import S3Server, running_server

ARGV = list(sys.argv)
STARTING = {"ray", "s3", "distributed", "cluster"}
"""Markers of tests that start clusters, servers or ranks."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start clusters, servers or ranks first: the quick ones fill what the last of them leaves of two processes."""
    long = {item.path for item in items if any(mark.name in STARTING for mark in item.iter_markers())}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cmcgns` changes sys.argv, by which messages name the command; also in fixtures of a module."""
    monkeypatch.setattr(sys, "argv", list(ARGV))


@pytest.fixture(autouse=True)
def own_signal_handlers() -> Iterator[None]:
    """Ray Train's `fit` leaves a handler of SIGINT behind that calls its controller, which is gone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        if handler is not None:  # None: installed by C
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The one S3 server of this session; its endpoint and keys are in the environment."""
    with running_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_REGION"):
            patch.delenv(name, raising=False)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own, without settings for Ray's token."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def local_folder(variable: str, name: str) -> Path:
    """A folder of real data outside the repository; skips where it is not at hand."""
    folder = Path(os.environ.get(variable) or Path(__file__).parents[2] / "shared" / name)
    if not folder.is_dir():
        pytest.skip(f"no real data: set {variable}, or put them at ../shared/{name}")
    return folder


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Real films and reports for local tests; skips where they are not at hand."""
    return local_folder("CMCGNS_REALDATA", "realdata")


@pytest.fixture(scope="session")
def cases() -> Path:
    """Small sets after public bug reports, each with what is right; skips where they are not at hand."""
    return local_folder("CMCGNS_CASES", "cases") / "data"


@pytest.fixture(scope="session")
def openi() -> Path:
    """A few thousand real films with their reports and findings by hand, as a pairs.csv; skips where they are not at hand."""
    return local_folder("CMCGNS_OPENI", "openi")


@pytest.fixture(scope="session")
def nih128() -> Path:
    """Ten thousand real films with labels, as a labels.csv; skips where they are not at hand."""
    return local_folder("CMCGNS_NIH128", "nih128")


@pytest.fixture(scope="session")
def lungmasks() -> Path:
    """Some hundred real films with lung masks, as a masked.csv; skips where they are not at hand."""
    return local_folder("CMCGNS_LUNGMASKS", "lungmasks")


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """The one Ray cluster of this session that jobs are sent to."""
    with running_head() as head:
        yield head


@pytest.fixture(scope="module")
def local_ray(ray_head: RayHead) -> Iterator[None]:
    """This process is a driver of ``ray_head`` until the module ends."""
    with connected(ray_head):
        yield
