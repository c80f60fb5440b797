"""Recall with equal similarities and equal reports, against a ranking by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from cmcgns.evaluate.pairs import Pairs
from cmcgns.evaluate.scores import Score
from cmcgns.evaluate.tasks.retrieval import DEPTHS, Retrieval, chance, retrieval_scores
from cmcgns.models.retrieval import first_hits


def pairs_of(image_ND: np.ndarray, report_ND: np.ndarray, hash_N: np.ndarray, films_of_patient: int = 1) -> Pairs:
    number = len(hash_N)
    empty = np.zeros(0, np.int64)
    return Pairs(
        study_N=np.arange(number), group_N=(np.arange(number) // films_of_patient).astype(str), path_N=np.arange(number),
        image_ND=image_ND.astype(np.float32), report_ND=report_ND.astype(np.float32), report_hash_N=hash_N,
        text_n=empty, study_of_n=empty, attended_nD=np.zeros((0, 2), np.float32), weight_nP=np.zeros((0, 1), np.float32),
        film_MHW=np.zeros((0, 8, 8), np.uint8),
    )  # fmt: skip


def measured(pairs: Pairs) -> dict[tuple[str, str], Score]:
    return {(score.setting, score.metric): score for score in retrieval_scores(pairs, "run", "phantom", 200, 0)}


def coarse(number: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integer features, so that many similarities are exactly equal, and some duplicate reports."""
    random = np.random.default_rng(seed)
    image_ND = random.integers(-2, 3, (number, 5))
    report_ND = np.where(random.random((number, 5)) < 0.7, image_ND, random.integers(-2, 3, (number, 5)))
    return image_ND, report_ND, random.integers(0, number // 2, number)


def wrong_before(query: np.ndarray, items: np.ndarray, right: list[bool]) -> int:
    """Number of wrong items before the first right one, with wrong items first among ties."""
    ranked = sorted(range(len(items)), key=lambda j: (-int(query @ items[j]), right[j]))
    return next(place for place, j in enumerate(ranked) if right[j])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk", [7, 1024])
def test_equal_similarities_count_against_a_query(seed: int, chunk: int) -> None:
    image_ND, report_ND, hash_N = coarse(40, seed)
    tensors = [torch.from_numpy(each).float() for each in (image_ND, report_ND)]
    found = first_hits(*tensors, torch.from_numpy(hash_N), chunk)
    for way, queries, items in (("i2t", image_ND, report_ND), ("t2i", report_ND, image_ND)):
        expected = [wrong_before(queries[i], items, (hash_N == hash_N[i]).tolist()) for i in range(40)]
        assert found[way].tolist() == expected


def test_features_that_are_all_alike_find_nothing() -> None:
    alike = np.tile([0.6, 0.8], (30, 1))
    for score in measured(pairs_of(alike, alike, np.arange(30))).values():
        assert (score.value, score.interval) == (0.0, (0.0, 0.0))
    # with identical features, a report that half of the studies share still ranks behind the other half
    assert {score.value for score in measured(pairs_of(alike, alike, np.arange(30) % 2)).values()} == {0.0}


def test_recall_at_each_depth_is_the_share_of_queries_with_fewer_wrong_items_before_the_right_one() -> None:
    image_ND, report_ND, hash_N = coarse(60, 5)
    found = measured(pairs_of(image_ND, report_ND, hash_N))
    for setting, queries, items in (("film to report", image_ND, report_ND), ("report to film", report_ND, image_ND)):
        before = [wrong_before(queries[i], items, (hash_N == hash_N[i]).tolist()) for i in range(60)]
        for depth in DEPTHS:
            score = found[setting, f"recall@{depth}"]
            assert score.value == pytest.approx(np.mean([each < depth for each in before]))
            low, high = score.interval or (1.0, 0.0)
            assert low <= score.value <= high
    assert 0 < found["film to report", "recall@1"].value < found["film to report", "recall@10"].value


def test_chance_is_the_recall_of_a_random_order() -> None:
    hash_N = np.array([0, 0, 0, 1, 1, *range(2, 17)])
    assert chance(hash_N, 1) == pytest.approx((9 + 4 + 15) / 20**2)
    random = np.random.default_rng(0)
    for depth in DEPTHS:
        drawn = [(hash_N[random.permutation(20)[:depth]] == query).any() for query in hash_N for _ in range(400)]
        assert chance(hash_N, depth) == pytest.approx(np.mean(drawn), abs=0.02)
    assert chance(hash_N[:3], 10) == chance(np.arange(4), 10) == 1.0
    note = measured(pairs_of(*coarse(40, 0)))["film to report", "recall@5"].note
    assert note == f"chance {chance(coarse(40, 0)[2], 5):.4f}"


def test_films_of_one_patient_are_drawn_together() -> None:
    """Four studies a patient, found or not found together: the interval is as wide as that of a quarter of the studies."""
    random = np.random.default_rng(0)
    basis = np.eye(80)
    lost = np.repeat(random.random(20) < 0.5, 4)
    image_ND = np.where(lost[:, None], np.roll(basis, 40, axis=0), basis)
    together = pairs_of(image_ND, basis, np.arange(80), films_of_patient=4)
    apart = dataclasses.replace(together, group_N=np.arange(80).astype(str))
    wide, narrow = (measured(each)["film to report", "recall@1"].interval or (0.0, 0.0) for each in (together, apart))
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(2.0, rel=0.3)


def test_depths_that_reach_all_items_are_left_out() -> None:
    rows_ND = np.eye(12, dtype=np.float32)
    for number, depths in ((1, ()), (2, (1,)), (10, (1, 5)), (11, (1, 5, 10))):
        pairs = pairs_of(rows_ND[:number], rows_ND[:number], np.arange(number))
        metrics = {score.metric for score in retrieval_scores(pairs, "encoder", "corpus", 10, 0)}
        assert metrics == {f"recall@{depth}" for depth in depths}
        assert all(chance(np.arange(number), depth) == 1 for depth in DEPTHS if depth not in depths)
    assert Retrieval.least_studies == 2
