"""A head on an image encoder, frozen or tuned, and its training with early stopping.

B films, R pixels of the square.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cmcgns.evaluate.encoders import FilmEncoder
from cmcgns.evaluate.films import Films
from cmcgns.evaluate.job_config import EvaluateConfig

TUNED_RATE = 0.1
"""Learning rate of a tuned encoder, as a share of its head's."""
CHECKS = 10
"""Validations of one training."""
MOST_WATCHED = 1000
"""Films of the validation split that each validation looks at, the first ones."""
PATIENCE = 3
"""Validations without a better loss after which training ends."""


class Headed(Protocol):
    """An encoder and a head on it, to be trained."""

    @property
    def encoder(self) -> FilmEncoder: ...

    @property
    def head(self) -> nn.Module: ...

    @property
    def tuned(self) -> bool: ...

    def train(self, mode: bool) -> None: ...

    def __call__(self, film_BRR: Tensor) -> Tensor: ...


Loss = Callable[[Tensor, Films], Tensor]
"""Of what the head says and the films that it is about."""


def fit_head(model: Headed, loss: Loss, train: Films, valid: Films, settings: EvaluateConfig, seed: int) -> int:
    """Train until the validation loss no longer falls, and go back to its best; the steps that were taken."""
    groups = [{"params": list(model.head.parameters()), "lr": settings.head_rate}]
    if model.tuned:
        groups.append({"params": list(model.encoder.parameters()), "lr": settings.head_rate * TUNED_RATE})
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    watched = valid.take(range(min(len(valid), MOST_WATCHED)))
    every = max(settings.head_steps // CHECKS, 1)
    best, best_state, since, step = float("inf"), _state(model), 0, 0
    for step, part in enumerate(_batches(train, settings.head_batch, settings.head_steps, seed), 1):
        model.train(True)
        optimizer.zero_grad()
        loss(model(torch.from_numpy(part.film_NRR)), part).backward()
        optimizer.step()
        if step % every == 0:
            found = mean_loss(model, loss, watched, settings.head_batch)
            since = 0 if found < best else since + 1
            if found < best:
                best, best_state = found, _state(model)
            if since == PATIENCE:
                break
    model.head.load_state_dict(best_state[0])
    if model.tuned:
        model.encoder.load_state_dict(best_state[1])
    return step


def _state(model: Headed) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    encoder = copy.deepcopy(model.encoder.state_dict()) if model.tuned else {}
    return copy.deepcopy(model.head.state_dict()), encoder


def _batches(films: Films, size: int, steps: int, seed: int) -> Iterator[Films]:
    """``steps`` batches: epoch after epoch, each shuffled by the seed."""
    random, order = np.random.default_rng(seed), np.zeros(0, np.int64)
    for _ in range(steps):
        while len(order) < min(size, len(films)):
            order = np.concatenate([order, random.permutation(len(films))])
        yield films.take(order[:size].tolist())
        order = order[size:]


@torch.no_grad()
def mean_loss(model: Headed, loss: Loss, films: Films, size: int) -> float:
    """Mean of ``loss`` over all films."""
    model.train(False)
    parts = [films.take(range(start, min(start + size, len(films)))) for start in range(0, len(films), size)]
    sums = [float(loss(model(torch.from_numpy(part.film_NRR)), part)) * len(part) for part in parts]
    return sum(sums) / max(len(films), 1)


@torch.no_grad()
def predict_head(model: Headed, films: Films, size: int) -> Iterator[tuple[slice, Tensor]]:
    """What the head says of all films, part by part."""
    model.train(False)
    for start in range(0, len(films), size):
        part = slice(start, min(start + size, len(films)))
        yield part, model(torch.from_numpy(films.film_NRR[part]))
