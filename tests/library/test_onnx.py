"""ONNX of both encoders gives what torch gives, for any number of films, texts, tokens and sentences."""

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import cmcgns
from cmcgns.commands import main
from cmcgns.config import Config
from cmcgns.data.batch import pad_reports
from cmcgns.errors import UserError
from cmcgns.library.export import CARD
from cmcgns.library.onnx import FILMS, OUTPUT, TEXTS, _compare, example_films, write_onnx
from cmcgns.phantom import PhantomCorpus
from tests.evaluate.test_embed_job import write_run
from tests.library.conftest import CONFIG
from tests.small import small_config

PHANTOM = PhantomCorpus(studies=100, seed=3, height=60, width=48)


def run_file(path: Path, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run([OUTPUT], inputs)
    return np.asarray(found)


@pytest.mark.parametrize(
    "config",
    [CONFIG, small_config(method__name="clip", objective__text_pooling="cls"), small_config(method__name="mgca")],
    ids=lambda config: f"{config.method.name} {config.model.image_encoder}",
)
def test_both_encoders_give_in_onnx_what_the_library_gives(config: Config, tmp_path: Path) -> None:
    write_run(tmp_path / "run", config)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--onnx"]) == 0
    model = cmcgns.load(str(tmp_path / "out"))
    for number in (1, 7):
        films = [PHANTOM.render(i) for i in range(number)]
        seen = model._seen(np.stack(list(model._squares(films)))).numpy()
        assert run_file(tmp_path / "out" / FILMS, films=seen) == pytest.approx(model.embed_films(films), abs=1e-4)
        reports = [PHANTOM.study(i).report for i in range(number)]
        encoded = [each for _, each in model._read(reports)]
        padded = pad_reports(
            [each.tokens_T for each in encoded], [each.sentence_of_token_T for each in encoded],
            np.array([each.sentences for each in encoded]), model._tokenizer.pad_id,
        )  # fmt: skip
        found = run_file(
            tmp_path / "out" / TEXTS, token_ids=padded.token_BT.numpy(), token_mask=padded.token_mask_BT.numpy(),
            sentence_of_token=padded.sentence_of_token_BT.numpy(), sentence_mask=padded.sentence_mask_BS.numpy(),
        )  # fmt: skip
        assert found == pytest.approx(model.embed_reports(reports), abs=1e-4)
    size = config.data.image_size
    assert f"takes `films` (B, 1, {size}, {size})" in (tmp_path / "out" / CARD).read_text()


def test_a_file_that_does_not_give_what_torch_gives_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", CONFIG)
    model = cmcgns.load(str(tmp_path / "run"))
    write_onnx(model.network, CONFIG, model.run.vocabulary_size, tmp_path)

    class Other(torch.nn.Module):
        def forward(self, image_B1HW: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(image_B1HW), 32)

    message = "film_encoder differs from torch by .* in ONNX, more than 0.0001; leave out --onnx"
    with pytest.raises(UserError, match=re.compile(message)):
        _compare(Other(), example_films(CONFIG, 3), ("films",), tmp_path / FILMS)
