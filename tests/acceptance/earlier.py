"""The package as it was at an earlier commit, for tests that compare with it."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.jobs import REPOSITORY

PACKAGES = "packages"


@contextmanager
def working_tree(commit: str, folder: Path) -> Iterator[Path]:
    """A working tree of ``commit`` in ``folder``; skips where this clone does not have it."""
    tree = folder / "tree"
    git = ["git", "-C", str(REPOSITORY)]
    if subprocess.run([*git, "cat-file", "-e", commit], check=False, capture_output=True).returncode:
        pytest.skip(f"the commit {commit[:7]} is not in this clone")
    subprocess.run([*git, "worktree", "add", "--detach", str(tree), commit], check=True, capture_output=True)
    try:
        install_missing(tree)
        yield tree
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True, capture_output=True)


def environment(tree: Path) -> dict[str, str]:
    """Environment variables with which Python imports the package from ``tree``."""
    return os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree.parent / PACKAGES}"}


def install_missing(tree: Path) -> None:
    """Install beside ``tree`` what it depends on and this environment no longer has."""
    wanted = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["dependencies"]
    missing = [each for each in wanted if not is_installed(Requirement(each).name)]
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tree.parent / PACKAGES)]
        subprocess.run([*pip, *missing], check=True)


def is_installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
