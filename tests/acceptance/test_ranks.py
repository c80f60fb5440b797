"""The objective on 1, 2 and 3 ranks, and ZeRO beside the plain engine over 20 steps; most tests lie beside the modules."""

import pytest

from tests.methods.test_ranks import *  # noqa: F403
from tests.methods.test_ranks import CONFIGS, OTHERS, Found, all_of_them, check_engines, check_ranks
from tests.ranks import run_on_ranks
from tests.train.test_engine import *  # noqa: F403

STEPS = 20


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, Found]]:
    """What each of two ranks has."""
    return run_on_ranks(2, all_of_them)


@pytest.mark.distributed
@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_give_the_loss_and_gradient_of_one_whole_batch(
    name: str, single: dict[str, Found], of_two: list[dict[str, Found]]
) -> None:
    check_ranks(name, single, of_two)


@pytest.mark.distributed
@pytest.mark.parametrize("name", OTHERS)
def test_every_zero_stage_trains_every_method_like_plain_torch(name: str, text_encoder: str) -> None:
    check_engines(name, text_encoder, STEPS)
