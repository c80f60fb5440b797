"""Several items at once: in order, bounded, and none begun after a failure."""

import time

import pytest

from cmcgns.storage.ahead import map_ahead


@pytest.mark.parametrize("ahead", [4, None])
def test_items_are_read_ahead_in_order_and_no_further_than_allowed(ahead: int | None) -> None:
    begun = list[int]()
    results = map_ahead(lambda i: begun.append(i) or i * i, range(100), 4, ahead)  # type: ignore[func-returns-value]
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(begun) <= 3 + 4
    assert list(results) == [i * i for i in range(3, 100)]


def test_after_a_failure_nothing_more_is_begun() -> None:
    begun = list[int]()

    def read(number: int) -> None:
        begun.append(number)
        time.sleep(0.05)
        if number == 0:
            raise ValueError

    with pytest.raises(ValueError):
        list(map_ahead(read, range(50), 1, 20))
    assert len(begun) <= 3
