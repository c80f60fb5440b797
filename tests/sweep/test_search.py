"""Proposals of a sweep: the same trials for the same seed, better ones from Optuna, each point of a grid once."""

import math
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import pytest

from cmcgns.cli import load_config
from cmcgns.config import Config
from cmcgns.errors import UserError
from cmcgns.methods.cm_cgns.settings import Settings
from cmcgns.sweep.search import SearchName, Space, apply_drawn, build_search, grid_axes, read_space
from tests.jobs import TINY

BASE = load_config([], Config, TINY)
SPACE = read_space(Settings().sweep_space(4000), BASE)
CHOICES: dict[str, Any] = {
    "objective.num_clusters": {"choice": [16, 32, 64]},
    "objective.false_negatives": {"choice": ["margin", "both"]},
}


def hill(drawn: dict[str, Any]) -> float:
    """Maximum, 0, for a mask ratio of 0.6, temperatures of 0.1 and 0.2, and 64 clusters."""
    return -(
        10 * (drawn["objective.mask_ratio"] - 0.6) ** 2
        + math.log(drawn["objective.temperature"] / 0.1) ** 2
        + math.log(drawn["objective.sentence_temperature"] / 0.2) ** 2
        + 0.1 * abs(math.log2(drawn["objective.num_clusters"] / 64))
    )


def proposed(
    search: SearchName, space: Space, trials: int, seed: int, score: Callable[[dict[str, Any]], float]
) -> list[dict[str, Any]]:
    """Trials one at a time, each score reported before the next."""
    algorithm, found = build_search(search, space, "score", trials, seed), []
    for number in range(trials):
        found.append(algorithm.suggest(str(number)))
        algorithm.on_trial_complete(str(number), {"score": score(found[-1])})
    return found


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_the_same_seed_proposes_the_same_trials(search: SearchName) -> None:
    first, again = (proposed(search, SPACE, 12, 7, hill) for _ in range(2))
    assert first == again
    assert proposed(search, SPACE, 12, 8, hill) != first


def test_random_trials_do_not_depend_on_results() -> None:
    assert proposed("random", SPACE, 12, 7, hill) == proposed("random", SPACE, 12, 7, lambda drawn: -hill(drawn))


def test_optuna_beats_random_in_the_median_of_20_seeds() -> None:
    best = {
        search: median(max(map(hill, proposed(search, SPACE, 30, seed, hill))) for seed in range(20))
        for search in ("random", "optuna")
    }
    assert best["optuna"] > best["random"]


def test_a_grid_is_each_point_once() -> None:
    space = read_space(CHOICES, BASE)
    points = {tuple(drawn.values()) for drawn in proposed("grid", space, 6, 0, lambda drawn: 0.0)}
    assert points == set(product([16, 32, 64], ["margin", "both"]))


def test_a_grid_refuses_a_range() -> None:
    with pytest.raises(UserError, match=r"grid accepts no ranges, and objective.mask_ratio is one"):
        grid_axes(SPACE)


@pytest.mark.parametrize(
    ("sentences", "clusters"), [(4000, [16, 32, 64, 128, 256, 512]), (10**6, [2**p for p in range(4, 11)]), (20, [16])]
)
def test_no_more_clusters_are_drawn_than_a_quarter_of_the_sentences(sentences: int, clusters: list[int]) -> None:
    assert Settings().sweep_space(sentences)["objective.num_clusters"] == {"choice": clusters}


@pytest.mark.parametrize(
    ("negatives", "used"), [("sentences", {"sentence"}), ("films", {"film"}), ("both", {"sentence", "film"})]
)
def test_temperatures_are_drawn_only_for_losses_in_use(negatives: str, used: set[str]) -> None:
    space = Settings.model_validate({"local_negatives": negatives}).sweep_space(4000)
    assert {key for key in space if key.endswith("_temperature")} == {f"objective.{name}_temperature" for name in used}


def test_a_drawn_temperature_is_not_learnt() -> None:
    config = apply_drawn(BASE, {"objective.temperature": 0.07})
    assert (config.objective.temperature, config.objective.learn_temperature) == (0.07, False)
    assert apply_drawn(BASE, {"objective.mask_ratio": 0.3}).objective.learn_temperature


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({}, "sweep.space is empty"),
        ({"objective.maskratio": {"uniform": [0.2, 0.8]}}, "did you mean objective.mask_ratio"),
        ({"objective.mask_ratio": {"uniform": [0.8, 0.2]}}, "from 0.8 to 0.2 is empty"),
        ({"objective.mask_ratio": {"uniform": [0.5, 0.5]}}, "from 0.5 to 0.5 is empty"),
        ({"objective.mask_ratio": {"uniform": [0.2, 1.8]}}, "objective.mask_ratio = 1.8"),
        ({"objective.mask_ratio": {"uniform": [0.2]}}, "needs two numbers"),
        ({"objective.mask_ratio": {"gaussian": [0.2, 0.8]}}, "is not a range; give one of uniform"),
        ({"objective.mask_ratio": 0.5}, "is not a range"),
        ({"objective.num_clusters": {"choice": []}}, "needs a list of values"),
        ({"objective.num_clusters": {"choice": [16, 1]}}, "objective.num_clusters = 1"),
        ({"objective.num_clusters": {"uniform": [16, 64]}}, "objective.num_clusters = 33.6"),
        ({"objective.num_clusters": {"integer": [16.5, 64]}}, "needs two whole numbers"),
        ({"objective.temperature": {"log_uniform": [0, 0.5]}}, "has no logarithm"),
    ],
)
def test_a_wrong_space_is_refused_in_one_message(written: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        read_space(written, BASE)
