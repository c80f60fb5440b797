"""Collectives with gradients, for tensors of equal and of ragged length; in one process each returns its argument.

W ranks; n rows on this rank, N rows on all ranks. Every function here but ``places_of_rows`` is collective: every rank enters.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


class _AllGather(torch.autograd.Function):
    """Rows of all ranks in rank order; a row's gradient is the sum over the losses of all ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, wire_dtype: torch.dtype) -> Tensor:
        return all_gather(rows, wire_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # never in wire_dtype: a sum over hundreds of ranks in bf16 loses bits
        own = grad.new_empty((grad.shape[0] // world_size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own, None


def all_gather(rows: Tensor, wire_dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of all ranks in rank order, without gradient; every rank passes the same number.

    float32 rows travel as ``wire_dtype`` and come out as float32, a rank's own ones rounded like all others; other types travel
    as they are.
    """
    if world_size() == 1:
        return rows
    sent = rows.to(wire_dtype) if rows.dtype == torch.float32 else rows
    gathered = sent.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, sent.contiguous())
    return gathered.to(rows.dtype)


def all_gather_with_grad(rows: Tensor, wire_dtype: torch.dtype = torch.float32) -> Tensor:
    """``all_gather`` whose gradients flow back to the rank that passed the rows, in the type of the rows."""
    return rows if world_size() == 1 else _AllGather.apply(rows, wire_dtype)


def ragged_all_gather(
    rows_n: Tensor, counts: Sequence[int], with_grad: bool = False, wire_dtype: torch.dtype = torch.float32
) -> Tensor:
    """``all_gather`` of ``counts[r]`` rows of rank r; the counts are known on the host."""
    if world_size() == 1:
        return rows_n
    gather = all_gather_with_grad if with_grad else all_gather
    longest = max(counts)
    padded = torch.cat([rows_n, rows_n.new_zeros((longest - rows_n.shape[0], *rows_n.shape[1:]))])
    return gather(padded, wire_dtype).index_select(0, places_of_rows(tuple(counts), rows_n.device))


@lru_cache(maxsize=4)
def places_of_rows(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the rows of all ranks stand, int64 (N), when each rank's ``counts`` are padded to the longest.

    Kept, because a microbatch gathers several tensors with the same counts: one operator each, whatever the number of ranks.
    """
    counts_W = np.array(counts)
    ends_W = counts_W.cumsum()
    shift_W = np.arange(len(counts)) * counts_W.max() - (ends_W - counts_W)
    place_N = torch.tensor(np.arange(ends_W[-1]) + shift_W.repeat(counts_W))
    return place_N.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else place_N.to(device)


def to_owners(score_NB: Tensor, counts: Sequence[int]) -> Tensor:
    """From all ranks' N rows on this rank's B columns to this rank's n rows on all ranks' G columns, with gradients.

    ``counts[r]`` of the rows belong to rank r; every rank has the same number of columns.
    """
    return score_NB if world_size() == 1 else _ToOwners.apply(score_NB, tuple(counts))


class _ToOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_NB: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts = counts
        number, size, ranks = counts[rank()], score_NB.shape[1], len(counts)
        flat = _all_to_all(score_NB.flatten(), [each * size for each in counts], [number * size] * ranks)
        return flat.view(ranks, number, size).transpose(0, 1).reshape(number, ranks * size)

    @staticmethod
    def backward(ctx: Any, grad_nG: Tensor) -> tuple[Tensor, None]:
        counts: tuple[int, ...] = ctx.counts
        ranks, number = len(counts), len(grad_nG)
        size = grad_nG.shape[1] // ranks
        by_rank = grad_nG.reshape(number, ranks, size).transpose(0, 1).flatten()
        flat = _all_to_all(by_rank, [number * size] * ranks, [each * size for each in counts])
        return flat.view(-1, size), None


def _all_to_all(flat: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    found = flat.new_empty(sum(received))
    dist.all_to_all_single(found, flat.contiguous(), list(received), list(sent))
    return found


def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """``tensor`` summed (or ``op``) over all ranks, without gradient and not in place."""
    if world_size() == 1:
        return tensor.detach()
    reduced = tensor.detach().clone()
    dist.all_reduce(reduced, op)
    return reduced


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's ``tensor`` on every rank; the others pass one of the same shape and type, which is overwritten."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Rank 0's picklable ``value`` on every rank, through host memory."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=host_group())
    return box[0]


def exchange(values: Sequence[int]) -> list[list[int]]:
    """A few integers of every rank, by rank, through host memory: never waits for the device."""
    return exchange_later(values)()


def exchange_later(values: Sequence[int]) -> Callable[[], list[list[int]]]:
    """A function that waits for the integers of every rank; they travel meanwhile."""
    if world_size() == 1:
        return lambda: [list(values)]
    own = torch.tensor(values, dtype=torch.int64)
    gathered = torch.empty(world_size() * len(values), dtype=torch.int64)
    work = dist.all_gather_into_tensor(gathered, own, group=host_group(), async_op=True)

    def arrived() -> list[list[int]]:
        work.wait()
        rows: list[list[int]] = gathered.view(world_size(), len(values)).tolist()
        return rows

    return arrived


def join_even(part: Tensor, size: int) -> Tensor:
    """``size`` elements, of which each rank passes its ceil(size / ranks), the last ones fewer; through host memory."""
    share = -(-size // world_size())
    padded = torch.cat([part, part.new_zeros(share - len(part))])
    whole = part.new_empty(share * world_size())
    dist.all_gather_into_tensor(whole, padded, group=host_group())
    return whole[:size]


def host_group() -> dist.ProcessGroup | None:
    """Group for host memory: the default group on gloo, else a gloo group next to NCCL."""
    if dist.get_backend() == "gloo":
        return None
    return _gloo_group(dist.group.WORLD)


@cache
def _gloo_group(world: Any) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")
