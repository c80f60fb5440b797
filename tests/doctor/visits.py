"""Drivers of a cluster, one process each: the doctor and the main job."""

import os
import subprocess
import sys
from pathlib import Path

from tests.jobs import REPOSITORY, TINY
from tests.ray_head import RayHead


def run(head: RayHead, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of our programs as a driver of the cluster."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env={**os.environ, **head.environment, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def doctor(head: RayHead, storage: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = ("-m", "cmcgns.doctor", f"--run.storage={storage}", "--doctor.megabytes=4", *words)
    return run(head, *words, **environment)


def pretrain(head: RayHead, storage: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = ("jobs/pretrain.py", f"--config={TINY}", f"--run.storage={storage}", *words)
    return run(head, *words, **environment)
