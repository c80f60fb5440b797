"""U-Net decoder on a frozen or tuned image encoder, for segmentation and detection.

B films, C channels, K classes, R pixels of the square.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cmcgns.data.batch import normalise
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.films import Films
from cmcgns.library.film_encoder import FilmEncoder
from cmcgns.models.device import autocast

WIDTH, FINE_STRIDE = 64, 8
"""Channels of the decoder; half as many where the stride is below 8."""


class DenseHead(nn.Module):
    """Maps of ``outputs`` channels at 1/``stride`` of the film's size, from an encoder's levels.

    Starts at the coarsest level and doubles the resolution in each step, with a skip connection if the encoder has a level of
    that size (Ronneberger et al. 2015). A ViT has only one level, so no skip connections. The film is never an input: the
    head sees only the encoder's features.
    """

    def __init__(self, channels: Sequence[int], sizes: Sequence[int], side: int, stride: int, outputs: int) -> None:
        super().__init__()
        self.skips = {size: index for index, size in enumerate(sizes)}
        self.target = side // stride
        self.first = _block(channels[-1], WIDTH)
        size, width, self.steps, blocks = sizes[-1], WIDTH, list[int](), []
        while size < self.target:
            size = min(size * 2, self.target)
            skip_channels = channels[self.skips[size]] if size in self.skips else 0
            before, width = width, WIDTH if size * FINE_STRIDE <= side else WIDTH // 2
            self.steps.append(size)
            blocks.append(_block(before + skip_channels, width))
        self.blocks, self.last = nn.ModuleList(blocks), nn.Conv2d(width, outputs, 1)
        nn.init.zeros_(self.bias)

    @property
    def bias(self) -> Tensor:
        """Bias of the last layer."""
        assert self.last.bias is not None
        return self.last.bias

    def forward(self, levels: list[Tensor]) -> Tensor:
        """(B, outputs, target, target)."""
        hidden = self.first(levels[-1])
        for size, block in zip(self.steps, self.blocks, strict=True):
            hidden = F.interpolate(hidden, size=(size, size), mode="bilinear", align_corners=False)
            if size in self.skips:
                hidden = torch.cat([hidden, levels[self.skips[size]]], dim=1)
            hidden = block(hidden)
        return self.last(hidden)


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Convolution, group normalisation (independent of the batch size), ReLU; twice."""
    layers: list[nn.Module] = []
    for channels in (channels_in, channels_out):
        layers += [nn.Conv2d(channels, channels_out, 3, padding=1), nn.GroupNorm(8, channels_out), nn.ReLU()]
    return nn.Sequential(*layers)


@dataclass
class DenseModel:
    """An encoder with a head."""

    encoder: FilmEncoder
    head: DenseHead
    tuned: bool
    precision: str = "fp32"

    def train(self, mode: bool) -> None:
        """Set training or evaluation mode; a frozen encoder, with its batch statistics, stays in evaluation mode."""
        self.head.train(mode)
        self.encoder.train(mode and self.tuned)

    def __call__(self, film_BRR: Tensor) -> Tensor:
        image_B1HW = normalise(film_BRR.unsqueeze(1))
        with torch.set_grad_enabled(self.tuned and torch.is_grad_enabled()):
            levels = feature_pyramid(self.encoder, image_B1HW)
        return self.head(levels)


def feature_pyramid(encoder: FilmEncoder, image_B1HW: Tensor) -> list[Tensor]:
    """The encoder's levels, finest first; of two levels of the same size the later one."""
    by_size = {level.shape[-1]: level for level in encoder.levels(image_B1HW)}
    return [by_size[size] for size in sorted(by_size, reverse=True)]


def build_dense(
    encoder: FilmEncoder, side: int, stride: int, outputs: int, tuned: bool, seed: int, precision: str = "fp32"
) -> DenseModel:
    """``encoder`` with a new head on its device."""
    with torch.no_grad():
        levels = feature_pyramid(encoder.eval(), torch.zeros(1, 1, side, side, device=encoder.device))
    torch.manual_seed(seed)
    head = DenseHead([level.shape[1] for level in levels], [level.shape[-1] for level in levels], side, stride, outputs)
    return DenseModel(encoder, head.to(encoder.device), tuned, precision)


