"""What the doctor looks at on one machine: versions, GPUs, FAISS, DeepSpeed, memory, disk, names and storage."""

import hashlib
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

import cmcgns
from cmcgns import storage
from cmcgns.errors import UserError, first_line
from cmcgns.storage.errors import PATIENCE_VARIABLE

Level = Literal["ok", "warning", "failed"]
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at."""

    level: Level
    subject: str
    """What was looked at: versions, all-reduce, ..."""
    where: str
    """A node, two nodes, or 'cluster'."""
    found: str
    fix: str = ""
    """What to do, where it is not ok."""

    def __str__(self) -> str:
        return f"{self.level:7}  {self.subject:14}  {self.where}: {self.found}" + (f". {self.fix}" if self.fix else "")


def print_result(console: Console, line: CheckResult) -> None:
    """Print one line."""
    level = f"{line.level:7}"
    text = escape(str(line)[len(level) :])
    console.print(f"[{COLOURS[line.level]}]{level}[/{COLOURS[line.level]}]{text}", highlight=False)


def print_summary(console: Console, lines: Sequence[CheckResult]) -> None:
    """Print how many there were of each level."""
    counts = [f"{sum(line.level == level for line in lines)} {level}" for level in COLOURS]
    console.print(", ".join(counts), highlight=False)


def any_failed(lines: Sequence[CheckResult]) -> bool:
    """Whether a run would be lost."""
    return any(line.level == "failed" for line in lines)


PACKAGES = (
    "ray", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy", "pydantic", "boto3",
    "pydicom", "opencv-python-headless",
)  # fmt: skip
"""What must be equal on all nodes: actors and batches travel between them as these packages write them."""
GIB = 2**30
MIN_DISK_GIB, GOOD_DISK_GIB = 2, 20
"""Free space for Ray's spilled objects, logs and checkpoints on their way."""
MIN_SHM_GIB = 1


@dataclass(frozen=True)
class Requirements:
    """What the run that is to come wants of a machine."""

    use_gpu: bool
    deepspeed: bool
    faiss_gpu: bool


def versions() -> dict[str, str]:
    """Version of each of ``PACKAGES`` that is installed here, of Python, and a hash of this package's own sources."""
    found = {"python": platform.python_version(), "cmcgns": source_hash()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            # CPU and CUDA builds of one version go together
            found[name] = metadata.version(name).partition("+")[0]
    return found


def source_hash() -> str:
    """A hash of every source file of this package, twelve hex digits: two checkouts of one version may differ."""
    root, digest = Path(cmcgns.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def check_machine(name: str, asked: Requirements, gpus: int | None = None) -> list[CheckResult]:
    """All lines of this machine, which is called ``name``; ``gpus``: how many Ray counts on it, None without a Ray."""
    lines = [*gpu_checks(name, asked, gpus), *faiss_checks(name, asked), *memory_checks(name), *disk_checks(name)]
    if asked.deepspeed:
        lines += deepspeed_checks(name, asked)
    # alone, a machine speaks to itself under any name
    return lines if gpus is None else [*lines, *host_name_checks(name)]


def gpu_checks(name: str, asked: Requirements, gpus: int | None) -> Iterator[CheckResult]:
    """GPUs that torch sees, beside those that Ray counts and the run asks for."""
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus is not None and seen < gpus:
        yield CheckResult(
            "failed", "GPU", name, f"torch {torch.__version__} sees {seen} GPUs, Ray counts {gpus}",
            "Install the driver and a CUDA build of torch that goes with it, or start Ray with --num-gpus=0",
        )  # fmt: skip
    elif seen:
        names = {torch.cuda.get_device_name(i) for i in range(seen)}
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(seen)) / GIB
        bf16 = "" if torch.cuda.is_bf16_supported() else ", no bf16"
        yield CheckResult("ok", "GPU", name, f"{seen} x {', '.join(sorted(names))}, {memory:.0f} GiB{bf16}")
    elif asked.use_gpu and gpus is None:
        yield CheckResult(
            "failed", "GPU", name, "torch sees none, and train.use_gpu asks for them", "Leave train.use_gpu out"
        )
    else:
        yield CheckResult("ok", "GPU", name, "none here" if asked.use_gpu else "none here, none asked for")


def faiss_checks(name: str, asked: Requirements) -> Iterator[CheckResult]:
    """One FAISS, with GPUs where the clustering is to run on them."""
    from cmcgns.faiss_install import check_faiss

    try:
        check_faiss("gpu" if asked.faiss_gpu else "cpu")
    except UserError as error:
        yield CheckResult("failed", "FAISS", name, first_line(error))
        return
    yield CheckResult("ok", "FAISS", name, "GPU build" if _has("faiss-gpu") else "CPU build")


def _has(package: str) -> bool:
    with suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(package))
    return False


