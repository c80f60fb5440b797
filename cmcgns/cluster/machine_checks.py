"""Checks of one machine: versions, DeepSpeed, memory, disk, host name and storage; GPUs and FAISS are in ``gpu_checks``."""

import hashlib
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import cmcgns
from cmcgns import storage
from cmcgns.cluster.check_results import CheckResult, Requirements
from cmcgns.cluster.gpu_checks import faiss_checks, gpu_checks
from cmcgns.errors import UserError, first_line
from cmcgns.storage.errors import RETRY_LIMIT_VARIABLE
from cmcgns.user_folders import OP, check_extension_lock, ray_temp_folder, torch_extensions

PACKAGES = (
    "ray", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy", "pydantic", "boto3",
    "pydicom", "opencv-python-headless",
)  # fmt: skip
"""Versions of these must be equal on all nodes: actors and batches are pickled on one node and unpickled on another."""
GIB = 2**30
MIN_DISK_GIB, GOOD_DISK_GIB = 2, 20
"""Free space for Ray's spilled objects, logs, and checkpoints before their upload."""
MIN_SHM_GIB = 1


def versions() -> dict[str, str]:
    """Installed versions of Python and ``PACKAGES``, and a hash of this package's sources."""
    found = {"python": platform.python_version(), "cmcgns": source_hash()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            # a CPU and a CUDA build of one version are compatible
            found[name] = metadata.version(name).partition("+")[0]
    return found


def source_hash() -> str:
    """Hash of all source files of this package, twelve hex digits: two checkouts of one version may differ."""
    root, digest = Path(cmcgns.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def check_machine(name: str, required: Requirements, gpus: int | None = None) -> list[CheckResult]:
    """All results of the machine ``name``. ``gpus`` is how many GPUs Ray counts on it; None without Ray."""
    lines = [
        *gpu_checks(name, required, gpus),
        *faiss_checks(name, required, gpus),
        *memory_checks(name),
        *disk_checks(name),
    ]
    if required.deepspeed:
        lines += deepspeed_checks(name, required)
    # a single machine reaches itself by any name
    return lines if gpus is None else [*lines, *host_name_checks(name)]


def deepspeed_checks(name: str, required: Requirements) -> Iterator[CheckResult]:
    """Whether DeepSpeed's CPU communication op is compiled, or can be."""
    if required.use_gpu:
        return  # on GPUs it uses NCCL, and the optimizer is torch's
    try:
        folder = torch_extensions()
        check_extension_lock()
    except UserError as error:
        yield CheckResult("failed", "DeepSpeed", name, first_line(error))
        return
    if list(folder.rglob(f"{OP}*.so")):
        yield CheckResult("ok", "DeepSpeed", name, f"its CPU op is compiled in {folder}")
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool, path=path) is None]
    if missing:
        yield CheckResult(
            "failed", "DeepSpeed", name, f"its CPU op is not compiled, and {' and '.join(missing)} is missing",
            "Install it (apt install g++, pip install ninja), or train with train.engine=torch",
        )  # fmt: skip
    else:
        yield CheckResult(
            "warning", "DeepSpeed", name, "its CPU op is not compiled; the first run takes minutes to compile it",
            "python -m cmcgns.train.build_ops",
        )  # fmt: skip


def memory_checks(name: str) -> Iterator[CheckResult]:
    """Free shared memory, for Ray's object store."""
    path = Path("/dev/shm")
    if not path.is_dir():
        yield CheckResult("warning", "shared memory", name, "there is no /dev/shm; Ray's object store uses the disk")
        return
    usage = shutil.disk_usage(path)
    free = usage.free / GIB
    if free < MIN_SHM_GIB:
        yield CheckResult(
            "failed", "shared memory", name, f"{free:.1f} of {usage.total / GIB:.1f} GiB of /dev/shm are free",
            "Give the container more (docker --shm-size, an emptyDir with medium: Memory)",
        )  # fmt: skip
    else:
        yield CheckResult(
            "ok", "shared memory", name, f"{free:.1f} of {usage.total / GIB:.1f} GiB of /dev/shm are free"
        )


def disk_checks(name: str) -> Iterator[CheckResult]:
    """Free space where Ray spills objects and writes logs."""
    try:
        folder = ray_temp_folder()
    except UserError as error:
        yield CheckResult("failed", "disk", name, first_line(error))
        return
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.1f} GiB free in {folder}"
    if free < MIN_DISK_GIB:
        yield CheckResult("failed", "disk", name, found, "Free some: Ray does not spill to a full disk")
    elif free < GOOD_DISK_GIB:
        yield CheckResult(
            "warning", "disk", name, found, f"Long runs spill and log there: have {GOOD_DISK_GIB} GiB free"
        )
    else:
        yield CheckResult("ok", "disk", name, found)


def host_name_checks(name: str) -> Iterator[CheckResult]:
    """Whether this machine's host name resolves to an address that other machines reach: gloo listens on it."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        yield CheckResult(
            "failed", "host name", name, "the host name has no address; gloo cannot listen",
            "Add it to /etc/hosts with the address of the network card, or set GLOO_SOCKET_IFNAME",
        )  # fmt: skip
        return
    if address.startswith("127.") and not os.environ.get("GLOO_SOCKET_IFNAME"):
        yield CheckResult(
            "warning", "host name", name, f"the host name resolves to {address}, which no other machine reaches",
            "In /etc/hosts give it the address of the network card, or set GLOO_SOCKET_IFNAME",
        )  # fmt: skip
    else:
        yield CheckResult("ok", "host name", name, f"resolves to {address}")


PROBE = ".doctor-"
"""Prefix of the names of our probe files in run.storage."""


@dataclass(frozen=True)
class StorageAccess:
    """Result of accessing a folder or bucket: speeds, or an error."""

    error: str = ""
    read_mib_s: float | None = None
    write_mib_s: float | None = None
    sees_driver: bool = True
    """Whether the driver's marker file is visible."""


def check_data(uri: str) -> StorageAccess:
    """Whether there is something at ``uri``."""
    _retry_briefly()
    try:
        return StorageAccess() if storage.exists(uri) else StorageAccess(error="nothing is there")
    except (UserError, OSError) as error:
        return StorageAccess(error=first_line(error))


def check_reach(uri: str) -> StorageAccess:
    """Whether ``uri`` answers, with or without a file there. Retries a busy bucket for as long as the job does."""
    try:
        storage.exists(uri)
    except (UserError, OSError) as error:
        return StorageAccess(error=first_line(error))
    return StorageAccess()


def check_storage(uri: str, mark: str, mebibytes: int) -> StorageAccess:
    """Write and read speed in the folder ``uri``, in which the driver created the file ``mark``."""
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
    fault = "" if whole else "the data read differ from the data written"
    return StorageAccess(fault, mebibytes / (read - written), mebibytes / (written - began), sees_driver)


def _retry_briefly() -> None:
    """Fail a bucket that answers only after minutes."""
    os.environ[RETRY_LIMIT_VARIABLE] = "5"
