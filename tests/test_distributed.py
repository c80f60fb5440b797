"""Collectives on two and three ranks, compared with the same sums in one process."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cmcgns import distributed
from tests.ranks import run_on_ranks

COUNTS = (3, 1, 4)


def rows_of(rank: int, count: int) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def loss_of(own_nD: Tensor, everyone_ND: Tensor) -> Tensor:
    """A loss that combines every own row with every row."""
    return (own_nD @ everyone_ND.T).sin().sum()


def gather_even_and_ragged() -> dict[str, Tensor]:
    """Gathered rows and the gradient of the sum of all ranks' losses, for equal and for ragged rows."""
    rank, world = distributed.rank(), distributed.world_size()
    found = {}
    for kind, counts in (("even", (2,) * world), ("ragged", COUNTS[:world])):
        own_nD = rows_of(rank, counts[rank]).requires_grad_()
        if kind == "even":
            everyone_ND = distributed.all_gather_with_grad(own_nD)
            silent_ND = distributed.all_gather(own_nD.detach())
        else:
            everyone_ND = distributed.ragged_all_gather(own_nD, counts, with_grad=True)
            silent_ND = distributed.ragged_all_gather(own_nD.detach(), counts)
        loss_of(own_nD, everyone_ND).backward()
        assert torch.equal(silent_ND, everyone_ND)
        assert own_nD.grad is not None
        found[kind], found[f"{kind} gradient"] = everyone_ND.detach(), own_nD.grad
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_gathered_rows_and_gradients_are_those_of_one_process(ranks: int) -> None:
    found = run_on_ranks(ranks, gather_even_and_ragged)
    for kind, counts in (("even", (2,) * ranks), ("ragged", COUNTS[:ranks])):
        parts = [rows_of(rank, count).requires_grad_() for rank, count in enumerate(counts)]
        everyone_ND = torch.cat(parts)
        sum((loss_of(part, everyone_ND) for part in parts), torch.zeros(())).backward()
        for rank, part in enumerate(parts):
            assert torch.equal(found[rank][kind], everyone_ND)
            torch.testing.assert_close(found[rank][f"{kind} gradient"], part.grad, rtol=0, atol=1e-12)


def speak_to_each_other() -> tuple[list[list[int]], object, list[float], list[float], list[float]]:
    rank = distributed.rank()
    told = distributed.exchange([rank, 10 * rank])
    heard = distributed.broadcast_object({"from": rank} if rank == 0 else None)
    own = torch.tensor([float(rank + 1)], requires_grad=True)
    total = distributed.all_reduce(own)
    assert float(own) == rank + 1  # not in place
    assert not total.requires_grad
    smallest = distributed.all_reduce(own, dist.ReduceOp.MIN)
    word = distributed.broadcast(torch.tensor([float(rank + 7)]))
    return told, heard, total.tolist(), smallest.tolist(), word.tolist()


@pytest.mark.distributed
def test_ranks_exchange_integers_objects_and_sums() -> None:
    for answer in run_on_ranks(3, speak_to_each_other):
        assert answer == ([[0, 0], [1, 10], [2, 20]], {"from": 0}, [6.0], [1.0], [7.0])


def test_in_one_process_every_collective_is_the_identity() -> None:
    rows_nD = rows_of(0, 3)
    assert distributed.rank() == 0
    assert distributed.world_size() == 1
    assert distributed.all_gather_with_grad(rows_nD) is rows_nD
    assert distributed.ragged_all_gather(rows_nD, [3]) is rows_nD
    assert torch.equal(distributed.all_reduce(rows_nD), rows_nD)
    assert distributed.broadcast_object("word") == "word"
    assert distributed.exchange([4, 5]) == [[4, 5]]
