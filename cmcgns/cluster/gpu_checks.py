"""Checks of a machine's GPUs: driver, memory errors, links between them, NCCL, and FAISS on them."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations
from pathlib import Path

import numpy as np

from cmcgns import storage
from cmcgns.cluster.check_results import CheckResult, Requirements
from cmcgns.errors import UserError, first_line
from cmcgns.faiss_install import check_faiss, is_installed, load_faiss

GIB = 2**30
SMI_S = 20.0
FIELDS = ("index", "name", "driver_version", "memory.used", "ecc.errors.uncorrected.volatile.total", "pcie.link.width.current",
          "pcie.link.width.max")  # fmt: skip
"""What nvidia-smi is asked; it answers [N/A] where a card has no such thing."""
USED_MIB = 1024
"""Above this another process holds the card: a driver alone takes some hundred."""
LEAST_DRIVER = {12: 525, 13: 580}
"""By CUDA's release notes, the first driver for each major version of CUDA."""
BUS_GB_S = {"PCIe": 25, "PCIE": 25, "H200": 450, "H100": 450, "A100": 300, "L40S": 25, "L4": 25, "A10G": 25}
"""What an all-reduce over the cards of one machine can reach a second: NVLink in one direction, or PCIe 4.0 less its overhead."""
SLOW_SHARE = 0.4
REDUCTIONS, POLL_S = 5, 0.1
NCCL_SHARE = 0.6
"""Of the time after which a node counts as silent."""
TEMPORARY_BYTES = 16 * 2**20
"""For FAISS, which takes 1.5 GiB by default."""


@dataclass(frozen=True)
class Card:
    """What nvidia-smi says of a GPU; None for what it does not know."""

    index: int
    name: str
    driver: str
    used_mib: int | None
    memory_errors: int | None
    """That could not be corrected, since the driver was loaded."""
    lanes: int | None
    most_lanes: int | None


def read_cards() -> list[Card]:
    """The GPUs of this machine by nvidia-smi; none where there is no nvidia-smi, or it finds none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SMI_S).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [_card([value.strip() for value in line.split(",")]) for line in said.splitlines() if line.strip()]


def _card(values: Sequence[str]) -> Card:
    index, name, driver, *numbers = values
    return Card(int(index), name, driver, *(int(value) if value.isdecimal() else None for value in numbers))


def gpu_checks(name: str, required: Requirements, gpus: int | None) -> Iterator[CheckResult]:
    """GPUs that torch sees, compared with those that Ray counts and the run needs."""
    import torch

    cards = read_cards()
    if required.use_gpu:
        yield from card_checks(name, cards)
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus is not None and seen < gpus:
        yield CheckResult(
            "failed", "GPU", name, f"torch {torch.__version__} sees {seen} GPUs, Ray counts {gpus}",
            "Install the driver and a matching CUDA build of torch, or start Ray with --num-gpus=0",
        )  # fmt: skip
    elif seen:
        names = {torch.cuda.get_device_name(i) for i in range(seen)}
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(seen)) / GIB
        bf16 = "" if torch.cuda.is_bf16_supported() else ", no bf16"
        yield CheckResult("ok", "GPU", name, f"{seen} x {', '.join(sorted(names))}, {memory:.0f} GiB{bf16}")
        if required.use_gpu:
            yield from _peer_checks(name, seen)
            yield from nccl_checks(name, seen, sorted(names)[0], required.mebibytes, NCCL_SHARE * required.timeout_s)
    elif required.use_gpu and gpus is None:
        yield CheckResult(
            "failed", "GPU", name, f"torch sees none{_driver_reason(cards)}, and train.use_gpu needs them",
            "Install the driver and a CUDA build of torch, or leave train.use_gpu out",
        )  # fmt: skip
    else:
        yield CheckResult("ok", "GPU", name, "no GPU" if required.use_gpu else "no GPU, none needed")


def _driver_reason(cards: Sequence[Card]) -> str:
    """Why torch sees none of ``cards``, as far as it can be told."""
    import torch

    if not cards:
        return ""
    if torch.version.cuda is None:
        return f" of {len(cards)}, since torch {torch.__version__} is a build without CUDA"
    least, driver = LEAST_DRIVER.get(int(torch.version.cuda.split(".")[0]), 0), int(cards[0].driver.split(".")[0])
    old = f": it needs {least} or newer" if driver < least else ""
    return f" of {len(cards)}, with driver {cards[0].driver} and CUDA {torch.version.cuda}{old}"


def card_checks(name: str, cards: Sequence[Card]) -> Iterator[CheckResult]:
    """Memory errors, other processes and narrow links of each of ``cards``."""
    for card in cards:
        what = f"GPU {card.index} ({card.name})"
        if card.memory_errors:
            yield CheckResult(
                "failed", "GPU", name, f"{what} has had {card.memory_errors} memory errors that could not be corrected",
                "Restart the machine; if they come back, replace the card",
            )  # fmt: skip
        if card.used_mib is not None and card.used_mib > USED_MIB:
            yield CheckResult(
                "warning", "GPU", name, f"{what}: {card.used_mib} MiB are in use", "`nvidia-smi` names the processes"
            )
        if card.lanes is not None and card.most_lanes is not None and card.lanes < card.most_lanes:
            yield CheckResult(
                "warning", "GPU", name, f"{what} is linked by {card.lanes} of {card.most_lanes} PCIe lanes",
                "Look whether it sits firmly, and in which slot",
            )  # fmt: skip


def _peer_checks(name: str, gpus: int) -> Iterator[CheckResult]:
    """Whether the GPUs reach each other's memory."""
    import torch

    pairs = list(combinations(range(gpus), 2))
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        some = ", ".join(f"{first} - {second}" for first, second in apart[:4])
        yield CheckResult(
            "warning", "GPU links", name,
            f"{len(apart)} of {len(pairs)} pairs do not reach each other's memory ({some}): NCCL goes through the host's",
            "`nvidia-smi topo -p2p r` says why; a virtual machine or IOMMU may forbid it",
        )  # fmt: skip
    elif pairs:
        yield CheckResult("ok", "GPU links", name, f"each of {gpus} GPUs reaches the memory of the others")


