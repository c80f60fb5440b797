"""Runs a function on n ranks, each a process of its own on gloo, and brings back what each returned."""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENTRY = "import sys; from tests.ranks import _enter; _enter(*sys.argv[1:])"
TIMEOUT_S = 180


def run_on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returned on each rank; it must be importable from its module."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "task").write_bytes(pickle.dumps((function, arguments)))
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
        }
        children = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", ENTRY, folder],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            output = [child.communicate(timeout=TIMEOUT_S)[0] for child in children]
        finally:
            for child in children:
                child.kill()
        results = [Path(folder) / f"result_{rank}" for rank in range(ranks)]
        failed = [rank for rank, result in enumerate(results) if not result.exists()]
        # the rank that broke first; the others only lost their connection to it
        failed.sort(key=lambda rank: "Connection closed" in output[rank])
        assert not failed, f"ranks {failed} of {ranks} failed:\n{output[failed[0]][-3000:]}"
        return [pickle.loads(result.read_bytes()) for result in results]


def _enter(folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    function, arguments = pickle.loads((Path(folder) / "task").read_bytes())
    result = pickle.dumps(function(*arguments))
    dist.barrier()
    (Path(folder) / f"result_{dist.get_rank()}").write_bytes(result)
    os._exit(0)  # DeepSpeed's threads may abort an orderly end


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
