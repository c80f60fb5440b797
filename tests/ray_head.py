"""A Ray cluster of one machine for tests: own ports, own folder, own token, and gone at the end."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.ranks import free_port

START_S = 90
MIB = 2**20


@dataclass(frozen=True)
class RayHead:
    """A running cluster; ``environment`` is what its drivers and ``ray job submit`` need."""

    folder: Path
    dashboard: str
    """Address of the dashboard, which is also where jobs are submitted."""
    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    def processes(self) -> list[psutil.Process]:
        """Every process of the cluster: ``ray start``, what it started, and what that started."""
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def node_ip() -> str:
    """The address under which Ray knows this machine: it takes no loopback for an answer."""
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


@contextmanager
def running_head(cpus: int = 2, object_store_mib: int = 400) -> Iterator[RayHead]:
    """``ray start --head`` in a folder of its own; only the processes it made are ended."""
    # short: Ray puts sockets into it, whose paths may have 107 letters
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    port, dashboard_port = free_port(), free_port()
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": f"{node_ip()}:{port}",
        # jobs of the cluster say `python`: let it be the one that runs the tests
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(
            [
                Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats",
                f"--num-cpus={cpus}", f"--object-store-memory={object_store_mib * MIB}",
                f"--port={port}", f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={free_port()}",
                f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}/r",
            ],
            env={**os.environ, **own} | {"RAY_ADDRESS": ""},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    head = RayHead(folder, f"http://127.0.0.1:{dashboard_port}", process, own)
    try:
        _wait_until_up(head)
        yield head
    finally:
        stop(head)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_up(head: RayHead) -> None:
    request = urllib.request.Request(
        f"{head.dashboard}/api/version", headers={"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    )
    end = time.monotonic() + START_S
    while time.monotonic() < end and head.process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            json.load(answer)
            return
        time.sleep(0.2)
    raise RuntimeError(f"Ray did not start: {(head.folder / 'start.log').read_text()[-2000:]}")


def stop(head: RayHead) -> None:
    """End the cluster's processes, those alone: first asked, then killed."""
    owned = head.processes()
    for process in owned:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(owned, timeout=8)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=5)
    head.process.wait()
