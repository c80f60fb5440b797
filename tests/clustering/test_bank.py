"""The bank: which actor stores which rows, and which rows a re-clustering uses."""

import numpy as np
import pytest

from cmcgns.clustering.bank import BankShard, serving_actor


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("actors", [1, 2, 3, 4, 7])
def test_every_actor_is_served_and_every_push_has_one_actor(ranks: int, actors: int) -> None:
    served = {serving_actor(step, rank, ranks, actors) for step in range(actors) for rank in range(ranks)}
    assert served == set(range(actors))


def test_with_at_most_as_many_actors_as_ranks_each_rank_has_one_actor() -> None:
    assert {serving_actor(step, 3, 5, 2) for step in range(10)} == {1}


def test_rows_come_back_in_the_order_of_their_ordinals() -> None:
    bank = BankShard()
    rows_ND = np.arange(40, dtype=np.float32).reshape(10, 4)
    bank.push(2, 1, 7, rows_ND[7:])
    bank.push(1, 0, 0, rows_ND[:3])
    bank.push(2, 0, 5, rows_ND[5:5])  # a rank without sentences
    bank.push(1, 1, 3, rows_ND[3:7])
    found_ND, ordinals_N = bank.rows_between(2, 9)
    assert ordinals_N.tolist() == list(range(2, 9))
    assert np.array_equal(found_ND, rows_ND[2:9].astype(np.float16))


def test_forgetting_keeps_every_row_that_may_still_be_needed() -> None:
    bank = BankShard()
    for step in range(5):
        bank.push(step, 0, 10 * step, np.full((10, 2), step, np.float32))
    bank.forget_before(25)
    assert sorted(bank.chunks) == [(2, 0), (3, 0), (4, 0)]
    assert bank.rows_between(25, 50)[1].tolist() == list(range(25, 50))


def test_an_empty_bank_gives_no_rows() -> None:
    rows_ND, ordinals_N = BankShard().rows_between(0, 100)
    assert rows_ND.shape == (0, 0)
    assert not len(ordinals_N)
