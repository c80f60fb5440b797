"""Collectives on two and three ranks, compared with the same sums in one process."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

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


WIRES = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Types that are half as wide as float32, and the most that a number loses when it is rounded to one, as a share of it."""
HASH = 2**40 + 1


def unit_rows(rank: int) -> Tensor:
    return F.normalize(rows_of(rank, COUNTS[rank]), dim=1).float()


def slopes_of(rank: int) -> Tensor:
    """Gradients of a rank's loss with respect to the rows of two ranks."""
    return torch.randn(sum(COUNTS[:2]), 5, generator=torch.Generator().manual_seed(10 + rank))


def gather_through(wire_dtype: torch.dtype) -> dict[str, Tensor]:
    """Ragged unit rows and two gradients, of a loss in which the rows are factors and of a linear one; then hashes, float64."""
    rank, counts = distributed.rank(), COUNTS[:2]
    own_nD = unit_rows(rank).requires_grad_()
    everyone_ND = distributed.ragged_all_gather(own_nD, counts, with_grad=True, wire_dtype=wire_dtype)
    [gradient_nD] = torch.autograd.grad(loss_of(own_nD, everyone_ND), own_nD, retain_graph=True)
    [linear_nD] = torch.autograd.grad((slopes_of(rank) * everyone_ND).sum(), own_nD)
    even_ND = distributed.all_gather_with_grad(own_nD[:1], wire_dtype)
    hash_W = distributed.all_gather(torch.tensor([HASH + rank]), wire_dtype)
    double_ND = distributed.all_gather_with_grad(rows_of(rank, 1), wire_dtype)
    parts = {"rows": everyone_ND, "even": even_ND, "gradient": gradient_nD, "linear gradient": linear_nD}
    return {name: part.detach() for name, part in (parts | {"hash": hash_W, "double": double_ND}).items()}


def gather_through_each() -> dict[torch.dtype, dict[str, Tensor]]:
    return {wire_dtype: gather_through(wire_dtype) for wire_dtype in (torch.float32, *WIRES)}


@pytest.fixture(scope="module", name="by_wire")
def fixture_by_wire() -> list[dict[torch.dtype, dict[str, Tensor]]]:
    """What each of two ranks has."""
    return run_on_ranks(2, gather_through_each)


@pytest.mark.distributed
@pytest.mark.parametrize("wire_dtype", [torch.float32, *WIRES])
def test_float32_rows_are_rounded_once_for_all_ranks_and_integers_and_float64_never(
    by_wire: list[dict[torch.dtype, dict[str, Tensor]]], wire_dtype: torch.dtype
) -> None:
    parts = [unit_rows(rank) for rank in range(2)]
    for found in (rank[wire_dtype] for rank in by_wire):
        assert found["rows"].dtype == found["even"].dtype == torch.float32
        assert torch.equal(found["rows"], torch.cat(parts).to(wire_dtype).float())
        assert torch.equal(found["even"], torch.stack([part[0] for part in parts]).to(wire_dtype).float())
        assert found["hash"].tolist() == [HASH, HASH + 1]
        assert torch.equal(found["double"], torch.cat([rows_of(rank, 1) for rank in range(2)]))


@pytest.mark.distributed
@pytest.mark.parametrize("wire_dtype", WIRES)
def test_gradients_travel_as_float32_and_differ_by_no_more_than_the_rounded_rows_explain(
    by_wire: list[dict[torch.dtype, dict[str, Tensor]]], wire_dtype: torch.dtype
) -> None:
    rows, slopes = sum(COUNTS[:2]), (slopes_of(0) + slopes_of(1)).split(COUNTS[:2])
    for rank, each in enumerate(by_wire):
        found, exact = each[wire_dtype], each[torch.float32]
        # of a linear loss they do not depend on the rows, so not a bit is lost on the way back
        assert torch.equal(found["linear gradient"], slopes[rank])
        assert found["gradient"].dtype == torch.float32
        # a rounded unit row moves by the share u, and with it each cosine and the slope of its sine: u in each of the N slopes of
        # a row as a column; u in each slope and u in each of the N columns that they weigh, of a row as itself
        distance_n = (found["gradient"] - exact["gradient"]).norm(dim=1)
        assert (distance_n > 0).all()
        assert (distance_n < 3 * rows * WIRES[wire_dtype]).all()


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
    narrow_nD = rows_nD.float()
    assert distributed.all_gather_with_grad(narrow_nD, torch.bfloat16) is narrow_nD
    assert torch.equal(distributed.all_reduce(rows_nD), rows_nD)
    assert distributed.broadcast_object("word") == "word"
    assert distributed.exchange([4, 5]) == [[4, 5]]
