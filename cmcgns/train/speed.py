"""Torch's settings for speed: TF32 and cuDNN's search on GPUs, and compiled backbones."""

import torch
from torch import nn

from cmcgns.config import TrainConfig

BACKEND = "inductor"
BACKBONES = {"image_encoder.backbone": False, "text_encoder.backbone": True}
"""What is compiled, and whether its input changes its size: films have one size, reports many lengths."""


def set_up_torch(config: TrainConfig, device: torch.device) -> None:
    """Apply the settings that hold for the whole process; those of GPUs leave the CPU as it is."""
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not config.deterministic  # films have one size
        # not torch's newer `fp32_precision`: its compiler reads these, and both together raise (2.13)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32


def compile_backbones(model: nn.Module) -> None:
    """Let both backbones compile themselves at their first call. In place: the names of their weights stay."""
    for name, dynamic in BACKBONES.items():
        model.get_submodule(name).compile(backend=BACKEND, dynamic=dynamic)
