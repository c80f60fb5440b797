"""What `make test` holds of the benchmarks: the GPU table without our packages, and scaling on paper. No time is asserted."""

import subprocess
import sys

import pytest
import torch

from tests.benchmarks import scaling
from tests.jobs import REPOSITORY

ABSENT = (
    "ray", "deepspeed", "faiss", "pydantic", "pydantic_core", "pyarrow", "pandas", "cv2", "PIL", "pydicom", "boto3", "scipy",
    "rich", "tensorboard",
)  # fmt: skip
"""Packages that a bare GPU machine may lack."""


def test_the_gpu_table_needs_torch_and_transformers_alone() -> None:
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT!r})); "
        "sys.argv = ['gpu_step', '--device=cpu', '--small', '--steps=2']; "
        "runpy.run_module('tests.benchmarks.gpu_step', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    assert "engine: plain torch, as DeepSpeed is not installed" in done.stdout
    for what in ("resnet-tiny + bert-tiny", "vit-tiny + bert-tiny", "studies/s", "MFU", "bf16 from fp32"):
        assert what in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bf16_on_the_gpu_gives_the_losses_of_fp32() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu_step", "--steps=5"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout


def test_on_paper_one_host_sends_nothing_and_two_send_the_bytes_that_were_measured() -> None:
    machine = scaling.Machine("two GPUs, a byte a second", 2, 1e12, 1e12, 1 / scaling.WIRE)
    alone, both = (scaling.step(machine, gpus, operations=1e9, parameters=1000) for gpus in (2, 4))
    assert alone.gather_s == alone.reduce_s == alone.weights_s == 0
    assert alone.seconds(overlap=True) == alone.compute_s + alone.losses_s
    assert both.reduce_s + both.weights_s == 12 * 1000 / 2  # of each host: 12 (N - 1) bytes a parameter over all
    assert both.seconds(overlap=False) - both.seconds(overlap=True) == pytest.approx(2 / 3 * both.compute_s)
    assert both.losses_s == 2 * alone.losses_s
