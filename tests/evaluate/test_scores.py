"""Intervals by resampling whole groups, the same for every encoder; areas under ROC curves against scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cmcgns.evaluate import scores
from cmcgns.evaluate.scores import Floats, Resampling, Score, differences, over_draws, percentiles, weighted_auc
from cmcgns.evaluate.tasks.classification import class_auc


def weights(resampling: Resampling) -> Floats:
    """How often each image was drawn in each resample."""
    return np.concatenate([weight_rN for _, weight_rN in resampling.chunks()])


def labelled(number: int, seed: int, levels: int = 12) -> tuple[Floats, Floats]:
    """Scores with many ties, and labels that they weakly predict."""
    random = np.random.default_rng(seed)
    label_N = random.integers(0, 2, number).astype(np.float64)
    return np.rint(random.normal(label_N, 1.5) * levels / 6), label_N


@pytest.mark.parametrize("seed", range(3))
def test_the_weighted_area_is_scikit_learns(seed: int) -> None:
    score_N, label_N = labelled(150, seed)
    assert len(np.unique(score_N)) < 30
    weight_RN = np.random.default_rng(seed).poisson(1.0, (20, 150)).astype(np.float64)
    found_R = weighted_auc(score_N, label_N > 0.5, weight_RN)
    expected = [roc_auc_score(label_N, score_N, sample_weight=weight_N) for weight_N in weight_RN]
    assert found_R == pytest.approx(expected, abs=1e-12)


def test_a_resample_of_one_side_alone_has_no_area() -> None:
    weight_RN = np.array([[1.0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]])
    found_R = weighted_auc(np.arange(4.0), np.array([False, False, True, True]), weight_RN)
    assert np.isnan(found_R).tolist() == [True, True, False]


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.01, 0.5), (1e6, 0.0), (1.0, 4e5), (1e-9, 0.0)])
def test_the_area_of_a_class_is_scikit_learns_whatever_the_range_of_the_scores(scale: float, shift: float) -> None:
    score_N, label_N = labelled(300, 1)
    label_N[::7] = np.nan
    known = np.isfinite(label_N)
    expected = roc_auc_score(label_N[known], score_N[known])
    assert class_auc(scale * score_N + shift, label_N) == pytest.approx(expected, abs=1e-6)


def test_resamples_draw_whole_groups() -> None:
    groups = [f"patient {i // 3}" for i in range(60)]
    weight_RN = weights(Resampling.of(groups, 200, seed=3))
    by_group_RGN = weight_RN.reshape(200, 20, 3)
    assert (by_group_RGN == by_group_RGN[:, :, :1]).all()
    assert (by_group_RGN[:, :, 0].sum(1) == 20).all()
    # a group is left out of (1 - 1/20)^20 = 0.36 of the resamples; 4000 draws make the standard error below 0.01
    assert (by_group_RGN[:, :, 0] == 0).mean() == pytest.approx(0.36, abs=0.03)


def test_resamples_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    resampling, (score_N, label_N) = Resampling.of([str(i // 2) for i in range(80)], 50), labelled(80, 0)
    whole = resampling.auc(score_N, label_N), resampling.mean(score_N)
    monkeypatch.setattr(scores, "CHUNK_BYTES", 80 * 8 * 7)
    assert [len(weight_rN) for _, weight_rN in resampling.chunks()] == [7] * 7 + [1]
    assert (resampling.auc(score_N, label_N) == whole[0]).all()
    assert (resampling.mean(score_N) == whole[1]).all()


def test_unknown_values_take_no_part_in_any_resample() -> None:
    resampling, (score_N, label_N) = Resampling.of([str(i // 2) for i in range(80)], 30, seed=1), labelled(80, 2)
    value_N = np.where(np.arange(80) % 5 == 0, np.nan, score_N)
    unknown_N = np.where(np.arange(80) % 5 == 0, np.nan, label_N)
    known = np.isfinite(value_N)
    means_R, areas_R = resampling.mean(value_N), resampling.auc(score_N, unknown_N)
    for row, weight_N in enumerate(weights(resampling)[:, known]):
        assert means_R[row] == pytest.approx(np.average(score_N[known], weights=weight_N))
        assert areas_R[row] == pytest.approx(roc_auc_score(label_N[known], score_N[known], sample_weight=weight_N))
    assert np.isnan(resampling.mean(np.full(80, np.nan))).all()
    assert percentiles(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
    assert percentiles(np.full(3, np.nan)) is None


def test_95_of_100_intervals_hold_the_truth_where_groups_are_kept_whole() -> None:
    """Hits of 60 patients with three films each, all hits or all misses: 300 sets with a known true mean."""
    truth, held, torn = 0.6, 0, 0
    for seed in range(300):
        hit_N = np.repeat(np.random.default_rng([7, seed]).random(60) < truth, 3).astype(np.float64)
        by_patient = Resampling.of([str(i // 3) for i in range(180)], 400, seed).mean(hit_N)
        by_film = Resampling.of([str(i) for i in range(180)], 400, seed).mean(hit_N)
        for interval, kind in ((percentiles(by_patient), "held"), (percentiles(by_film), "torn")):
            inside = interval[0] <= truth <= interval[1]
            held, torn = held + (inside and kind == "held"), torn + (inside and kind == "torn")
    # the standard error of a share of 0.95 over 300 sets is 0.0126: three of them, to either side
    assert held / 300 == pytest.approx(0.95, abs=0.038)
    # films drawn separately count as three times as many patients: 1.96 / sqrt(3) deviations cover 0.74
    assert torn / 300 < 0.85


def score(encoder: str, value_N: Floats, metric: str = "recall@1", seed: int = 0) -> Score:
    resampled_R = Resampling.of([str(i) for i in range(len(value_N))], 500, seed).mean(value_N)
    return Score("retrieval", "phantom", "", metric, encoder, float(value_N.mean()), len(value_N), resampled_R)


def test_two_encoders_are_compared_over_the_same_resamples() -> None:
    random = np.random.default_rng(0)
    hit_N = (random.random(200) < 0.5).astype(np.float64)
    better_N = np.where(random.random(200) < 0.05, 1.0, hit_N)  # the same but for a few films
    (found,) = differences([score("a", better_N), score("b", hit_N)], "a")
    expected_R = Resampling.of([str(i) for i in range(200)], 500).mean(better_N - hit_N)
    assert found.value == pytest.approx((better_N - hit_N).mean())
    assert found.interval == pytest.approx(percentiles(expected_R))
    low, high = score("a", better_N).interval or (0, 0)
    assert found.interval[1] - found.interval[0] < (high - low) / 2


def test_only_equal_numbers_are_compared() -> None:
    hit_N = np.array([1.0, 0, 1, 1])
    listed = [score("a", hit_N), score("a", hit_N, "recall@5"), score("b", hit_N), score("c", hit_N, "recall@10")]
    found = differences(listed, "a")
    assert [(each.first.key, each.second.key, each.second.encoder) for each in found] == [
        (listed[0].key, listed[2].key, "b")
    ]
    assert found[0].interval == (0.0, 0.0)
    assert differences(listed, "c") == []


def test_a_mean_over_label_draws_varies_with_the_draws_too() -> None:
    random = np.random.default_rng(0)
    alike_SR = [np.full(4000, 0.8)] * 4
    assert over_draws([0.8] * 4, alike_SR) == (pytest.approx(0.8), pytest.approx(np.full(4000, 0.8)))
    value_S = random.normal(0.8, 0.1, 4)
    value, resampled_R = over_draws(list(value_S), [np.full(4000, each) for each in value_S])
    assert value == pytest.approx(value_S.mean())
    # draws are independent: the deviation of a mean of four of them, to a few standard errors of 1.1 %
    assert resampled_R.std() == pytest.approx(value_S.std() / 2, rel=0.05)
    one_R = random.random(50)
    assert (over_draws([0.5], [one_R])[1] == one_R).all()