def deepspeed_checks(name: str, asked: Requirements) -> Iterator[CheckResult]:
    """Whether DeepSpeed's communication op is compiled here, or can be."""
    if asked.use_gpu:
        return  # its collectives on GPUs are NCCL's, and the optimizer is torch's
    # the folder that ``train.engine`` sets, found without the seconds that importing DeepSpeed takes
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")
    if list(folder.rglob("deepspeed_shm_comm*.so")):
        yield CheckResult("ok", "DeepSpeed", name, f"its op for CPUs is compiled in {folder}")
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool, path=path) is None]
    if missing:
        yield CheckResult(
            "failed", "DeepSpeed", name, f"its op for CPUs is not compiled, and {' and '.join(missing)} is missing",
            "Install it (apt install g++, pip install ninja), or train with train.engine=torch",
        )  # fmt: skip
    else:
        yield CheckResult(
            "warning", "DeepSpeed", name, "its op for CPUs is not compiled; the first run does that for minutes",
            "python -m cmcgns.train.build_ops",
        )  # fmt: skip


def memory_checks(name: str) -> Iterator[CheckResult]:
    """Shared memory, where Ray's object store lies."""
    path = Path("/dev/shm")
    if not path.is_dir():
        yield CheckResult("warning", "shared memory", name, "there is no /dev/shm; Ray's object store lies on disk")
        return
    usage = shutil.disk_usage(path)
    free = usage.free / GIB
    if free < MIN_SHM_GIB:
        yield CheckResult(
            "failed", "shared memory", name, f"{free:.1f} of {usage.total / GIB:.1f} GiB of /dev/shm are free",
            "Give the container more (docker --shm-size, an emptyDir of medium Memory)",
        )  # fmt: skip
    else:
        yield CheckResult(
            "ok", "shared memory", name, f"{free:.1f} of {usage.total / GIB:.1f} GiB of /dev/shm are free"
        )


def disk_checks(name: str) -> Iterator[CheckResult]:
    """Free space where Ray spills objects and writes its logs."""
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.1f} GiB free in {folder}"
    if free < MIN_DISK_GIB:
        yield CheckResult("failed", "disk", name, found, "Ray refuses to spill on a full disk: free some")
    elif free < GOOD_DISK_GIB:
        yield CheckResult(
            "warning", "disk", name, found, f"Long runs spill and log there: {GOOD_DISK_GIB} GiB are better"
        )
    else:
        yield CheckResult("ok", "disk", name, found)


def host_name_checks(name: str) -> Iterator[CheckResult]:
    """Whether this machine's own name leads to an address that others can reach: gloo listens where it leads."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        yield CheckResult(
            "failed", "host name", name, "its own name has no address; gloo cannot listen",
            "Add it to /etc/hosts with the address of its network card, or set GLOO_SOCKET_IFNAME",
        )  # fmt: skip
        return
    if address.startswith("127.") and not os.environ.get("GLOO_SOCKET_IFNAME"):
        yield CheckResult(
            "warning", "host name", name, f"its own name leads to {address}, which no other machine reaches",
            "In /etc/hosts give it the address of its network card, or set GLOO_SOCKET_IFNAME",
        )  # fmt: skip
    else:
        yield CheckResult("ok", "host name", name, f"leads to {address}")


PROBE = ".doctor-"
"""What the names of our own files in run.storage begin with."""


@dataclass(frozen=True)
class StorageAccess:
    """What came of one look at a folder or bucket: its speed, or why there is none."""

    error: str = ""
    read_mib_s: float | None = None
    write_mib_s: float | None = None
    sees_driver: bool = True
    """Whether the file that the driver left is there."""


def check_data(uri: str) -> StorageAccess:
    """Whether something lies at ``uri``."""
    _retry_briefly()
    try:
        return StorageAccess() if storage.exists(uri) else StorageAccess(error="nothing lies there")
    except (UserError, OSError) as error:
        return StorageAccess(error=first_line(error))


def check_reach(uri: str) -> StorageAccess:
    """Whether ``uri`` can be asked for, be something there or not; as patient with a busy bucket as the job itself."""
    try:
        storage.exists(uri)
    except (UserError, OSError) as error:
        return StorageAccess(error=first_line(error))
    return StorageAccess()


def check_storage(uri: str, mark: str, mebibytes: int) -> StorageAccess:
    """Speed of writing and reading a file in the folder ``uri``, in which the driver left the file ``mark``."""
    _retry_briefly()
    probe = storage.join(uri, f"{mark}-{os.getpid()}-{time.time_ns()}")
    data = os.urandom(2**20) * mebibytes
    try:
        sees_driver = storage.exists(storage.join(uri, mark))
        began = time.perf_counter()
        storage.write_bytes(probe, data)
        written = time.perf_counter()
        whole = storage.read_bytes(probe) == data
        read = time.perf_counter()
    except (UserError, OSError) as error:
        return StorageAccess(error=first_line(error))
    finally:
        with suppress(UserError, OSError):
            storage.delete_file(probe)
    fault = "" if whole else "what was read is not what was written"
    return StorageAccess(fault, mebibytes / (read - written), mebibytes / (written - began), sees_driver)


def _retry_briefly() -> None:
    """The doctor asks once: a bucket that answers only after minutes has failed."""
    os.environ[PATIENCE_VARIABLE] = "5"
