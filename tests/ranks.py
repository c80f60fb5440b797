"""Runs a function on n ranks, each a process of its own on gloo, and brings back what each returned."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

IMPORTED_ONCE = (
    "cmcgns.data.readers", "cmcgns.train.trainer", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "tests.small",
    "tests.train.memory", *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "resnet", "vit")),
)  # fmt: skip
"""What a rank imports, and takes seconds: ranks are forked from a process that has done it."""
TIMEOUT_S = 180


def run_on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returned on each rank; it must be importable from its module."""
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        folder = Path(scratch)
        (folder / "task").write_bytes(pickle.dumps((function, arguments)))
        for name, value in {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
        }.items():
            patch.setenv(name, value)
        _wait([_start(folder, rank) for rank in range(ranks)])
        results = [folder / f"result_{rank}" for rank in range(ranks)]
        output = [(folder / f"output_{rank}").read_text(errors="replace") for rank in range(ranks)]
        failed = [rank for rank, result in enumerate(results) if not result.exists()]
        # the rank that broke first; the others only lost their connection to it
        failed.sort(key=lambda rank: any(f"Connection {end}" in output[rank] for end in ("closed", "reset")))
        assert not failed, f"ranks {failed} of {ranks} failed:\n{output[failed[0]][-3000:]}"
        return [pickle.loads(result.read_bytes()) for result in results]


def _start(folder: Path, rank: int) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED_ONCE))  # counts at the first start
    environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    (folder / f"output_{rank}").touch()
    child = context.Process(target=_enter, args=(folder, dict(environment)))
    child.start()
    return child


def _wait(children: list[BaseProcess]) -> None:
    end = time.monotonic() + TIMEOUT_S
    try:
        for child in children:
            child.join(max(end - time.monotonic(), 0))
            assert child.exitcode is not None, f"a rank did not end within {TIMEOUT_S} s"
    finally:
        for child in children:
            child.kill()


def _enter(folder: Path, environment: dict[str, str]) -> None:
    import torch
    import torch.distributed as dist

    os.environ.clear()
    os.environ.update(environment)
    with (folder / f"output_{environment['RANK']}").open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    function, arguments = pickle.loads((folder / "task").read_bytes())
    result = pickle.dumps(function(*arguments))
    dist.barrier()
    (folder / f"result_{dist.get_rank()}").write_bytes(result)
    os._exit(0)  # DeepSpeed's threads may abort an orderly end


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
