"""The objective on 1, 2 and 3 ranks, and ZeRO beside the plain engine over 20 steps; most tests lie beside the modules."""

import pytest

from tests.methods.test_ranks import (
    CONFIGS,
    OTHERS,
    Found,
    all_of_them,
    check_engines,
    check_ranks,
    fixture_text_encoder,
    test_siglip_holds_logits_of_some_texts_at_a_time,
)
from tests.ranks import run_on_ranks
from tests.train.test_engine import *  # noqa: F403

__all__ = ["fixture_text_encoder", "test_siglip_holds_logits_of_some_texts_at_a_time"]

STEPS = 20


@pytest.fixture(scope="module")
def single() -> dict[str, Found]:
    """What one rank has with the whole batch."""
    return all_of_them(list(CONFIGS))


@pytest.fixture(scope="module")
def of_ranks() -> dict[int, list[dict[str, Found]]]:
    """What each of two and of three ranks has."""
    return {ranks: run_on_ranks(ranks, all_of_them, list(CONFIGS)) for ranks in (2, 3)}


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_more_ranks_give_the_loss_and_gradient_of_one_whole_batch(
    name: str, ranks: int, single: dict[str, Found], of_ranks: dict[int, list[dict[str, Found]]]
) -> None:
    check_ranks(name, single, of_ranks[ranks])


@pytest.mark.distributed
@pytest.mark.parametrize("name", OTHERS)
def test_every_zero_stage_trains_every_method_like_plain_torch(name: str, text_encoder: str) -> None:
    check_engines(name, text_encoder, STEPS)
