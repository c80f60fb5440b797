"""Times and memory, measured so that they can be compared: interleaved in one run, medians, a process of its own."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    measured: str
    wanted: str = ""
    good: bool | None = None

    def __str__(self) -> str:
        verdict = {None: "", True: "yes", False: "NO"}[self.good]
        return f"{self.what:58} {self.measured:>34}  {self.wanted:>10}  {verdict}".rstrip()


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each run by name, taken in turn so that a busy machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warm_up + rounds):
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - before)
    return seconds


def ratio_of_medians(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """How many times as long ``name`` takes as ``base``."""
    return median(seconds[name]) / median(seconds[base])


def peak_mib(run: Callable[[], object]) -> float:
    """How far the memory of this process rises above where it stands while ``run`` runs, MiB (Linux)."""
    before = _status("VmRSS")
    return highest_mib(run) - before / 1024


def peak_in_child(module: str, build: str) -> float:
    """Peak MiB of weights, features, activations and gradients of the function that ``build``, code in the names of ``module``,
    returns, in a process that has done nothing else."""
    code = (
        f"import torch; from tests.benchmarks.measure import peak_mib; from {module} import *; "
        f"torch.ones(64, 64) @ torch.ones(64, 64); print(peak_mib(lambda: [step() for step in [{build}] for _ in range(3)]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return float(output.splitlines()[-1])


def highest_mib(run: Callable[[], object]) -> float:
    """The most memory of this process while ``run`` runs, MiB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run()
    return _status("VmHWM") / 1024


def _status(name: str) -> int:
    """A line of /proc/self/status, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def where() -> str:
    """Machine, versions, commit and date, without which a number means nothing."""
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return (
        f"{os.cpu_count()} x {model}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"commit {commit()}, {time.strftime('%Y-%m-%d')}"
    )


def commit() -> str:
    """What git says of the sources; `unknown` where there is no git, or no repository."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return "unknown"
    return said.strip() or "unknown"
