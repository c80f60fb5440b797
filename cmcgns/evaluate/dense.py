"""A U-Net decoder on an image encoder, frozen or tuned: for segmentation and detection.

B films, C channels, K classes, R pixels of the square.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmcgns.data.augment import normalise
from cmcgns.evaluate.encoders import FilmEncoder

WIDTH, FINE_STRIDE = 64, 8
"""Channels of the decoder; half as many where its maps are finer than an eighth of the film."""


class DenseHead(nn.Module):
    """Maps of ``outputs`` channels at one ``stride``-th of the film's size, from an encoder's levels.

    From the coarsest level up, each twice as fine as the one before; a level of that size joins where the encoder has one
    (Ronneberger et al. 2015). A ViT has a single level: then nothing joins. The film itself never does: what the head knows
    it knows by the encoder.
    """

    def __init__(self, channels: Sequence[int], sizes: Sequence[int], side: int, stride: int, outputs: int) -> None:
        super().__init__()
        self.joined = {size: place for place, size in enumerate(sizes)}
        self.target = side // stride
        self.first = _block(channels[-1], WIDTH)
        size, width, self.steps, blocks = sizes[-1], WIDTH, list[int](), []
        while size < self.target:
            size = min(size * 2, self.target)
            joining = channels[self.joined[size]] if size in self.joined else 0
            before, width = width, WIDTH if size * FINE_STRIDE <= side else WIDTH // 2
            self.steps.append(size)
            blocks.append(_block(before + joining, width))
        self.blocks, self.last = nn.ModuleList(blocks), nn.Conv2d(width, outputs, 1)
        nn.init.zeros_(self.bias)

    @property
    def bias(self) -> Tensor:
        """Of the last layer: what the head says where it sees nothing."""
        assert self.last.bias is not None
        return self.last.bias

    def forward(self, levels: list[Tensor]) -> Tensor:
        """(B, outputs, target, target)."""
        hidden = self.first(levels[-1])
        for size, block in zip(self.steps, self.blocks, strict=True):
            hidden = F.interpolate(hidden, size=(size, size), mode="bilinear", align_corners=False)
            if size in self.joined:
                hidden = torch.cat([hidden, levels[self.joined[size]]], dim=1)
            hidden = block(hidden)
        return self.last(hidden)


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Convolution, group normalisation (whatever the batch size), ReLU; twice."""
    layers: list[nn.Module] = []
    for channels in (channels_in, channels_out):
        layers += [nn.Conv2d(channels, channels_out, 3, padding=1), nn.GroupNorm(8, channels_out), nn.ReLU()]
    return nn.Sequential(*layers)


@dataclass
class DenseModel:
    """An encoder and a head on it."""

    encoder: FilmEncoder
    head: DenseHead
    tuned: bool

    def train(self, mode: bool) -> None:
        """Into training or evaluation mode; a frozen encoder stays in evaluation mode, batch statistics included."""
        self.head.train(mode)
        self.encoder.train(mode and self.tuned)

    def __call__(self, film_BRR: Tensor) -> Tensor:
        image_B1HW = normalise(film_BRR.unsqueeze(1))
        with torch.set_grad_enabled(self.tuned and torch.is_grad_enabled()):
            levels = finest_first(self.encoder, image_B1HW)
        return self.head(levels)


def finest_first(encoder: FilmEncoder, image_B1HW: Tensor) -> list[Tensor]:
    """The encoder's levels, one of each size: of two of the same size the later one."""
    by_size = {level.shape[-1]: level for level in encoder.levels(image_B1HW)}
    return [by_size[size] for size in sorted(by_size, reverse=True)]


def build_dense(encoder: FilmEncoder, side: int, stride: int, outputs: int, tuned: bool, seed: int) -> DenseModel:
    """A head of fresh weights on ``encoder``."""
    with torch.no_grad():
        levels = finest_first(encoder.eval(), torch.zeros(1, 1, side, side))
    torch.manual_seed(seed)
    head = DenseHead([level.shape[1] for level in levels], [level.shape[-1] for level in levels], side, stride, outputs)
    return DenseModel(encoder, head, tuned)
