"""The phantom corpus: its films and their ground truth."""

import hashlib
import subprocess
import sys
from collections import defaultdict

import cv2
import numpy as np
import pytest

from cmcgns.phantom import FINDINGS, PhantomCorpus
from cmcgns.phantom.canvas import Draws, normal_array, permuted, uniform_array
from cmcgns.phantom.corpus import box_of
from tests.phantom.phantom_probe import films_and_labels, linear_auc

SMALL = PhantomCorpus(400, seed=3, height=96, width=96)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    cv2.setNumThreads(1)


def studies_with(finding: str, count: int) -> list[int]:
    return [i for i in range(SMALL.studies) if SMALL.study(i).labels[finding]][:count]


def test_a_short_corpus_is_the_start_of_a_long_one() -> None:
    short, long = PhantomCorpus(30, seed=5, height=64, width=64), PhantomCorpus(3000, seed=5, height=64, width=64)
    assert [short.study(i) for i in reversed(range(30))] == [long.study(i) for i in range(30)][::-1]
    assert np.array_equal(short.render(29), long.render(29))


def test_two_seeds_share_nothing() -> None:
    one, two = PhantomCorpus(200, seed=0), PhantomCorpus(200, seed=1)
    assert not {one.study(i).patient_id for i in range(200)} & {two.study(i).patient_id for i in range(200)}
    assert one.study(0).report != two.study(0).report


