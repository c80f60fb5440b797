"""A stand-in for an accelerator with real numbers: its tensors compute on the CPU, and refuse to meet tensors of the CPU.

``StandIn()`` is a context in which ``tensor.to(register())`` works. What comes out is equal to the CPU's but for the last bits
(another kernel of attention), so that a test can run a whole task here. Register it once in a process of its own.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"
HEAVY = ("conv", "linear", "matmul", "mv", "mm", "addmm", "bmm", "baddbmm", "embedding", "scaled_dot_product")
"""Operators that a model or a head consists of."""
HOST_MAY_MEET = ("to", "_to_copy", "copy_", "_has_compatible_shallow_copy_type")


def register() -> torch.device:
    """The device of the stand-in; call it once in a process."""
    _setup_privateuseone_for_python_backend(NAME)
    device, plain = torch.device(NAME, 0), torch.asarray
    # scikit-learn's way to make a tensor; it passes by every dispatch mode
    torch.asarray = lambda values, **how: (
        plain(values, **how | {"device": None}).to(device) if how.get("device") == device else plain(values, **how)
    )
    return device


class HeldTensor(Tensor):
    """A tensor on the stand-in; ``value`` has its numbers."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> "HeldTensor":
        options = {"dtype": value.dtype, "device": torch.device(NAME, 0)}
        held: HeldTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, value.shape, value.stride(), value.storage_offset(), **options
        )
        held.value = value
        return held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})[0]


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """What the operator returns, and whether that is on the stand-in."""
    leaves, name = tree_leaves((args, kwargs)), func.overloadpacket.__name__
    held = [each for each in leaves if isinstance(each, HeldTensor)]
    others = [each for each in leaves if isinstance(each, Tensor) and not isinstance(each, HeldTensor) and each.dim()]
    if held and others and name not in HOST_MAY_MEET:
        raise RuntimeError(f"{func}: tensors on two devices")
    if name == "_has_compatible_shallow_copy_type":  # a module takes a new parameter instead
        return False, False
    if name.endswith("pin_memory"):  # pages of the host for its copies: there are no others here
        return args[0], False
    asked = next((each for each in leaves if isinstance(each, torch.device)), None)
    on_device = bool(held) if asked is None else asked.type == NAME
    made = func(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))
    if name == "copy_":
        return args[0], on_device
    # what is written in place stays the tensor that it was
    known = {id(each.value): each for each in held}
    wrap = lambda each: (
        (known[id(each)] if id(each) in known else HeldTensor(each)) if isinstance(each, Tensor) else each
    )
    return (tree_map(wrap, made) if on_device else made), on_device


def _on_host(value: Any) -> Any:
    if isinstance(value, HeldTensor):
        return value.value
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


class StandIn(TorchDispatchMode):
    """Counts ``HEAVY`` operators by where they ran."""

    def __init__(self) -> None:
        super().__init__()
        self.heavy = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, on_device = compute(func, args, kwargs or {})
        if func.overloadpacket.__name__.lstrip("_").startswith(HEAVY) and not _is_meta(made):
            self.heavy["device" if on_device else "cpu"] += 1
        return made


def _is_meta(made: Any) -> bool:
    return any(isinstance(each, Tensor) and each.device.type == "meta" for each in tree_leaves(made))
