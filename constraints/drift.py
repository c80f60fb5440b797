"""What the newest versions that pyproject.toml allows would break: a fresh environment without constraints, and its tests.

    make drift            # by hand; some minutes to install, then test-quick

Prints each package that differs from the constraints files, and each direct dependency with a version beyond its bound.
Ends with the status of the tests. PYTEST_ADDOPTS chooses other tests.
"""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parent


def main(folder: Path) -> int:
    """Status of test-quick with the newest versions."""
    install(folder)
    installed = listed(folder)
    print_changes(pinned(), installed)
    print_held_back(folder)
    status = subprocess.run(["make", f"VENV={folder}", "test-quick"], cwd=REPOSITORY, check=False).returncode
    verdict = "pass" if status == 0 else "FAIL, with the changes above"
    print(f"tests {verdict}; environment: {folder}; `make constraints` adopts these versions")
    return status


def install(folder: Path) -> None:
    """A new environment, marked so that make takes it as it is."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip(folder, "install", "--quiet", "--no-compile", "-e", ".[test]")
    subprocess.run([folder / "bin" / "python", "-m", "cmcgns.train.build_ops"], cwd=REPOSITORY, check=True)
    for mark in (".ready", ".ready-test"):
        (folder / mark).touch()


def pip(folder: Path, *arguments: str) -> str:
    """What pip of the environment prints."""
    command = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout


def listed(folder: Path) -> dict[str, str]:
    """Versions in the environment."""
    return {normal(p["name"]): p["version"] for p in json.loads(pip(folder, "list", "--format=json"))}


def pinned() -> dict[str, str]:
    """Versions in the constraints files of a CPU environment."""
    text = "".join((HERE / f"{name}.txt").read_text() for name in ("cpu", "gcp", "test"))
    return dict(re.findall(r"^([^\s#=]+)==(\S+)", text, re.MULTILINE))


def print_changes(before: dict[str, str], after: dict[str, str]) -> None:
    """A line for each package that is new, gone or of another version; torch, pip and this package have no pin."""
    for name in sorted((before.keys() | after.keys()) - {"cmcgns", "pip", "torch"}):
        if before.get(name) != after.get(name):
            print(f"{name}: {before.get(name, 'none')} -> {after.get(name, 'none')}")


def print_held_back(folder: Path) -> None:
    """A line for each direct dependency whose bound excludes the newest version."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    direct = {normal(re.split(r"[\[<>=!~ ]", requirement)[0]) for requirement in wanted}
    for package in json.loads(pip(folder, "list", "--outdated", "--format=json")):
        if normal(package["name"]) in direct:
            print(f"{package['name']}: {package['latest_version']} is beyond the bound of pyproject.toml")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
