"""Import of FAISS, after a check of which FAISS package is installed. Nothing else imports it."""

from importlib import metadata
from typing import Any

from cmcgns.errors import UserError


def load_faiss(device: str) -> Any:
    """The FAISS module; for ``gpu`` it must see one."""
    check_faiss(device)
    try:
        import faiss
    except ImportError as error:  # a wheel for another Python or CUDA
        raise UserError(
            f"FAISS is installed but does not load ({error}): its wheel must fit this Python"
            + (" and the CUDA libraries of this machine" if device == "gpu" else "")
            + "; reinstall it, see the README"
        ) from error
    if device == "gpu" and not faiss.get_num_gpus():
        raise UserError("clustering.device gpu: FAISS sees no GPU here; check the driver and clustering.gpus_per_actor")
    return faiss


def check_faiss(device: str) -> None:
    """Raise unless exactly one FAISS package is installed, and for ``gpu`` the GPU build."""
    present = [name for name in ("faiss-cpu", "faiss-gpu") if is_installed(name)]
    if len(present) != 1:
        state = "both faiss-cpu and faiss-gpu are installed" if present else "FAISS is not installed"
        remove = "pip uninstall faiss-cpu faiss-gpu, then " if present else ""
        raise UserError(f"{state}: {remove}pip install 'cmcgns[cpu]' or, with CUDA, pip install 'cmcgns[gpu]'")
    if device == "gpu" and present != ["faiss-gpu"]:
        raise UserError("clustering.device gpu needs faiss-gpu: pip uninstall faiss-cpu, pip install 'cmcgns[gpu]'")


def is_installed(distribution: str) -> bool:
    """Whether a package of this name is installed."""
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
