"""The wheel: every file of the package, the command, a light core; and it works where the extras are not installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.jobs import REPOSITORY
from tests.library.conftest import run as run  # a run folder
from tests.library.core import WITHOUT_EXTRAS
from tests.report.test_report import write_run

HEAVY = {
    "ray",
    "deepspeed",
    "faiss-cpu",
    "faiss-gpu",
    "pandas",
    "scikit-learn",
    "optuna",
    "tensorboard",
    "torchmetrics",
}


def test_a_folder_called_like_the_package_does_not_hide_it(tmp_path: Path) -> None:
    """A script beside the clone finds the editable installation, not an empty package of that folder."""
    (tmp_path / "cmcgns").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "import cmcgns; print(cmcgns.__version__)"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.stdout.strip() == "0.1.0", done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves files beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPOSITORY / "cmcgns", source / "cmcgns", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
    ]
    done = subprocess.run([sys.executable, *command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = out.glob("cmcgns-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def python(installed: Path, script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The script with the wheel's package and the core's dependencies alone."""
    return subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_EXTRAS + script, *arguments], capture_output=True, text=True, timeout=300,
        cwd=installed.parent, env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    package = REPOSITORY / "cmcgns"
    files = {
        path.relative_to(REPOSITORY).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"cmcgns/py.typed", "cmcgns/recipes/phantom.yaml", "cmcgns/library/prompts.yaml"} <= files
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == files


def test_the_core_is_light_and_the_extras_bring_the_rest(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (each for each in archive.namelist() if each.endswith("/METADATA"))
    wanted = [Requirement(line) for line in message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])]
    core = {each.name for each in wanted if each.marker is None}
    assert {"torch", "transformers", "pydicom", "psutil", "jinja2"} <= core
    assert not core & HEAVY
    assert "cmcgns = cmcgns.commands:main" in archive.read(name.replace("METADATA", "entry_points.txt")).decode()


def test_the_core_writes_reports_and_exports_and_loads_models(installed: Path, run: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "trained")
    script = f"""
import cmcgns, cmcgns.commands
assert cmcgns.__file__.startswith({str(installed)!r})
assert cmcgns.commands.main(["report", {str(folder)!r}]) == 0
assert cmcgns.commands.main(["export", {str(run)!r}, {str(tmp_path / "out")!r}]) == 0
print(cmcgns.load({str(tmp_path / "out")!r}).embed_reports(["No effusion is seen."]).shape)
"""
    done = python(installed, script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pandas is not installed: pip install" in (folder / "report.html").read_text()  # to read the run's corpus
    assert done.stdout.splitlines() == [f"{folder}/report.html", str(tmp_path / "out"), "(1, 32)"]


@pytest.mark.parametrize(
    "words", [("pretrain", "--config=phantom-tiny"), ("evaluate", "--evaluate.run=x"), ("kmeans", "--data.uri=x")]
)
def test_a_job_without_its_extra_has_one_message(installed: Path, words: tuple[str, ...], tmp_path: Path) -> None:
    script = f"from cmcgns.commands import main; sys.exit(main([*{list(words)!r}, '--run.storage={tmp_path}']))"
    done = python(installed, script)
    assert done.returncode == 2, done.stdout + done.stderr[-3000:]
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {words[0]} needs ")
    assert done.stderr.endswith(" is not installed: pip install 'cmcgns[cpu]', or 'cmcgns[gpu]' with CUDA\n")
