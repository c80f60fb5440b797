"""Every RUN line of cluster/Dockerfile, run in a clean environment on what the Dockerfile copies; with either FAISS."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.dockerfile import arguments
from tests.cluster.files import CLUSTER
from tests.jobs import REPOSITORY

FILE = CLUSTER / "Dockerfile"
USE = """
from importlib.metadata import version
import torch
from cmcgns.errors import UserError
from cmcgns.faiss_install import is_installed, load_faiss
[own] = [name for name in ("faiss-cpu", "faiss-gpu") if is_installed(name)]
print(own, version("torch"), version(own))
load_faiss("cpu")
try:
    load_faiss("gpu")
except UserError as error:
    print("no-GPU-here" if "sees no GPU here" in str(error) else "needs-faiss-gpu")
"""
GPU_ANSWER = {"cpu": ["needs-faiss-gpu"], "gpu": ["no-GPU-here"]}
"""What ``clustering.device=gpu`` says on a machine without a GPU: the GPU build loads, and finds none."""


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """A folder with what the Dockerfile copies, and a Python of its own that has nothing yet."""
    folder = tmp_path / "image"
    folder.mkdir()
    for line in arguments(FILE, "COPY"):
        for name in line.split()[1:-1]:
            source = REPOSITORY / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / name)
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True)
    yield folder
    shutil.rmtree(folder)  # some GB


@pytest.mark.parametrize("faiss", ["cpu", "gpu"])
def test_each_line_runs(image: Path, faiss: str) -> None:
    environment = os.environ | {"PATH": f"{image / '.venv' / 'bin'}:{os.environ['PATH']}", "FAISS": faiss}
    assert "FAISS=cpu" in arguments(FILE, "ARG")
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
    installed = subprocess.run(
        [image / ".venv" / "bin" / "python", "-c", USE], env=environment, check=True, capture_output=True, text=True
    )
    assert installed.stdout.split() == [f"faiss-{faiss}", locked("torch"), locked(f"faiss-{faiss}"), *GPU_ANSWER[faiss]]


def locked(name: str) -> str:
    """The version in the constraints."""
    texts = "".join((REPOSITORY / "constraints" / f"{each}.txt").read_text() for each in ("cpu", "cuda", "gpu"))
    found = set(re.findall(rf"^{name}==(\S+)", texts, re.MULTILINE))
    assert len(found) == 1
    return found.pop()


def check_debian_packages(line: str) -> None:
    """Assert that the distribution at hand has the packages of a line; installs none, for the line also empties its lists."""
    install = re.search(r"apt-get install (.*?)(?: &&|$)", line)
    assert install is not None
    packages = [word for word in install.group(1).split() if not word.startswith("-")]
    subprocess.run(["apt-get", "install", "--simulate", "--no-install-recommends", *packages], check=True)
