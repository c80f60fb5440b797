"""Adam with a learning rate for each part of the model, its state in a checkpoint, and the scale of fp16 losses."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cmcgns.config import TrainConfig
from cmcgns.train.shards import State, join

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of Adam's two running averages, the same in torch and DeepSpeed."""
FIRST_SCALE, GOOD_STEPS = 2.0**16, 2000
"""Initial factor on losses in fp16, and steps with a finite gradient after which it is doubled; those of torch's GradScaler."""
BACKBONES = {"image_encoder.backbone.": "image_encoder_rate", "text_encoder.backbone.": "text_encoder_rate"}
"""Name prefixes of the parameters that have a factor on the learning rate of their own, and its setting."""


class LossScale:
    """Dynamic factor on fp16 losses, so that small gradients do not become 0. A gradient that is not finite halves it.

    Ours, because DeepSpeed's autocast in fp16 (0.19) never recovers from its first overflow in ZeRO-1, 2 and 3.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.used = config.precision == "fp16"
        self.value = FIRST_SCALE if self.used else 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """After a step whose gradient was ``finite`` or not."""
        if not self.used:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps == GOOD_STEPS:
            self.value, self.good_steps = self.value * 2, 0


def build_optimizer(
    model: nn.Module, config: TrainConfig, new_parts: tuple[str, ...] | None = None
) -> torch.optim.Optimizer:
    """Adam or AdamW with weight decay on matrices and convolutions, and without on norms, biases and scalars: two groups for each
    factor on the learning rate, which is the group's ``rate``. ``new_parts`` as in ``build_engine``."""
    trained: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained.setdefault(rate_of(name, config, new_parts), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay, "rate": rate}
        for rate, those in trained.items()
        for parameters, decay in (
            ([p for p in those if p.dim() > 1], config.weight_decay),
            ([p for p in those if p.dim() <= 1], 0.0),
        )
    ]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    return kind(groups, lr=config.learning_rate, fused=on_gpu)


def rate_of(name: str, config: TrainConfig, new_parts: tuple[str, ...] | None) -> float:
    """The factor on the learning rate of the parameter ``name``; ``new_parts`` as in ``build_engine``."""
    rate = next((float(getattr(config, key)) for prefix, key in BACKBONES.items() if name.startswith(prefix)), 1.0)
    learned = new_parts is not None and not name.startswith(new_parts)
    return rate * config.stage2_learned_rate if learned else rate


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give each group its factor of ``learning_rate``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]


def restore_adam(optimizer: torch.optim.Optimizer, trained: Iterator[tuple[str, nn.Parameter]], state: State) -> None:
    """Load averages and step count into a torch optimizer. Collective."""
    for name, parameter in trained:
        if f"{MOMENTS[0]}.{name}" in state:
            parts = {moment: state[f"{moment}.{name}"] for moment in MOMENTS}
            averages = {
                moment: join(part, parameter.shape).to(parameter.device, copy=True) for moment, part in parts.items()
            }
            steps = step_count(optimizer, parameter).fill_(float(state["optimizer_steps"]))
            optimizer.state[parameter] = {"step": steps, **averages}


def step_count(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Adam's step count 0: on the host, or on the parameter's device for a fused optimizer."""
    return torch.zeros((), device=parameter.device if optimizer.defaults["fused"] else "cpu")