def nccl_checks(name: str, gpus: int, card: str, mebibytes: int, timeout_s: float) -> Iterator[CheckResult]:
    """All-reduce over the ``gpus`` of one machine, beside what cards called ``card`` can reach."""
    if gpus < 2:
        return
    try:
        speed = reduce_here("nccl", gpus, mebibytes, timeout_s)
    except UserError as error:
        yield CheckResult(
            "failed",
            "NCCL",
            name,
            first_line(error),
            "Try NCCL_P2P_DISABLE=1; with NCCL_DEBUG=INFO the log of a run says more",
        )
        return
    most = next((known for part, known in BUS_GB_S.items() if part in card), None)
    beside = f", cards like {card} can reach about {most}" if most else ""
    slow = most is not None and speed < SLOW_SHARE * most
    yield CheckResult(
        "warning" if slow else "ok", "NCCL", name,
        f"all-reduce of {mebibytes} MiB over {gpus} GPUs: {speed:.1f} GB/s on the bus{beside}",
        "See `nvidia-smi topo -m` for the links; more with --doctor.megabytes=1024" if slow else "",
    )  # fmt: skip


def reduce_here(backend: str, ranks: int, mebibytes: int, timeout_s: float) -> float:
    """GB/s on the bus, 2 (n - 1) / n bytes for each of the tensor, of an all-reduce over ``ranks`` processes on this machine.

    Raises:
        UserError: a process failed, or all of them together took longer than ``timeout_s``.
    """
    with storage.scratch_folder() as folder, ExitStack() as opened:
        end = time.monotonic() + timeout_s
        # processes of their own: a Ray worker cannot spawn any, and one that hangs can be ended. NCCL may log much to stdout
        started = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, backend, str(folder), str(rank), str(ranks), str(mebibytes), str(timeout_s)],
                stdout=opened.enter_context((folder / f"log_{rank}").open("w")), stderr=subprocess.STDOUT,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        try:
            while any(process.poll() is None for process in started) and time.monotonic() < end:
                if any(process.poll() for process in started):
                    break  # the others wait for it
                time.sleep(POLL_S)
        finally:
            failed = [rank for rank, process in enumerate(started) if process.poll()]
            silent = [rank for rank, process in enumerate(started) if process.poll() is None]
            for process in started:
                process.kill()
                process.wait()
        if failed:
            said = (folder / f"log_{failed[0]}").read_text(errors="replace").strip().splitlines()
            raise UserError(f"rank {failed[0]} of {ranks} failed: {said[-1] if said else 'killed'}")
        if silent:
            raise UserError(f"rank {silent[0]} of {ranks} did not answer within {timeout_s:.0f} s")
        seconds = max(float((folder / f"seconds_{rank}").read_text()) for rank in range(ranks))
    return 2 * (ranks - 1) / ranks * mebibytes * 2**20 / seconds / 1e9


