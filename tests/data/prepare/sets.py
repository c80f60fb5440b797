"""Prepared sets for tests: making and reading them."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cmcgns import storage
from cmcgns.cli import load_config
from cmcgns.data.manifest import read_manifest
from cmcgns.data.prepare.config import PrepareJobConfig
from cmcgns.data.prepare.run import prepare
from cmcgns.storage import parquet
from tests.jobs import REPOSITORY

STUDIES, SIZE, GROUP = 150, 96, 16


def settings(raw: Path, out: Path | str, *more: str) -> list[str]:
    """Settings to prepare ``raw`` at ``out``."""
    return [
        f"--data.uri={raw}", f"--prepare.out={out}", f"--prepare.image_size={SIZE}", "--data.max_bad_fraction=0.1",
        "--prepare.encoding=png", *more,
    ]  # fmt: skip


def prepare_here(raw: Path, out: Path | str, *more: str) -> int:
    """Run the job in this process, on its Ray."""
    arguments = [f"--data.group_studies={GROUP}", *settings(raw, out, *more)]
    return prepare(load_config(arguments, PrepareJobConfig, None))


def command(*settings: str) -> list[str]:
    """``jobs/prepare.py`` with small groups."""
    return [sys.executable, str(REPOSITORY / "jobs" / "prepare.py"), f"--data.group_studies={GROUP}", *settings]


def run(*settings: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Run the job in its own process."""
    return subprocess.run(command(*settings), cwd=cwd, capture_output=True, text=True, check=False)


def kill_when(condition: Callable[[], bool], *settings: str) -> bool:
    """Start the job and kill its process group by -9 once ``condition`` holds; False if it ended before."""
    process = subprocess.Popen(
        command(*settings), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and not condition():
        time.sleep(0.01)
    killed = process.poll() is None
    if killed:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return killed


def files(uri: str) -> list[str]:
    """Every file of the set; empty if there is none."""
    try:
        return storage.list_files(uri)
    except storage.MissingFileError:
        return []


def shards(uri: str) -> list[str]:
    """The shards of the set."""
    return [name for name in files(uri) if name.endswith(".parquet") and not name.startswith(".")]


def rows(uri: str) -> list[dict[str, Any]]:
    """All rows in the order of the manifest."""
    tables = [parquet.read(storage.join(uri, shard.name), pq.ParquetFile.read) for shard in read_manifest(uri).shards]
    found: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return found


def fingerprint(uri: str) -> str:
    """Hash of all values of all rows, computed the slow way."""
    digest = hashlib.sha256()
    for row in rows(uri):
        digest.update(repr(sorted(row.items())).encode())
    return digest.hexdigest()
