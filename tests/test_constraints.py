"""Installation by constraints/: complete, within the bounds of pyproject.toml, and refused if a file is another one."""

import itertools
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from constraints import drift
from tests.cluster.dockerfile import arguments
from tests.cluster.files import CLUSTER, CONTAINERS, load
from tests.jobs import REPOSITORY

FILES = ("build", "cpu", "cuda", "gpu", "gcp", "test")
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
INSTALLATIONS = [
    ("build", tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["build-system"]["requires"]),
    ("cpu cuda", [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["cpu"]]),
    ("gpu", [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["gpu"]]),
    ("cpu cuda gcp", EXTRAS["gcp"]),
    ("cpu cuda gcp test", EXTRAS["test"]),
]


def lines(names: str) -> str:
    """Text of some constraints files."""
    return "".join((REPOSITORY / "constraints" / f"{name}.txt").read_text() for name in names.split())


def pins(names: str) -> dict[str, str]:
    """Versions in some constraints files; no package twice."""
    found = re.findall(r"^([^\s#=]+)==(\S+)", lines(names), re.MULTILINE)
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize(("names", "requirements"), INSTALLATIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_each_direct_dependency_is_pinned_within_its_bounds(names: str, requirements: list[str]) -> None:
    versions = pins(names)
    for requirement in map(Requirement, requirements):
        if requirement.name != PROJECT["name"]:
            assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("name", FILES)
def test_every_pin_has_hashes_and_no_file_names_an_index_or_an_address(name: str) -> None:
    entries = lines(name).replace("\\\n", "").splitlines()[1:]
    assert entries
    assert [e for e in entries if not re.fullmatch(r"[a-z0-9.-]+==[\w.]+ (\s*--hash=sha256:[0-9a-f]{64})+", e)] == []


def test_the_machines_own_torch_is_not_hashed_and_the_gpus_is() -> None:
    assert "torch" not in pins("cpu gcp test")
    assert pins("cuda")["torch"] == pins("gpu")["torch"]


def test_gpu_and_cpu_machines_of_one_cluster_have_the_same_versions() -> None:
    cpu, gpu = pins("cpu cuda"), pins("gpu")
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == set()
    assert cpu.keys() - gpu.keys() == {"faiss-cpu"}


def test_every_direct_dependency_has_an_upper_bound() -> None:
    wanted = [*PROJECT["dependencies"], *(requirement for extra in EXTRAS.values() for requirement in extra)]
    open_ended = [r for r in map(Requirement, wanted) if not any(s.operator in ("<", "<=", "==") for s in r.specifier)]
    assert [r.name for r in open_ended if r.name != PROJECT["name"]] == []


def installs() -> dict[str, list[str]]:
    """Each `pip install` of the cluster files, the Dockerfile and the Makefile's environment, by where it stands."""
    commands = {name: load(name)["setup_commands"] + load(name).get("head_setup_commands", []) for name in CONTAINERS}
    commands["Dockerfile"] = [part for line in arguments(CLUSTER / "Dockerfile", "RUN") for part in line.split("&&")]
    found = {
        where: [c.partition("&& ")[2] or c for c in given if "pip install" in c] for where, given in commands.items()
    }
    return {where: [command.strip() for command in given] for where, given in found.items()}


@pytest.mark.parametrize("faiss", ["cpu", "gpu"])
@pytest.mark.parametrize("where", [*CONTAINERS, "Dockerfile"])
def test_a_node_that_starts_later_cannot_get_other_versions(where: str, faiss: str) -> None:
    given = [shlex.split(command.replace("${FAISS}", faiss)) for command in installs()[where]]
    assert len(given) >= 3
    for words in given:
        named = [file for option, file in itertools.pairwise(words) if option == "-r"]
        assert "--no-deps" in words, words  # nothing is resolved
        assert "--require-hashes" in words or words[-1] == ".", words
        assert all((REPOSITORY / file).exists() for file in named)
        # what is built from source finds setuptools of build.txt
        assert "--no-build-isolation" in words or named in (["constraints/build.txt"], ["constraints/gcp.txt"])


@pytest.mark.parametrize("where", [*CONTAINERS, "Dockerfile"])
def test_a_package_swapped_at_the_index_is_not_installed(where: str, tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    wheel(index, "setuptools", pins("build")["setuptools"])
    first = shlex.split(installs()[where][0])
    assert first[:2] == ["pip", "install"]
    offline = ["--no-index", f"--find-links={index}", f"--target={tmp_path / 'node'}", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", *first[1:], *offline]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "node").exists()


def wheel(folder: Path, name: str, version: str) -> None:
    """A wheel of this name and version that someone else made."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('swapped')\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


def test_drift_prints_what_is_new_gone_or_changed(capsys: pytest.CaptureFixture[str]) -> None:
    drift.print_changes(
        {"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1", "torch": "2.13.0+cpu", "pip": "1"}
    )
    assert capsys.readouterr().out == "b: 1 -> 2\nc: 1 -> none\nd: none -> 1\n"
