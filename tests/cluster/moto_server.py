"""A mock AWS: moto's server in its own process, stopped at the end."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.ranks import free_port

START_S = 120
REGION = "us-east-1"


@contextmanager
def running_moto(folder: Path, host: str = "127.0.0.1", bare: bool = False) -> Iterator[dict[str, str]]:
    """Environment for clients of a new, empty account; the server logs to ``folder``.

    A ``bare`` account has neither Amazon's managed policies nor its images, and is reset in milliseconds.
    """
    contents = {"MOTO_EC2_LOAD_DEFAULT_AMIS": "false"} if bare else {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}
    address = f"http://{host}:{(port := free_port())}"
    with (folder / "moto.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)],
            env=os.environ | contents,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_up(address, server, folder)
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.terminate()
        server.wait(20)


def _wait_until_up(address: str, server: subprocess.Popen[bytes], folder: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{address}/moto-api/", timeout=5):
            return
        time.sleep(0.1)
    raise RuntimeError(f"moto's server did not start: {(folder / 'moto.log').read_text()[-2000:]}")
