"""Films from visible patches and the report: the decoders of cross-modal masked image reconstruction.

B studies, P patches (g x g), D embedding. Both end in a plain linear map, since targets lie in [-1, 1].
"""

import itertools
import math

import torch
from torch import Tensor, nn


def build_decoder(dim: int, grid: int, stride: int, is_convolutional: bool) -> nn.Module:
    """Upsampling convolutions behind a ResNet, a small transformer behind a ViT."""
    if is_convolutional:
        return ConvolutionalDecoder(dim, grid, stride)
    return TransformerDecoder(dim, grid, stride)


class ConvolutionalDecoder(nn.Module):
    """Each stage doubles the side and halves the channels, until a patch is ``stride`` pixels wide."""

    def __init__(self, dim: int, grid: int, stride: int, channels: int = 256) -> None:
        super().__init__()
        self.grid = grid
        widths = [max(channels >> stage, 16) for stage in range(int(math.log2(stride)) + 1)]
        self.entry = nn.Conv2d(2 * dim, widths[0], 1)
        self.stages = nn.Sequential(*(upsampling_stage(*pair) for pair in itertools.pairwise(widths)))
        self.exit = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, joint_BPE: Tensor) -> Tensor:
        """(B, 1, H, W) from patches beside what they attend to, E = 2D."""
        features_BEgg = joint_BPE.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.exit(self.stages(self.entry(features_BEgg)))


def upsampling_stage(width_in: int, width_out: int) -> nn.Module:
    """Twice the side; group norm, so that ranks need not share statistics."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        nn.Conv2d(width_in, width_out, 3, padding=1),
        nn.GroupNorm(min(8, width_out // 4), width_out),
        nn.GELU(),
    )


class TransformerDecoder(nn.Module):
    """Four transformer layers over all positions, then each position's square of pixels."""

    def __init__(self, dim: int, grid: int, stride: int, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        self.grid = grid
        self.entry = nn.Linear(2 * dim, width)
        self.position_PC = nn.Parameter(torch.randn(grid * grid, width) * 0.02)
        # one layer at a time: nn.TransformerEncoder clones one layer's first weights into all
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
                for _ in range(layers)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.exit = nn.Linear(width, stride * stride)
        self.upsample = nn.PixelShuffle(stride)

    def forward(self, joint_BPE: Tensor) -> Tensor:
        """(B, 1, H, W) from patches beside what they attend to, E = 2D."""
        hidden_BPC = self.entry(joint_BPE)
        hidden_BPC = self.layers(hidden_BPC + self.position_PC.to(hidden_BPC.dtype))
        pixels_BPp = self.exit(self.norm(hidden_BPC))
        return self.upsample(pixels_BPp.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