TUNED_RATE = 0.1
"""Learning rate of a tuned encoder relative to its head's."""
CHECKS = 10
"""Number of validations while a head is trained."""
MAX_VALIDATION_FILMS = 1000
"""Each validation uses at most this many films, the first of the split."""
PATIENCE = 3
"""Training stops after this many validations without a better loss."""


class HeadedModel(Protocol):
    """An encoder with a head, to be trained."""

    @property
    def encoder(self) -> FilmEncoder: ...

    @property
    def head(self) -> nn.Module: ...

    @property
    def tuned(self) -> bool: ...

    @property
    def precision(self) -> str: ...

    def train(self, mode: bool) -> None: ...

    def __call__(self, film_BRR: Tensor) -> Tensor: ...


Loss = Callable[[Tensor, Films], Tensor]
"""Loss of the head's output for some films, on the output's device."""


def output_of(model: HeadedModel, film_NRR: NDArray[np.uint8]) -> Tensor:
    """The head's output for films, float32 on the model's device."""
    device = model.encoder.device
    with autocast(device, model.precision):
        return model(torch.from_numpy(film_NRR).to(device)).float()


def fit_head(model: HeadedModel, loss: Loss, train: Films, valid: Films, settings: EvaluateConfig, seed: int) -> int:
    """Train until the validation loss no longer falls, and restore the best weights. Returns the number of steps."""
    groups = [{"params": list(model.head.parameters()), "lr": settings.head_rate}]
    if model.tuned:
        groups.append({"params": list(model.encoder.parameters()), "lr": settings.head_rate * TUNED_RATE})
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    validation_films = valid.take(range(min(len(valid), MAX_VALIDATION_FILMS)))
    every = max(settings.head_steps // CHECKS, 1)
    best, best_state, since, step = float("inf"), _state(model), 0, 0
    for step, part in enumerate(_batches(train, settings.head_batch, settings.head_steps, seed), 1):
        model.train(True)
        optimizer.zero_grad()
        loss(output_of(model, part.film_NRR), part).backward()
        optimizer.step()
        if step % every == 0:
            current = mean_loss(model, loss, validation_films, settings.head_batch)
            since = 0 if current < best else since + 1
            if current < best:
                best, best_state = current, _state(model)
            if since == PATIENCE:
                break
    model.head.load_state_dict(best_state[0])
    if model.tuned:
        model.encoder.load_state_dict(best_state[1])
    return step


def _state(model: HeadedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    encoder = copy.deepcopy(model.encoder.state_dict()) if model.tuned else {}
    return copy.deepcopy(model.head.state_dict()), encoder


def _batches(films: Films, size: int, steps: int, seed: int) -> Iterator[Films]:
    """``steps`` batches over epochs, each shuffled with ``seed``."""
    random, order = np.random.default_rng(seed), np.zeros(0, np.int64)
    for _ in range(steps):
        while len(order) < min(size, len(films)):
            order = np.concatenate([order, random.permutation(len(films))])
        yield films.take(order[:size].tolist())
        order = order[size:]


@torch.no_grad()
def mean_loss(model: HeadedModel, loss: Loss, films: Films, size: int) -> float:
    """Mean of ``loss`` over all films."""
    model.train(False)
    parts = [films.take(range(start, min(start + size, len(films)))) for start in range(0, len(films), size)]
    sums = [float(loss(output_of(model, part.film_NRR), part)) * len(part) for part in parts]
    return sum(sums) / max(len(films), 1)


@torch.no_grad()
def predict_head(model: HeadedModel, films: Films, size: int) -> Iterator[tuple[slice, Tensor]]:
    """The head's output for all films, batch by batch."""
    model.train(False)
    for start in range(0, len(films), size):
        part = slice(start, min(start + size, len(films)))
        yield part, output_of(model, films.film_NRR[part])