def test_another_process_draws_the_same_films_and_reports() -> None:
    program = (
        "import hashlib; from cmcgns.phantom import PhantomCorpus;"
        "c, h = PhantomCorpus(50, seed=9, height=96, width=96), hashlib.sha256();"
        "[h.update(c.render(i).tobytes() + c.study(i).report.encode()) for i in (40, 7, 21)]; print(h.hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    corpus, here = PhantomCorpus(50, seed=9, height=96, width=96), hashlib.sha256()
    corpus.render(0)  # earlier draws have no effect
    for i in (40, 7, 21):
        here.update(corpus.render(i).tobytes() + corpus.study(i).report.encode())
    assert there.stdout.strip() == here.hexdigest()


def test_facts_and_reports_equal_the_recorded_ones() -> None:
    corpus, found = PhantomCorpus(300, seed=0), hashlib.sha256()
    for i in range(300):
        study = corpus.study(i)
        facts = (study.study_id, study.patient_id, study.split, study.films, sorted(study.labels.items()), study.report)
        found.update(repr(facts).encode())
    assert found.hexdigest()[:16] == "93f18234e57fc3a1"


def test_films_are_within_a_grey_level_of_the_recorded_ones() -> None:
    corpus = PhantomCorpus(8, seed=0, height=128, width=128)
    golden = {
        0: [71.3, 96.3, 140.3, 56.8, 167.0, 113.3, 132.2, 144.5, 77.0, 173.7, 200.9, 119.1, 101.9, 214.0, 211.2, 120.1],
        3: [
            110.9,
            145.6,
            162.5,
            115.2,
            157.6,
            167.9,
            149.4,
            173.1,
            151.3,
            207.5,
            183.4,
            144.5,
            163.5,
            204.5,
            197.8,
            138.9,
        ],
        5: [
            123.7,
            165.1,
            124.8,
            88.2,
            159.8,
            149.5,
            121.2,
            152.7,
            171.4,
            194.9,
            174.6,
            83.8,
            193.9,
            190.0,
            182.0,
            103.9,
        ],
    }
    for i, expected in golden.items():
        coarse = cv2.resize(corpus.render(i).astype(np.float32), (4, 4), interpolation=cv2.INTER_AREA)
        assert np.abs(coarse.ravel() - np.array(expected)).max() <= 1


def test_no_patient_crosses_splits_and_all_splits_are_filled() -> None:
    corpus, splits, studies = PhantomCorpus(3000), defaultdict(set), defaultdict(int)
    for i in range(3000):
        study = corpus.study(i)
        splits[study.patient_id].add(study.split)
        studies[study.split] += 1
    assert all(len(names) == 1 for names in splits.values())
    assert 0.74 < studies["train"] / 3000 < 0.86
    assert min(studies["valid"], studies["test"]) > 200


def test_ids_are_unique_and_look_like_those_of_mimic() -> None:
    corpus = PhantomCorpus(5000)
    all_studies = [corpus.study(i) for i in range(5000)]
    assert len({study.study_id for study in all_studies}) == 5000
    images = [film.image_id for study in all_studies for film in study.films]
    assert len(set(images)) == len(images)
    assert all(len(study.study_id) == len(study.patient_id) == 9 for study in all_studies)
    assert {len(part) for part in images[0].split("-")} == {8}
    assert sorted(permuted(i, 1000, "any") for i in range(1000)) == list(range(1000))


def test_patients_have_one_to_four_studies_and_some_studies_two_films() -> None:
    corpus, count = PhantomCorpus(2400), defaultdict(int)
    films = []
    for i in range(2400):
        count[corpus.study(i).patient_id] += 1
        films.append(len(corpus.study(i).films))
    assert set(count.values()) == {1, 2, 3, 4}
    assert set(films) == {1, 2}
    assert 0.11 < films.count(2) / 2400 < 0.19


def test_a_patient_keeps_their_anatomy_and_implants() -> None:
    corpus, seen = PhantomCorpus(600), {}
    for i in range(600):
        study = corpus.study(i)
        worn = {finding.kind for finding in study.findings} & {"pacemaker", "sternotomy wires"}
        assert seen.setdefault(study.patient_id, (study.patient, worn)) == (study.patient, worn)


def test_every_finding_is_common_enough_to_learn_and_some_studies_are_normal() -> None:
    corpus = PhantomCorpus(2000)
    labels = np.array([list(corpus.study(i).labels.values()) for i in range(2000)])
    assert labels.mean(0).min() > 0.1
    assert labels.mean(0).max() < 0.5
    assert 0.1 < (labels.sum(1) == 0).mean() < 0.3


def test_two_films_of_a_study_differ_in_pixels_and_not_in_truth() -> None:
    pairs = [i for i in range(60) if len(SMALL.study(i).films) == 2]
    for i in pairs[:3]:
        first, second = SMALL.render(i, 0).astype(int), SMALL.render(i, 1).astype(int)
        assert np.abs(first - second).mean() > 3
        assert SMALL.truth(i, 0).labels == SMALL.truth(i, 1).labels
        assert set(SMALL.truth(i, 0).masks) == set(SMALL.truth(i, 1).masks)
    with pytest.raises(IndexError, match="not a film 2"):
        SMALL.render(pairs[0], 2)


def test_a_small_film_is_a_large_one_shrunk() -> None:
    small, large = PhantomCorpus(12, height=128, width=128), PhantomCorpus(12)
    for i in range(12):
        afar = cv2.resize(large.render(i).astype(np.float32), (128, 128), interpolation=cv2.INTER_AREA)
        near = small.render(i).astype(np.float32)
        assert np.abs(near - afar).mean() < 4
        assert np.corrcoef(near.ravel(), afar.ravel())[0, 1] > 0.985
        for name, mask in small.truth(i).masks.items():
            assert abs(mask.mean() - large.truth(i).masks[name].mean()) < 0.01


def test_a_wide_film_shows_the_square_one_in_its_middle() -> None:
    wide = PhantomCorpus(4, height=96, width=160).render(2)
    square = PhantomCorpus(4, height=96, width=96).render(2)
    assert wide.shape == (96, 160)
    assert np.corrcoef(wide[20:76, 52:108].ravel(), square[20:76, 20:76].ravel())[0, 1] > 0.9


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_finding_changes_the_film_where_its_mask_says(finding: str) -> None:
    for i in studies_with(finding, 8):
        truth = SMALL.truth(i)
        change = np.abs(SMALL.render(i).astype(int) - SMALL.render_without(i, finding).astype(int))
        mask = truth.masks[finding]
        assert change[mask].mean() > 5
        assert change[mask].mean() > 4 * change[~mask].mean()
        covered = np.zeros_like(mask)
        for x0, y0, x1, y1 in truth.boxes[finding]:
            assert 0 <= x0 < x1 <= 96
            assert 0 <= y0 < y1 <= 96
            covered[int(y0) : int(y1), int(x0) : int(x1)] = True
        assert covered[mask].all()


def test_a_finding_has_one_box_per_location() -> None:
    for i in range(60):
        study, truth = SMALL.study(i), SMALL.truth(i)
        assert set(truth.boxes) == {finding.name for finding in study.findings}
        for name, boxes in truth.boxes.items():
            found = [finding for finding in study.findings if finding.name == name]
            per_place = ("effusion", "edema", "atelectasis")
            assert len(boxes) == sum(len(f.sides) if name in per_place else 1 for f in found)


def test_the_right_lung_is_at_the_left_of_the_image() -> None:
    for i in range(20):
        masks = SMALL.truth(i).masks
        right, left = box_of(masks["lung_right"]), box_of(masks["lung_left"])
        assert right[0] + right[2] < left[0] + left[2]
        assert masks["heart"].any()


@pytest.mark.parametrize("finding", ["effusion", "pneumothorax", "consolidation", "nodule"])
def test_a_one_sided_finding_is_in_the_lung_of_its_side(finding: str) -> None:
    for i in studies_with(finding, 12):
        masks = SMALL.truth(i).masks
        sides = {side for f in SMALL.study(i).findings if f.name == finding for side in f.sides}
        for side in ("right", "left"):
            inside = (masks[finding] & masks[f"lung_{side}"]).any()
            assert inside == (side in sides)


def test_a_large_heart_is_larger_than_a_normal_one() -> None:
    ratios = {True: [], False: []}
    for i in range(60):
        masks = SMALL.truth(i).masks
        heart, lungs = box_of(masks["heart"]), box_of(masks["lung_left"] | masks["lung_right"])
        ratios[bool(SMALL.study(i).labels["cardiomegaly"])].append((heart[2] - heart[0]) / (lungs[2] - lungs[0]))
    assert max(ratios[False]) < 0.53 < np.mean(ratios[True])


def test_impossible_corpora_raise_with_numbers() -> None:
    with pytest.raises(ValueError, match="16 x 96"):
        PhantomCorpus(5, height=16, width=96)
    with pytest.raises(ValueError, match="-1"):
        PhantomCorpus(-1)
    with pytest.raises(IndexError, match="study 5 is outside a corpus of 5"):
        PhantomCorpus(5).study(5)


def test_draws_are_uniform_and_normal() -> None:
    draws = Draws("check")
    assert abs(np.mean([draws.uniform() for _ in range(4000)]) - 0.5) < 0.02
    assert abs(np.std([draws.normal() for _ in range(4000)]) - 1) < 0.05
    assert {draws.integer(3) for _ in range(50)} == {0, 1, 2}
    bell, even = normal_array(b"0123456789abcdef", (200, 200)), uniform_array(b"0123456789abcdef", (200, 200))
    assert abs(bell.mean()) < 0.02
    assert abs(bell.std() - 1) < 0.02
    assert abs(even.mean() - 0.5) < 0.01


def test_a_linear_model_learns_little_from_thumbnails() -> None:
    films, labels = films_and_labels(PhantomCorpus(900, height=64, width=64))
    assert np.mean(list(linear_auc(films, labels, train=650, penalty=300.0).values())) < 0.75
