"""ONNX of both encoders, compared with torch before it is kept. Needs the extra `onnx`.

B films or texts, T tokens, S sentences, D embedding.
"""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmcgns.config import Config
from cmcgns.errors import UserError
from cmcgns.library.film_encoder import FilmEncoder
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.models.text import TextEncoder

FILMS, TEXTS = "film_encoder.onnx", "text_encoder.onnx"
TEXT_INPUTS = ("token_ids", "token_mask", "sentence_of_token", "sentence_mask")
OUTPUT = "vectors"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Largest difference to torch of a number of a unit vector."""


class _Films(nn.Module):
    """Films (B, 1, H, W) from -1 to 1 to vectors (B, D) of length 1."""

    def __init__(self, encoder: FilmEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image_B1HW: Tensor) -> Tensor:
        return self.encoder(image_B1HW)[1]


class _Texts(nn.Module):
    """Padded tokens, as ``pad_reports`` makes them, to vectors (B, D) of length 1."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *tokens: Tensor) -> Tensor:
        return self.encoder(*tokens)[1]


def write_onnx(model: DualEncoder, config: Config, vocabulary_size: int, folder: Path) -> None:
    """Write ``FILMS`` and ``TEXTS`` into ``folder``; any number of films, texts, tokens and sentences fits.

    Raises:
        UserError: the extra is not installed, an encoder cannot be exported, or its file differs from torch.
    """
    for package in PACKAGES:
        if find_spec(package) is None:
            raise UserError(f"export: --onnx needs {package}, which is not installed: pip install 'cmcgns[onnx]'")
    batch, tokens, sentences = (torch.export.Dim(name) for name in ("batch", "tokens", "sentences"))
    films = _Films(FilmEncoder(model.image_encoder, model.image_projection)).eval()
    _write(films, example_films(config, 2), ("films",), [{0: batch}], folder / FILMS)
    _compare(films, example_films(config, 3), ("films",), folder / FILMS)
    if config.data.reports:
        texts, shapes = _Texts(model.text_encoder).eval(), [{0: batch, 1: tokens}] * 3 + [{0: batch, 1: sentences}]
        _write(texts, example_tokens(vocabulary_size, 2, 16, 2), TEXT_INPUTS, [tuple(shapes)], folder / TEXTS)
        _compare(texts, example_tokens(vocabulary_size, 3, 24, 4), TEXT_INPUTS, folder / TEXTS)


def example_films(config: Config, number: int) -> tuple[Tensor, ...]:
    return (torch.rand(number, 1, *[config.data.image_size] * 2, generator=torch.Generator().manual_seed(0)) * 2 - 1,)


def example_tokens(vocabulary_size: int, number: int, length: int, sentences: int) -> tuple[Tensor, ...]:
    """Random texts: the first is full, the others have a token less each."""
    drawn = torch.Generator().manual_seed(0)
    token_BT = torch.randint(5, vocabulary_size, (number, length), generator=drawn)
    mask_BT = torch.arange(length) < length - torch.arange(number)[:, None]
    owner_BT = (torch.arange(length) * sentences // length).expand(number, -1).masked_fill(~mask_BT, -1)
    return token_BT, mask_BT, owner_BT, torch.ones(number, sentences, dtype=torch.bool)


def _write(
    module: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...], shapes: list[Any], path: Path
) -> None:
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it warns of operators of packages that we do not use
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                inputs,
                input_names=list(names),
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        program.save(path)
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"export: {path.stem} cannot be written as ONNX ({reason}); leave out --onnx") from error
    finally:
        quiet.setLevel(level)


@torch.inference_mode()
def _compare(module: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...], path: Path) -> None:
    """Raise ``UserError`` if the file at ``path`` does not give what ``module`` gives, for inputs of other sizes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found_BD,) = session.run([OUTPUT], {name: part.numpy() for name, part in zip(names, inputs, strict=True)})
    gap = float(np.abs(found_BD - module(*inputs).numpy()).max())
    if not gap <= TOLERANCE:
        raise UserError(
            f"export: {path.stem} differs from torch by {gap:.1e} in ONNX, more than {TOLERANCE}; leave out --onnx"
        )
