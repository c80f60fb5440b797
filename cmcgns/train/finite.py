"""Ends a run whose loss is not finite, before the weights change."""

import torch
import torch.distributed as dist
from torch import Tensor

from cmcgns import distributed
from cmcgns.errors import TrainingStoppedError
from cmcgns.train.checkpoint import Progress
from cmcgns.train.steps import StepData


class FiniteCheck:
    """Checks during the backward pass whether the losses of all ranks are finite, without stalling the device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.copied = torch.cuda.Event() if self.on_gpu else None
        self.names: tuple[str, ...] = ()

    def start(self, names: tuple[str, ...], terms_AT: Tensor) -> None:
        """Start copying to the host whether the terms ``names`` of all microbatches are finite. Collective."""
        if names != self.names:
            self.names, self.host_T = names, torch.ones(len(names), pin_memory=self.on_gpu)
        self.own_T = torch.isfinite(terms_AT).all(0).float()
        finite_T = distributed.all_reduce(self.own_T, dist.ReduceOp.MIN)
        self.host_T.copy_(finite_T, non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    def check(self, step: int, before: Progress, data: StepData) -> None:
        """Raise on all ranks if a term is not finite. Waits for the forward pass while the backward pass runs.

        ``before``: the run's progress without this step; ``data``: the step's."""
        if self.copied is not None:
            self.copied.synchronize()
        bad = [name for name, good in zip(self.names, self.host_T.tolist(), strict=True) if not good]
        if bad:
            first = before.position if before.epoch == data.cursor.epoch else 0
            raise TrainingStoppedError(
                f"step {step}: {', '.join(bad[1:] or bad)} is not finite{self._on_ranks()}, in the studies {first} to "
                f"{data.cursor.position - 1} of epoch {data.cursor.epoch}'s order (studies_digest {data.studies_digest}); "
                f"the weights are those of step {step - 1}. Lower train.learning_rate or train.gradient_clip, or set "
                "train.precision=fp32"
            )

    def _on_ranks(self) -> str:
        """The ranks with a term that is not finite; where features are gathered these are often all. Collective."""
        own = distributed.exchange([int(not self.own_T.all())])
        ranks = [str(rank) for rank, (bad,) in enumerate(own) if bad]
        return "" if len(ranks) == len(own) else f" on rank {', '.join(ranks)}"
