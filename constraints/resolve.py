"""Writes the constraints files beside it: each package of an installation with its version and the hashes of its files.

    make constraints      # the newest versions that pyproject.toml allows

| file | packages |
|---|---|
| build.txt | what builds packages from source: setuptools |
| cpu.txt | all of `.[cpu]` but torch, whose build is the machine's own |
| cuda.txt | torch as PyPI has it, with CUDA: what cpu.txt leaves out |
| gpu.txt | all of `.[gpu]`, torch included |
| gcp.txt, test.txt | what `.[gcp]` adds to cpu.txt, and `.[test]` to both |

uv resolves for Linux on x86_64 and Python 3.11 by PyPI's index; no file names an index.
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parent / "pyproject.toml"
PLATFORM = ("--python-version=3.11", "--python-platform=x86_64-manylinux_2_28")
# no settings of this machine; hashes of every file, so that another processor gets its own wheel
OPTIONS = ("--no-config", "--quiet", "--generate-hashes", "--no-annotate", "--no-header", "--no-emit-index-url")
CUDA = re.compile(r"torch|triton|nvidia-.*|cuda-.*")

Pins = dict[str, str]
"""Each package with its lines in a constraints file."""


def main(uv: str) -> None:
    """Resolve every installation with the versions of the first one, and write the files."""
    everything = resolve(uv, PROJECT, "--extra=cpu", "--extra=gcp", "--extra=test")
    same = HERE / "everything.txt"
    same.write_text("".join(everything.values()))
    try:
        with_cuda = resolve(uv, PROJECT, "--extra=cpu", f"--constraints={same}")
        with_gcp = resolve(uv, PROJECT, "--extra=cpu", "--extra=gcp", f"--constraints={same}")
        gpu = resolve(uv, PROJECT, "--extra=gpu", f"--constraints={same}")
    finally:
        same.unlink()
    cuda = {name: lines for name, lines in with_cuda.items() if CUDA.fullmatch(name)}
    cpu = without(with_cuda, cuda)
    gcp = without(with_gcp, with_cuda)
    write("build", {name: everything[name] for name in ("setuptools",)})
    write("cpu", cpu)
    write("cuda", cuda)
    write("gpu", gpu)
    write("gcp", gcp)
    write("test", without(without(everything, with_cuda), gcp))


def resolve(uv: str, *arguments: str | Path) -> Pins:
    """All packages that uv finds, by name."""
    command = [uv, "pip", "compile", *PLATFORM, *OPTIONS, *map(str, arguments)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    blocks = re.findall(r"^[^\s#].*\n(?:[ \t].*\n)*", found, re.MULTILINE)
    return {block.partition("==")[0]: block for block in blocks}


def without(pins: Pins, others: Pins) -> Pins:
    """Packages that the others do not have."""
    return {name: lines for name, lines in pins.items() if name not in others}


def write(name: str, pins: Pins) -> None:
    (HERE / f"{name}.txt").write_text("# Written by `make constraints`; do not edit.\n" + "".join(pins.values()))


if __name__ == "__main__":
    main(sys.argv[1])
