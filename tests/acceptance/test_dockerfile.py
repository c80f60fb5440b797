"""Every RUN line of cluster/Dockerfile, run in a clean environment on what the Dockerfile copies."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.dockerfile import arguments
from tests.cluster.files import CLUSTER
from tests.jobs import REPOSITORY

FILE = CLUSTER / "Dockerfile"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the Dockerfile copies, and a Python of its own that has nothing yet."""
    folder = tmp_path_factory.mktemp("image")
    for line in arguments(FILE, "COPY"):
        for name in line.split()[1:-1]:
            source = REPOSITORY / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / name)
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True)
    return folder


def test_each_line_runs(image: Path) -> None:
    environment = os.environ | {"PATH": f"{image / '.venv' / 'bin'}:{os.environ['PATH']}"}
    for line in arguments(FILE, "RUN"):
        if line.startswith("apt-get"):
            check_debian_packages(line)
            continue
        subprocess.run(["bash", "-euc", line], cwd=image, env=environment, check=True)
    built = list((image / ".venv" / "torch_extensions").rglob("*.so"))
    assert built, "DeepSpeed's op is not in the environment"
    said = subprocess.run(
        [image / ".venv" / "bin" / "python", "jobs/pretrain.py", "--print-config"],
        cwd=image, env=environment, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "phantom" in said


def check_debian_packages(line: str) -> None:
    """Assert that the distribution at hand has the packages of a line; installs none, for the line also empties its lists."""
    install = re.search(r"apt-get install (.*?)(?: &&|$)", line)
    assert install is not None
    packages = [word for word in install.group(1).split() if not word.startswith("-")]
    subprocess.run(["apt-get", "install", "--simulate", "--no-install-recommends", *packages], check=True)
