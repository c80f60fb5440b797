"""All-reduce between two machines at a time, on every pair: a cable, a firewall or a wrong interface shows by name.

N nodes.
"""

import time
from datetime import timedelta


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Every pair of N nodes once, in rounds in which each node has one partner at most (the circle method)."""
    seats = [*range(nodes), *([-1] if nodes % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        met = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(min(pair), max(pair)) for pair in met if -1 not in pair])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def all_reduce_speed(backend: str, address: str, rank: int, mebibytes: int, timeout_s: float) -> float:
    """MiB/s at which this process and its partner sum a tensor of that size; ``address`` is where rank 0 listens.

    Raises:
        RuntimeError: the partner was not met, or the sum is wrong.
    """
    import torch
    from torch import distributed

    device = torch.device("cuda" if backend == "nccl" else "cpu")
    distributed.init_process_group(
        backend, init_method=f"tcp://{address}", rank=rank, world_size=2, timeout=timedelta(seconds=timeout_s)
    )
    try:
        values = torch.ones(mebibytes * 2**18, device=device)
        distributed.all_reduce(values)  # connections are made by the first one
        _wait(device)
        began = time.perf_counter()
        distributed.all_reduce(values)
        _wait(device)
        took = time.perf_counter() - began
        if not bool((values == 4).all()):
            raise RuntimeError("the sum of two ones twice is not four")
        return mebibytes / took
    finally:
        distributed.destroy_process_group()


def _wait(device: "torch.device") -> None:  # type: ignore[name-defined]  # noqa: F821
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()
