"""A real S3 server for tests: Ceph's gateway on loopback, installed once into a cache folder, gone at the end."""

import fcntl
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

SCRIPT = Path(__file__).with_name("s3_server.sh")
CACHE = Path(__file__).parents[1] / ".cache" / "ceph"


@dataclass(frozen=True)
class S3Server:
    """A running server; ``environment`` is what a client needs."""

    folder: Path
    environment: dict[str, str]

    @property
    def endpoint(self) -> str:
        return self.environment["AWS_ENDPOINT_URL"]

    def client(self) -> Any:
        """A boto3 client of this server, whatever the environment says by now."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )

    def make_bucket(self, name: str) -> str:
        """The URI of a new, empty bucket."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def upload(self, folder: Path, uri: str) -> int:
        """Put every file under ``folder`` below ``uri``; the number of files."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        client, files = self.client(), sorted(path for path in folder.rglob("*") if path.is_file())

        def put(path: Path) -> None:
            key = "/".join(part for part in (prefix.rstrip("/"), path.relative_to(folder).as_posix()) if part)
            client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(put, files))
        return len(files)

    def gets(self, prefix: str, until: float | None = None) -> int:
        """How many times an object under ``BUCKET[/KEY...]`` was read (``until`` a time), by the server's own log."""
        # the log's lines begin with their time, so that lines compare as times do
        last = "9" if until is None else datetime.fromtimestamp(until, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
        # an object's address has a key; a listing has the bucket alone and a query
        wanted = re.compile(rf'"GET /{re.escape(quote(prefix.strip("/")))}[^ ?"]* HTTP/[0-9.]+" (?:200|206) ')
        listing = re.compile(r'"GET /[^/ ]*/? ')
        lines = (line for line in self._settled_log().splitlines() if line < last)
        return sum(1 for line in lines if wanted.search(line) and not listing.search(line))

    def _settled_log(self) -> str:
        """The request log once nothing has been added for a moment: it is written behind the requests."""
        log = self.folder / "log" / "client.rgw.s3.log"
        size, text = -1, ""
        while size != len(text):
            size = len(text)
            time.sleep(0.3)
            text = log.read_text(errors="replace")
        return text


@contextmanager
def running_server(folder: Path, address: str = "127.0.0.1") -> Iterator[S3Server]:
    """A server on ``address`` whose state lies in ``folder``; skips the test where none can be installed."""
    root = install()
    environment = {**os.environ, "CEPH_ROOT": str(root), "S3_ADDRESS": address}
    started = subprocess.run([SCRIPT, "start", folder], env=environment, capture_output=True, text=True, check=False)
    try:
        if started.returncode:
            pytest.fail(f"the S3 server did not start: {started.stderr.strip()[-400:]}")
        printed = dict(line.split("=", 1) for line in started.stdout.splitlines() if "=" in line)
        yield S3Server(folder, _client_environment(printed))
    finally:
        subprocess.run([SCRIPT, "destroy", folder], env=environment, capture_output=True, check=False)


def _client_environment(printed: dict[str, str]) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": printed["S3_ENDPOINT"],
        "AWS_ACCESS_KEY_ID": printed["S3_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": printed["S3_SECRET_KEY"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": printed["AWS_REQUEST_CHECKSUM_CALCULATION"],
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def install() -> Path:
    """The folder of the unpacked server; ``CMCGNS_S3_CACHE`` names another than ``.cache/ceph``."""
    root = Path(os.environ.get("CMCGNS_S3_CACHE") or CACHE)
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:  # another process of the tests may be unpacking it
        fcntl.flock(lock, fcntl.LOCK_EX)
        _install(root)
    return root


def _install(root: Path) -> None:
    if (root / ".complete").exists():
        return
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("the S3 server comes from Debian packages, and apt-get is not here")
    installed = subprocess.run([SCRIPT, "install", root], capture_output=True, text=True, check=False)
    if installed.returncode:
        if os.geteuid() != 0:
            pytest.skip("the S3 server's packages are not known to apt-get, and only root may run apt-get update")
        subprocess.run(["apt-get", "-q", "update"], capture_output=True, check=False)
        installed = subprocess.run([SCRIPT, "install", root], capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"the S3 server cannot be installed: {installed.stderr.strip()[-300:]}")
