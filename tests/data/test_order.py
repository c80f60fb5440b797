"""The order of an epoch: every study once, groups together in windows, independent of missing studies."""

import hashlib
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from cmcgns.config import DataConfig
from cmcgns.data.order import VALIDATION_EPOCH, Arrangement, arranged, study_keys
from cmcgns.data.readers import open_source
from cmcgns.data.stream import MAX_PIECES, Stream, piece_bounds

STUDIES, GROUP, WINDOW = 1000, 32, 4
PINNED = ((0, 0, "24411393aa7cd526"), (7, 3, "fdf992e3f62a5530"), (7, VALIDATION_EPOCH, "7a4aec930eb259dc"))
"""Seed, epoch and the hash of the order, computed at commit 769b561."""


def arrangement(studies: int = STUDIES) -> tuple[pa.Table, Arrangement]:
    return arranged(pa.table({"study_id": [f"s{number}" for number in range(studies)]}), GROUP)


def test_an_epoch_shows_every_study_once_in_windows_of_whole_groups() -> None:
    _, found = arrangement()
    order = found.epoch(seed=3, epoch=1, groups_per_window=WINDOW)
    assert sorted(order.row_S) == list(range(STUDIES))
    assert order.starts[0] == 0
    assert order.starts[-1] == STUDIES
    groups = [set(found.group_S[order.row_S[a:b]]) for a, b in zip(order.starts, order.starts[1:], strict=False)]
    assert all(len(each) == WINDOW for each in groups)
    assert sum(map(len, groups)) == len(set().union(*groups)) == found.groups


@pytest.mark.parametrize(("seed", "epoch", "expected"), PINNED)
def test_the_order_never_changes(seed: int, epoch: int, expected: str) -> None:
    """A run that an earlier version began goes on in its order."""
    _, found = arrangement()
    order = found.epoch(seed, epoch, WINDOW).row_S.astype("<i8").tobytes()
    assert hashlib.blake2b(order, digest_size=8).hexdigest() == expected


def test_epochs_and_seeds_differ_and_repeat() -> None:
    _, found = arrangement()
    orders = [tuple(found.epoch(seed, epoch, WINDOW).row_S) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert tuple(found.epoch(0, 1, WINDOW).row_S) == orders[1]


def test_a_window_is_fully_shuffled() -> None:
    _, found = arrangement()
    first = found.epoch(0, 0, WINDOW).row_S[: GROUP * WINDOW]
    neighbours = np.abs(np.diff(first)) == 1
    assert neighbours.mean() < 0.05


def test_a_missing_study_does_not_move_the_others() -> None:
    _, whole = arrangement()
    kept = np.random.default_rng(0).random(STUDIES) > 0.1
    part = Arrangement(whole.key_S[kept], whole.group_S[kept], whole.groups)
    for epoch in (0, 5, VALIDATION_EPOCH):
        order = whole.epoch(7, epoch, WINDOW).row_S
        assert (np.flatnonzero(kept)[part.epoch(7, epoch, WINDOW).row_S] == order[kept[order]]).all()


def test_the_order_of_a_raw_set_is_by_hash_and_not_by_file() -> None:
    table, found = arrangement()
    shuffled = table.take(np.random.default_rng(1).permutation(STUDIES))
    again, _ = arranged(shuffled, GROUP)
    assert again.equals(table)
    assert (np.diff(found.key_S) > 0).all()
    assert (study_keys(table) == found.key_S).all()


def test_validation_keeps_the_order_in_windows() -> None:
    _, found = arrangement()
    order = found.epoch(0, VALIDATION_EPOCH, WINDOW)
    assert (order.row_S == np.arange(STUDIES)).all()
    assert list(order.starts) == [*range(0, STUDIES, GROUP * WINDOW), STUDIES]


def test_few_studies_and_none() -> None:
    for studies in (0, 1, GROUP + 1):
        _, found = arrangement(studies)
        order = found.epoch(0, 0, WINDOW)
        assert sorted(order.row_S) == list(range(studies))
        assert order.starts[-1] == studies


@pytest.mark.parametrize("studies", [1, 64, 1_000, 64 * MAX_PIECES, 64 * MAX_PIECES + 1, 377_110])
@pytest.mark.parametrize("position", [0, 37])
def test_an_epoch_of_a_raw_set_has_few_pieces_that_cover_it(studies: int, position: int) -> None:
    tokenizer = cast("Any", None)  # pieces are cut by number alone
    stream = Stream(open_source("phantom"), None, max(studies, position + 1), tokenizer, DataConfig(), None)
    bounds = piece_bounds(stream, 0, position)
    assert bounds[0] == position
    assert bounds[-1] == stream.studies
    assert (np.diff(bounds) > 0).all()
    assert len(bounds) - 1 <= MAX_PIECES
    assert (np.diff(bounds[:-1]) % DataConfig().window_size == 0).all()
