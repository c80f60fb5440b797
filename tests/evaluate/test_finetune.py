"""Classification by a tuned encoder: it learns the classes of its films, and unknown labels have no effect."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cmcgns.data.labelled.base import ImageSet, image_table
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.encoders import EncoderSpec, open_encoders
from cmcgns.evaluate.films import Films
from cmcgns.evaluate.tasks.classification import finetune_scores
from tests.evaluate.test_embed_job import write_run
from tests.small import small_config

SIDE, SETTINGS = 32, EvaluateConfig(run="unused", head_steps=60, head_batch=8, resamples=100, head_rate=3e-3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderSpec:
    folder = tmp_path_factory.mktemp("finetune") / "run"
    write_run(folder, small_config(model__image_encoder="resnet-tiny", data__image_size=SIDE))
    return open_encoders(str(folder), [], seed=0)[0]


def films(split: str, number: int) -> tuple[Films, list[dict[str, Any]]]:
    """Films of noise, half of them with a bright square (class `square`); class `other` has no labels."""
    random = np.random.default_rng(len(split))
    pixels_NRR = random.integers(0, 120, (number, SIDE, SIDE)).astype(np.uint8)
    pixels_NRR[::2, 8:20, 8:20] = 250
    names = [f"{split}{i}" for i in range(number)]
    rows = [
        {"image_id": name, "path": name, "group": name, "split": split, "labels": [float(i % 2 == 0), float("nan")]}
        for i, name in enumerate(names)
    ]
    nothing = [np.zeros(0, np.int32)] * number
    return Films(names, pixels_NRR, np.zeros((number, 0, SIDE, SIDE), bool), nothing, [np.zeros((0, 4))] * number), rows


def test_a_tuned_encoder_learns_a_class_and_an_unknown_one_is_left_out(encoder: EncoderSpec) -> None:
    found = {split: films(split, number) for split, number in (("train", 48), ("valid", 16), ("test", 40))}
    table: pa.Table = image_table([row for _, rows in found.values() for row in rows])
    source: Any = SimpleNamespace(uri="nowhere")
    images = ImageSet("squares", source, table, "by name", classes=("square", "other"))
    parts = {split: each for split, (each, _) in found.items()}
    scores = finetune_scores(encoder, images, parts, parts["test"].image_ids, 1.0, SETTINGS)
    mean, square = scores
    assert (mean.metric, square.metric) == ("mean AUC", "AUC: square")
    assert square.value > 0.95
    assert mean.value == square.value
    assert "left out: other (no positives)" in mean.note
    assert mean.setting == "tuned, 100% of labels"
