"""Encoders to compare with: those from a Hugging Face folder use the preprocessing they were trained with."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from cmcgns.errors import UserError
from cmcgns.evaluate.encoders import open_encoders
from tests.evaluate.test_embed_job import write_run
from tests.small import small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "run"
    write_run(folder, small_config(model__image_encoder="resnet-tiny", data__image_size=32))
    return folder


def test_a_folders_encoder_sees_films_with_its_own_mean_and_deviation(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    AutoModel.from_pretrained(run / "export" / "image_encoder").save_pretrained(folder)
    mean, spread = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": spread}))
    _, other = open_encoders(str(run), [str(folder)], seed=0)
    grey_B1HW = torch.rand(3, 1, 32, 32)
    with torch.no_grad():
        pooled_BC, shared = other.load()(grey_B1HW * 2 - 1)
        colour_B3HW = (grey_B1HW.expand(-1, 3, -1, -1) - torch.tensor(mean)[:, None, None]) / torch.tensor(spread)[
            :, None, None
        ]
        expected_BC = AutoModel.from_pretrained(folder).eval()(colour_B3HW).last_hidden_state.mean((2, 3))
    assert shared is None
    assert pooled_BC == pytest.approx(expected_BC, abs=1e-5)


def test_ours_sees_films_as_in_pretraining(run: Path) -> None:
    (ours,) = open_encoders(f"{run}/export", [], seed=0)
    film_B1HW = torch.rand(3, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        pooled_BC, _ = ours.load()(film_B1HW)
        expected_BC = ours.load_model().image_encoder(film_B1HW)[1]
    assert pooled_BC == pytest.approx(expected_BC, abs=1e-5)


def test_random_is_the_runs_model_before_training(run: Path) -> None:
    ours, random, again, other = (
        *open_encoders(str(run), ["random"], seed=0),
        open_encoders(str(run), ["random"], seed=0)[1],
        open_encoders(str(run), ["random"], seed=1)[1],
    )
    weights = [next(spec.load().parameters()) for spec in (ours, random, again, other)]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[3])
    assert random.digest() == again.digest()
    assert len({spec.digest() for spec in (ours, random, other)}) == 3


def test_a_folder_that_holds_no_model_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither `random`, nor the folder of a finished run"):
        open_encoders(str(run), [str(tmp_path)], seed=0)
