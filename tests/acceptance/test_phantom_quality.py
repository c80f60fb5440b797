"""The phantom is worth training on: neither readable from thumbnails nor beyond a small network.

Shown: a linear probe on 32 x 32 thumbnails stays under 0.75 mean AUC of the findings, a small ResNet trained
on the true labels exceeds 0.9, at least 60 % of reports are distinct, and a contact sheet can be looked at.
"""

import os
import re
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cmcgns.phantom import PhantomCorpus, contact_sheet
from tests.phantom.phantom_probe import Films, Labels, films_and_labels, linear_auc, small_resnet_auc

TRAIN, TEST, PIXELS, EPOCHS = 4000, 800, 128, 12
LINEAR_TRAIN = 1500

FilmsAndLabels = tuple[Films, Labels]


@pytest.fixture(scope="module")
def phantom() -> FilmsAndLabels:
    """Films of ``PIXELS`` and their labels; a fresh seed may be given as ``PHANTOM_SEED``."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    start = time.perf_counter()
    seed = int(os.environ.get("PHANTOM_SEED", "0"))
    drawn = films_and_labels(PhantomCorpus(TRAIN + TEST, seed=seed, height=PIXELS, width=PIXELS))
    print(f"\n{PIXELS} x {PIXELS}: {1000 * (time.perf_counter() - start) / (TRAIN + TEST):.1f} ms a film")
    return drawn


def show(name: str, scores: dict[str, float]) -> float:
    """The mean of ``scores``, which are printed."""
    mean = float(np.mean(list(scores.values())))
    print(f"\n{name}: mean AUC {mean:.3f}; " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    return mean


@pytest.mark.parametrize("penalty", [1.0, 1000.0])
def test_a_linear_probe_on_thumbnails_stays_under_three_quarters(phantom: FilmsAndLabels, penalty: float) -> None:
    films, labels = phantom
    part = np.r_[0:LINEAR_TRAIN, TRAIN : TRAIN + TEST]
    assert show(f"linear, penalty {penalty:g}", linear_auc(films[part], labels[part], LINEAR_TRAIN, penalty)) < 0.75


def test_a_small_resnet_trained_on_the_true_labels_exceeds_nine_tenths(phantom: FilmsAndLabels) -> None:
    films, labels = phantom
    assert show("small ResNet", small_resnet_auc(films, labels, TRAIN, EPOCHS)) > 0.9


def test_three_reports_in_five_are_distinct() -> None:
    corpus = PhantomCorpus(2000)
    bodies = [
        re.sub(r"^.*?(?=FINDINGS:|IMPRESSION:)", "", corpus.study(i).report, flags=re.DOTALL) for i in range(2000)
    ]
    share = len({" ".join(re.findall("[a-z]+", body.lower())) for body in bodies}) / 2000
    print(f"\ndistinct findings and impressions: {share:.1%} of 2,000")
    assert share >= 0.6


def test_a_contact_sheet_is_there_to_be_looked_at(tmp_path: Path) -> None:
    sheet = contact_sheet(PhantomCorpus(36), Path(os.environ.get("PHANTOM_SHEET", tmp_path / "contact.png")))
    print(f"\ncontact sheet of 6 x 6 films with their reports: {sheet}")
    assert sheet.stat().st_size > 100_000
