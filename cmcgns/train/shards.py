"""Each rank's even part of weights and averages, as checkpoints store them, so that no rank needs the whole.

Of a tensor of n elements in row-major order, rank r of R has those from r x ceil(n / R) up to the next rank's, as in ZeRO-3.
Tensors without dimensions are whole on every rank.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from cmcgns import distributed

State = dict[str, Tensor]
"""Tensors on the CPU by name."""


@dataclass(frozen=True)
class Part:
    """This rank's part of a tensor of the engine, and how to copy it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    copy: Callable[[], Tensor]
    """A copy on the CPU. Collective if the engine says so."""

    @classmethod
    def of(cls, tensor: Tensor) -> "Part":
        """The part ``tensor``, which is not copied yet."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().to("cpu", copy=True))

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


Parts = dict[str, Part]


def copied(parts: Parts) -> State:
    """Copies of all ``parts`` at once."""
    return {name: part.copy() for name, part in parts.items()}


def own_range(size: int, rank: int | None = None, ranks: int | None = None) -> tuple[int, int]:
    """First element of ``rank`` (by default this one) in a tensor of ``size`` elements, and the one after its last."""
    rank, ranks = distributed.rank() if rank is None else rank, ranks or distributed.world_size()
    share = -(-size // ranks)
    return min(rank * share, size), min((rank + 1) * share, size)


def split(whole: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has; not a copy if it is contiguous."""
    if not whole.dim():
        return whole
    start, stop = own_range(whole.numel())
    return whole.reshape(-1)[start:stop]


def join(part: Tensor, shape: Sequence[int]) -> Tensor:
    """The whole tensor of all ranks' parts, in host memory. Collective."""
    if distributed.world_size() == 1 or not shape:
        return part.view(shape)
    return distributed.join_even(part, prod(shape)).view(shape)


def write_shard(path: Path, parts: State, sizes: Mapping[str, int]) -> None:
    """Write this rank's ``parts``; ``sizes`` are the elements of whole tensors, of those of which each rank has a part."""
    in_order = file_order({name: Part.of(part) for name, part in parts.items()})
    write_one_by_one(path, in_order, (parts[name] for name in in_order), sizes)


def file_order(parts: Parts) -> Parts:
    """``parts`` in the order in which safetensors stores them: readers want each type's elements at multiples of its size."""
    return dict(sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize))


def write_one_by_one(path: Path, parts: Parts, tensors: Iterable[Tensor], sizes: Mapping[str, int]) -> None:
    """``write_shard`` of ``parts`` in ``file_order``, whose ``tensors`` need not be in memory together, as `save_file` wants."""
    of_parts = {name: sizes[name] for name, part in parts.items() if part.shape and name in sizes}
    header: dict[str, Any] = {"__metadata__": {"sizes": json.dumps(of_parts)}}
    end = 0
    for name, part in parts.items():
        offsets = [end, end := end + part.size]
        header[name] = {"dtype": _code(part.dtype), "shape": part.shape, "data_offsets": offsets}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for part, tensor in zip(parts.values(), tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == (part.shape, part.dtype)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


@cache
def _code(dtype: torch.dtype) -> str:
    """The name of ``dtype`` in safetensors."""
    file = save({"tensor": torch.empty(0, dtype=dtype)})
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return str(header["tensor"]["dtype"])


def read_shard(uri: str, name: str, ranks: int) -> State:
    """This rank's parts of what ``ranks`` ranks have written to the checkpoint ``uri``; {} if they have not written ``name``.

    Reads the ranges that this rank needs, one file after the other. ``ranks`` 0: one file of whole tensors, as format 2 has them.
    """
    from cmcgns import storage  # needs pyarrow, which engines do without

    files = [storage.join(uri, f"{name}_{rank}.safetensors") for rank in range(ranks)]
    if not storage.exists(files[0] if files else storage.join(uri, f"{name}.safetensors")):
        return {}
    if not files:
        with _opened(storage.join(uri, f"{name}.safetensors")) as file:
            return {key: split(file.get_tensor(key)).clone() for key in file.keys()}  # noqa: SIM118 (no dict)
    first = distributed.rank() * ranks // distributed.world_size()
    sizes: dict[str, int] = {}
    pieces: dict[int, State] = {}
    for rank in (first, *range(first), *range(first + 1, ranks)):
        if rank == first or any(_overlap(size, rank, ranks) for size in sizes.values()):
            with _opened(files[rank]) as file:
                sizes = json.loads(file.metadata()["sizes"])
                pieces[rank] = {key: _read(file, key, sizes.get(key), rank, ranks) for key in file.keys()}  # noqa: SIM118
    in_order = [pieces[rank] for rank in sorted(pieces)]
    return {
        key: torch.cat([each[key] for each in in_order]) if part.dim() else part for key, part in pieces[first].items()
    }


@contextmanager
def _opened(uri: str) -> Iterator[Any]:
    from cmcgns import storage

    with storage.local_copy(uri) as path, safe_open(path, "pt") as file:  # mapped: only what is taken is read
        yield file


def _overlap(size: int, rank: int, ranks: int) -> range:
    """Elements of this rank in the part of the writer ``rank`` of ``ranks``, counted from that part's first one."""
    start, stop = own_range(size)
    begin, end = own_range(size, rank, ranks)
    return range(max(start, begin) - begin, min(stop, end) - begin)


def _read(file: Any, key: str, size: int | None, rank: int, ranks: int) -> Tensor:
    if size is None:  # whole on every rank
        return file.get_tensor(key).clone()
    own = _overlap(size, rank, ranks)
    return file.get_slice(key)[own.start : own.stop].clone() if own else file.get_slice(key)[:0].clone()
