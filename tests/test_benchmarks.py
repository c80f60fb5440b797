"""What `make test` holds of the benchmarks: the GPU table without our packages, and scaling on paper. No time is asserted."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmcgns import methods
from cmcgns.data.batch import Batcher
from cmcgns.train.steps import Cursor, StepReader
from tests.benchmarks import heads, method_heads, scaling, trainer
from tests.benchmarks.measure import Line
from tests.gpu_day import Day, machine, stored
from tests.jobs import REPOSITORY

ABSENT = (
    "ray", "deepspeed", "faiss", "pydantic", "pydantic_core", "pyarrow", "pandas", "cv2", "PIL", "pydicom", "boto3", "scipy",
    "rich", "tensorboard",
)  # fmt: skip
"""Packages that a bare GPU machine may lack."""


def gpu_day(out: Path, *arguments: str, absent: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """`python -m tests.gpu_day` with small encoders on the CPU, where the packages ``absent`` are not installed."""
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({list(absent)!r})); "
        f"sys.argv = ['gpu_day', '--device=cpu', '--small', '--steps=2', '--out={out}', *{list(arguments)!r}]; "
        "runpy.run_module('tests.gpu_day', run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_the_day_of_a_gpu_needs_torch_and_transformers_alone(tmp_path: Path) -> None:
    done = gpu_day(tmp_path, "--only=(CPU|where time goes): vit|heads|k-means", absent=ABSENT)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    assert "engine: plain torch, as DeepSpeed is not installed" in done.stdout
    found = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert found.pop("k-means")["state"] == "left out"
    assert {part["state"] for part in found.values()} == {"done"}
    written = (tmp_path / "table.md").read_text()
    for what in ("fp32 from a CPU's", "image_BD from a CPU's", "backward", "film negatives", "FAISS is not installed"):
        assert what in written
    assert (tmp_path / "trace-vit-tiny.json.gz").exists()


def test_what_the_day_of_a_gpu_had_no_time_for_is_done_by_the_next_one(tmp_path: Path) -> None:
    ran = []

    def part(of: Day) -> Iterator[Line]:
        ran.append(of)
        yield Line("something", "1 s")
        if len(ran) == 1:
            raise RuntimeError("CUDA error")

    here, now = machine(torch.device("cpu")), time.monotonic()
    days = [
        Day(torch.device("cpu"), True, 1, tmp_path, "torch", now + seconds, {}) for seconds in (60, -1, 60, 60)
    ]  # the second one has no time
    for day, state in zip(days, ("failed", "failed", "done", "done"), strict=True):
        day.parts = stored(tmp_path, here)
        day.do("a part", part)
        assert stored(tmp_path, here)["a part"].state == state
    assert ran == [days[0], days[2]]
    with pytest.raises(SystemExit, match="give another --out"):
        stored(tmp_path, "another machine")


def test_every_method_has_a_line_beside_its_bare_products_and_priors_assignment_one_of_its_own() -> None:
    found = [str(line) for line in method_heads.lines(method_heads.SMALL, rounds=1, memory=False)]
    modules = {module.name: import_module(f"cmcgns.methods.{module.name}") for module in iter_modules(methods.__path__)}
    known = {name.replace("_", "-") for name, module in modules.items() if hasattr(module, "METHOD")}
    assert known == set(method_heads.METHODS)
    assert [line.split(",")[0] for line in found] == [*method_heads.METHODS, "prior's assignment"]


def test_recorded_products_are_those_that_were_written_down_by_hand() -> None:
    recorded = method_heads.gflop(method_heads.products_of(heads.build_step()))
    by_hand = sum(product.gflop for product in heads.PRODUCTS)
    assert by_hand < recorded < 1.001 * by_hand  # a mean over sentences is one of 1.2 MFLOP too
    left, right = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 5, 6)
    products = method_heads.products_of(lambda: (left @ right).sum().backward())
    assert sum(products.values()) == 2
    assert method_heads.gflop(products) == pytest.approx(2 * 2 * 3 * 4 * 5 * 6 / 1e9)


class Calls(TorchDispatchMode):
    """Counts the calls of torch's operators."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", method_heads.METHODS)
def test_no_method_loops_over_studies(name: str) -> None:
    """Twice the studies need as many calls of operators; PRIOR's assignment, which scipy solves, is given here."""
    numbers = []
    for studies in (4, 8):
        step = method_heads.build_step(name, replace(method_heads.SMALL, studies=studies))
        step()
        with Calls() as calls:
            step()
        numbers.append(calls.number)
    assert numbers[0] == numbers[1] > 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_losses_of_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu_day", "--only=beside a CPU", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout


def test_the_blocks_of_the_trainers_benchmark_are_read_like_those_of_a_run() -> None:
    config = trainer.settings(0, "vit-tiny", image_size=32)
    reader = StepReader(
        trainer.CachedBlocks(config), Batcher(config, 0, torch.device("cpu")), Cursor(), 1, lambda: False
    )
    places = [reader.next_step().cursor.position for _ in range(2 * trainer.CACHED)]
    assert places == [trainer.MICROBATCH * step for step in range(1, 2 * trainer.CACHED + 1)]


def test_on_paper_one_host_sends_nothing_and_two_send_the_bytes_that_were_measured() -> None:
    machine = scaling.Machine("two GPUs, a byte a second", 2, 1e12, 1e12, 1 / scaling.WIRE)
    counts = scaling.Counts(operations=1e9, parameters=1000, in_half=0, launches=0)
    alone, both = (scaling.step(machine, gpus, counts) for gpus in (2, 4))
    assert alone.gather_s == alone.reduce_s == alone.weights_s == 0
    assert alone.seconds(overlap=True) == alone.compute_s + alone.losses_s
    assert both.reduce_s + both.weights_s == 12 * 1000 / 2  # of each host: 12 (N - 1) bytes a parameter over all
    assert both.seconds(overlap=False) - both.seconds(overlap=True) == pytest.approx(2 / 3 * both.compute_s)
    assert both.losses_s == 2 * alone.losses_s
    # of 64 studies a GPU a film, a report and six sentences, as bf16, and their gradients as fp32; half are of the other host
    assert both.gather_s == 4 * 64 * (1 + 1 + 6) * 768 * (2 + 4) / 2
    halved = scaling.step(machine, 4, replace(counts, in_half=1000, launches=10**9))
    assert halved.reduce_s == both.reduce_s / 2  # in bf16; weights travel as fp32
    assert halved.weights_s == both.weights_s
    assert halved.seconds(overlap=False) >= 10**9 * scaling.LAUNCH_S  # a step waits for its launches
