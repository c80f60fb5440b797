"""Grounding: scores against their definition, and sentences that attend to their finding."""

import dataclasses
from functools import cache

import numpy as np
import pytest

from cmcgns.config import DataConfig
from cmcgns.data.labelled import phantom_set
from cmcgns.data.readers import PhantomSource
from cmcgns.data.reports import parse_report
from cmcgns.evaluate.pairs import Pairs
from cmcgns.evaluate.scores import Score
from cmcgns.evaluate.sentence_truth import sentence_truth
from cmcgns.evaluate.tasks.grounding import contrast_to_noise, grounding_scores
from cmcgns.phantom import FINDINGS, PhantomCorpus

STUDIES, SIDE, GRID = 30, 64, 4
SOURCE = PhantomSource(STUDIES, 0, SIDE, SIDE, crop_borders=False)
DATA = DataConfig(resize=SIDE, image_size=SIDE)


@pytest.mark.parametrize("seed", range(5))
def test_contrast_to_noise_is_its_definition_where_patches_are_covered_or_not(seed: int) -> None:
    random = np.random.default_rng(seed)
    weight_P, covered_P = random.random(49), random.random(49) < 0.3
    inside, outside = weight_P[covered_P], weight_P[~covered_P]
    expected = (inside.mean() - outside.mean()) / np.sqrt(inside.var() + outside.var())
    assert contrast_to_noise(weight_P, covered_P.astype(float)) == pytest.approx(expected)
    assert contrast_to_noise(-weight_P, covered_P.astype(float)) == pytest.approx(-expected)


def test_a_patch_that_is_half_covered_counts_as_half_a_patch_on_either_side() -> None:
    random = np.random.default_rng(0)
    weight_P, covered_P = random.random(16), random.integers(0, 5, 16) / 4
    quarters = np.repeat(weight_P, 4), np.concatenate([np.arange(4) < 4 * share for share in covered_P])
    assert contrast_to_noise(weight_P, covered_P) == pytest.approx(
        contrast_to_noise(quarters[0], quarters[1].astype(float))
    )


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 49, 1e-6])
@pytest.mark.parametrize("seed", range(4))
def test_weights_that_do_not_vary_have_no_contrast_to_noise(value: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    shares = random.random(49)
    for covered_P in (shares, (shares < 0.4).astype(float)):
        assert np.isnan(contrast_to_noise(np.full(49, value), covered_P))
    apart = np.where(shares < 0.4, 3 * value, value)  # constant inside and outside: no noise to divide by
    assert np.isnan(contrast_to_noise(apart, (shares < 0.4).astype(float)))


def test_a_finding_nowhere_or_everywhere_has_no_contrast() -> None:
    weight_P = np.arange(16.0)
    assert np.isnan(contrast_to_noise(weight_P, np.zeros(16)))
    assert np.isnan(contrast_to_noise(weight_P, np.ones(16)))


@cache
def read_pairs() -> tuple[Pairs, np.ndarray]:
    """Every sentence of the phantom, and the share of each patch that its finding covers, by a loop; 0 if it names none."""
    corpus = PhantomCorpus(STUDIES, 0, SIDE, SIDE)
    texts, study_of, covered = [], [], []
    cell = SIDE // GRID
    for number in range(STUDIES):
        masks = corpus.truth(number).masks
        for text in parse_report(corpus.study(number).report).sentences:
            truth = sentence_truth(text)
            there = truth and not truth.negated and masks.get(truth.finding) if truth else None
            mask_HW = there if there is not None and there is not False else np.zeros((SIDE, SIDE), bool)
            cells = [(y, x) for y in range(0, SIDE, cell) for x in range(0, SIDE, cell)]
            covered.append([mask_HW[y : y + cell, x : x + cell].mean() for y, x in cells])
            texts.append(text)
            study_of.append(number)
    nothing = np.zeros((STUDIES, 2), np.float32)
    pairs = Pairs(
        study_N=np.arange(STUDIES), group_N=np.array([corpus.study(i).patient_id for i in range(STUDIES)], object),
        path_N=np.array([f"{i}/0" for i in range(STUDIES)], object), image_ND=nothing, report_ND=nothing,
        report_hash_N=np.arange(STUDIES), text_n=np.array(texts, object), study_of_n=np.array(study_of),
        attended_nD=np.zeros((len(texts), 2), np.float32), weight_nP=np.zeros((len(texts), GRID**2), np.float32),
        film_MHW=np.zeros((0, 8, 8), np.uint8),
    )  # fmt: skip
    return pairs, np.array(covered)


def measured(pairs: Pairs, weight_nP: np.ndarray) -> dict[str, Score]:
    looking = dataclasses.replace(pairs, weight_nP=weight_nP.astype(np.float32))
    return {score.metric: score for score in grounding_scores(looking, phantom_set(SOURCE), DATA, "run", 100, 0)}


def test_sentences_that_look_at_their_finding_hit_and_those_that_look_elsewhere_miss() -> None:
    pairs, covered_nP = read_pairs()
    said = covered_nP.any(1)
    kinds = {truth.finding for truth in map(sentence_truth, pairs.text_n[said]) if truth}
    assert len(kinds) >= 5
    assert kinds <= set(FINDINGS)
    right, wrong = measured(pairs, covered_nP), measured(pairs, -covered_nP)
    assert right["pointing game"].number == said.sum()
    assert right["pointing game"].value == 1.0
    assert right["pointing game"].interval == (1.0, 1.0)
    # on a grid this coarse an effusion may touch every patch
    everywhere = (covered_nP[said] > 0).all(1).mean()
    assert wrong["pointing game"].value == pytest.approx(everywhere)
    assert right["contrast to noise"].value == pytest.approx(-wrong["contrast to noise"].value)
    assert right["contrast to noise"].value > 1
    assert right["pointing game"].note == f"by chance {(covered_nP[said] > 0).mean():.3f}"


def test_sentences_that_look_anywhere_hit_by_chance() -> None:
    pairs, covered_nP = read_pairs()
    random = np.random.default_rng(0)
    values = [measured(pairs, random.random(covered_nP.shape))["pointing game"].value for _ in range(2)]
    said = covered_nP.any(1)
    # about 60 sentences, twice: the standard error is below 0.05
    assert said.sum() > 50
    assert np.mean(values) == pytest.approx((covered_nP[said] > 0).mean(), abs=0.12)