def _reduce(backend: str, folder: str, rank: int, ranks: int, mebibytes: int, timeout_s: float) -> None:
    """One process of ``reduce_here``: writes the seconds of an all-reduce."""
    import torch

    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = f"file://{Path(folder) / 'store'}"
    seconds = all_reduce_seconds(backend, store, rank, ranks, mebibytes, timeout_s, REDUCTIONS)
    (Path(folder) / f"seconds_{rank}").write_text(str(seconds))


def all_reduce_seconds(
    backend: str, address: str, rank: int, ranks: int, mebibytes: int, timeout_s: float, times: int = 1
) -> float:
    """Mean seconds of ``times`` all-reduces of a tensor of that size by this process and the others; ``address`` as in torch's
    `init_method`.

    Raises:
        RuntimeError: another process did not connect, or the sum is wrong.
    """
    import torch
    from torch import distributed

    on_gpu = backend == "nccl"
    distributed.init_process_group(
        backend, init_method=address, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s)
    )
    try:
        values = torch.ones(mebibytes * 2**18, device="cuda" if on_gpu else "cpu")
        distributed.all_reduce(values)  # the first one opens the connections
        if not bool((values == ranks).all()):  # waits for the device
            raise RuntimeError(f"wrong sum: ones over {ranks} ranks must give {ranks}")
        distributed.barrier()
        before = time.perf_counter()
        for _ in range(times):
            distributed.all_reduce(values)
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - before) / times
    finally:
        distributed.destroy_process_group()


def faiss_checks(name: str, required: Requirements, gpus: int | None) -> Iterator[CheckResult]:
    """Whether exactly one FAISS package is installed; if clustering runs on GPUs the GPU build, which searches where one is."""
    import torch

    here = torch.cuda.device_count() if gpus is None else gpus
    try:
        check_faiss("gpu" if required.faiss_gpu else "cpu")
        if required.faiss_gpu and here:
            _search_on_gpu()
    except (UserError, RuntimeError) as error:  # FAISS raises RuntimeError for what CUDA refuses
        yield CheckResult("failed", "FAISS", name, first_line(error))
        return
    yield CheckResult("ok", "FAISS", name, "GPU build" if is_installed("faiss-gpu") else "CPU build")


def _search_on_gpu() -> None:
    faiss, rows_ND = load_faiss("gpu"), np.random.default_rng(0).standard_normal((256, 64), np.float32)
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(TEMPORARY_BYTES)
    index = faiss.index_cpu_to_gpu(resources, 0, faiss.IndexFlatIP(64))
    index.add(rows_ND[:32])
    _, nearest_N1 = index.search(rows_ND, 1)
    if (nearest_N1[:, 0] != (rows_ND @ rows_ND[:32].T).argmax(1)).any():
        raise UserError("FAISS finds other neighbours on the GPU than numpy does; the card or its driver is at fault")


if __name__ == "__main__":
    BACKEND, FOLDER, RANK, RANKS, MEBIBYTES, TIMEOUT_S = sys.argv[1:]
    _reduce(BACKEND, FOLDER, int(RANK), int(RANKS), int(MEBIBYTES), float(TIMEOUT_S))
