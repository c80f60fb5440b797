"""Training engines, DeepSpeed and plain torch: forward, backward, optimizer step, each rank's part of the state.

Both save and load the same parts by parameter name (``shards``), so a checkpoint works with any number of ranks, any ZeRO stage
and either engine. Parameters stay float32; bf16 and fp16 use autocast. A step whose gradient is not finite is skipped: neither
weights nor averages move. Only this file and ``deepspeed_private`` import DeepSpeed.
"""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmcgns import distributed
from cmcgns.config import TrainConfig
from cmcgns.data.batch import ImageReportBatch
from cmcgns.models.device import AUTOCAST, autocast
from cmcgns.train import deepspeed_private
from cmcgns.train.optimizer import (
    MOMENTS,
    LossScale,
    build_optimizer,
    rate_of,
    restore_adam,
    set_learning_rate,
    step_count,
)
from cmcgns.train.shards import Part, Parts, State, join, own_range, split
from cmcgns.train.speed import compile_backbones
from cmcgns.user_folders import torch_extensions

BUCKET, OVERLAPPING_BUCKET = 50_000_000, 10_000_000
"""Maximum gradient elements per bucket, without and with reduction during the backward pass. DeepSpeed's default of 500 million
allocates 2 GB, and holds a whole model of ours, so that nothing would overlap."""


class Engine(Protocol):
    """A model and its optimizer for one stage."""

    module: nn.Module
    gradient_norm: Tensor
    """Norm of the last step's whole gradient before clipping, on the device. Not finite: the step was skipped."""

    def __call__(self, batch: ImageReportBatch, stage: int) -> Any:
        """Forward of one microbatch. Collective under ZeRO-3."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradients of one microbatch; ``last`` is true for the last one of the step."""

    def step(self, learning_rate: float) -> None:
        """Clip the mean gradient over microbatches and ranks, and update the weights. Collective.

        Parameters with a rate of their own take that factor of ``learning_rate``."""

    def weights(self, keep: bool = True) -> State:
        """Whole float32 weights and buffers, gathered one by one; {} without ``keep``. Collective."""

    def weights_shard(self) -> Parts:
        """This rank's part of weights and buffers."""

    def optimizer_state(self) -> Parts:
        """This rank's part of the averages, as MOMENT.NAME, and ``optimizer_steps``. Collective, and so is to copy each part."""

    def load_optimizer_state(self, state: State) -> None:
        """Load copies of what ``optimizer_state`` returns, each rank its part. Collective."""

    def close(self) -> None:
        """Free parameters, gradients, averages and buffers; the engine cannot be used any more."""


def build_engine(
    model: nn.Module,
    config: TrainConfig,
    device: torch.device,
    frozen: tuple[str, ...] = (),
    new_parts: tuple[str, ...] | None = None,
) -> Engine:
    """A new engine for ``model``. It trains no parameters whose name starts with one of ``frozen``, and none of rate 0.

    In stage 2 ``new_parts`` are the name prefixes of what stage 1 has not trained: all else has `stage2_learned_rate`.
    """
    for name, parameter in model.named_parameters():
        if name.startswith(frozen) or not rate_of(name, config, new_parts):
            parameter.requires_grad_(False)
    if config.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    accumulation = config.global_batch_size // (config.microbatch_size * distributed.world_size())
    # ZeRO-0 partitions nothing: it is plain torch
    kind = DeepSpeedEngine if config.engine == "deepspeed" and config.zero_stage else TorchEngine
    optimizer = build_optimizer(model.to(device), config, new_parts)
    if config.compile:
        compile_backbones(model)
    return kind(model, optimizer, config, accumulation, device)


class DeepSpeedEngine:
    """DeepSpeed ZeRO 1-3."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        accumulation: int,
        device: torch.device,
    ) -> None:
        deepspeed = import_deepspeed(device)
        self.module = model
        self.zero_stage = config.zero_stage
        self.scale = LossScale(config)
        self.gradient_norm = torch.zeros((), device=device)
        if self.scale.used:
            # inside the model: DeepSpeed's forward turns off any autocast around it
            model.forward = torch.autocast(device.type, torch.float16)(model.forward)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_settings(config, accumulation, trained, device),
            dist_init_required=False,
        )
        if self.scale.used:
            self.optimizer.override_loss_scale(self.scale.value)

    def __call__(self, batch: ImageReportBatch, stage: int) -> Any:
        return self.engine(batch, stage)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # only counts the microbatch

    def step(self, learning_rate: float) -> None:
        set_learning_rate(self.optimizer, learning_rate)
        skipped = self.engine.skipped_steps
        self.engine.step()
        self.gradient_norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.gradient_norm.device)
        if self.scale.used:
            self.scale.update(finite=self.engine.skipped_steps == skipped)
            self.optimizer.override_loss_scale(self.scale.value)

    def weights(self, keep: bool = True) -> State:
        whole = {name: to_cpu(buffer) for name, buffer in self._buffers() if keep}
        for name, parameter in self.module.named_parameters():
            with self._gathered(parameter):
                if keep:
                    whole[name] = to_cpu(parameter)
        return whole

    def weights_shard(self) -> Parts:
        parts = {name: Part.of(split(buffer)) for name, buffer in self._buffers()}
        for name, parameter in self.module.named_parameters():
            parts[name] = Part.of(self._part(parameter) if self.zero_stage == 3 else split(parameter))
        return parts

    def optimizer_state(self) -> Parts:
        self._link_averages()
        state = {
            f"{moment}.{name}": self._average(parameter, moment)
            for name, parameter in self._trained()
            for moment in MOMENTS
        }
        steps = torch.tensor(int(self.engine.global_steps - self.engine.skipped_steps))
        return state | {"optimizer_steps": Part.of(steps)}

    def load_optimizer_state(self, state: State) -> None:
        steps = state["optimizer_steps"]
        self._link_averages()
        for name, parameter in self._trained():
            for moment in MOMENTS:
                self._set_average(parameter, moment, state[f"{moment}.{name}"])
        for slot in self.optimizer.optimizer.state.values():
            slot["step"] = torch.as_tensor(slot["step"]).clone().fill_(float(steps))
        self.engine.global_steps, self.engine.skipped_steps = int(steps), 0

    def close(self) -> None:
        self.engine.destroy()
        if self.zero_stage == 3:
            deepspeed_private.forget_modules()
        del self.engine, self.optimizer, self.module
        gc.collect()  # DeepSpeed's hooks and the parameters refer to each other

    def _link_averages(self) -> None:
        """Link each parameter to its part of DeepSpeed's flat averages, also before the first step.

        DeepSpeed 0.19 with ZeRO-1/2 links them after the first parameter group's step, and never links the second group.
        """
        for flat in deepspeed_private.flat_weights(self.optimizer, self.zero_stage):
            slot = self.optimizer.optimizer.state[flat]
            slot.setdefault("step", step_count(self.optimizer.optimizer, flat))
            for moment in MOMENTS:
                slot.setdefault(moment, torch.zeros_like(flat))
        if self.zero_stage < 3:
            deepspeed_private.link_averages(self.optimizer)

    def _part(self, parameter: nn.Parameter) -> Tensor:
        """ZeRO-3: this rank's part of ``parameter``, without padding."""
        stored, size = deepspeed_private.shard(parameter)
        start, stop = own_range(size)
        return stored[: stop - start]

    def _average(self, parameter: nn.Parameter, moment: str) -> Part:
        """This rank's part of an average. To copy it is collective in ZeRO-1 and 2, whose own parts are others."""
        from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

        if self.zero_stage < 3:
            shape = tuple(split(parameter).shape)
            return Part(shape, torch.float32, lambda: to_cpu(split(safe_get_full_optimizer_state(parameter, moment))))
        return Part.of(safe_get_local_optimizer_state(parameter, moment)[: len(self._part(parameter))])

    def _set_average(self, parameter: nn.Parameter, moment: str, part: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, join(part, parameter.shape).to(parameter.device), moment)
            return
        stored, _ = deepspeed_private.shard(parameter)
        padded = nn.functional.pad(part.to(parameter.device), (0, len(stored) - len(part)))
        safe_set_local_optimizer_state(parameter, padded, moment)

    def _gathered(self, parameter: nn.Parameter) -> AbstractContextManager[None]:
        if self.zero_stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter])

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """Buffers that are saved; others, such as position ids, are made anew."""
        saved = self.module.state_dict()  # for its keys: ZeRO-3's values are empty
        return [(name, buffer) for name, buffer in self.module.named_buffers() if name in saved]

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)


def import_deepspeed(device: torch.device) -> Any:
    """The deepspeed package, imported for ``device`` and without its log.

    Its ops are compiled once for all runs, with the ninja of this Python.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(torch_extensions()))
    bin_folder = str(Path(sys.executable).parent)
    if bin_folder not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = bin_folder + os.pathsep + os.environ["PATH"]
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # it logs each import and every setting
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def deepspeed_settings(config: TrainConfig, accumulation: int, trained: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration dict for ``config`` and a model with ``trained`` trained parameters."""
    overlap = config.overlap_comm
    if overlap is None:
        overlap = device.type == "cuda" or config.zero_stage == 3
    # two with overlap; in bf16 as many again, for what is reduced in fp32. Together at most twice the gradients
    buffers = (1 + overlap) * (1 + (config.precision == "bf16"))
    zero = {
        "stage": config.zero_stage,
        "overlap_comm": overlap,
        "reduce_bucket_size": min(OVERLAPPING_BUCKET if overlap else BUCKET, trained, 2 * trained // buffers),
    }
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.microbatch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.gradient_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice per microbatch
    }
    if config.precision == "bf16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return settings


class TorchEngine:
    """Plain torch: autocast, and one all-reduce of the whole gradient per step."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        accumulation: int,
        device: torch.device,
    ) -> None:
        self.module, self.optimizer = model, optimizer
        self.accumulation, self.gradient_clip = accumulation, config.gradient_clip
        self.scale = LossScale(config)
        self.gradient_norm = torch.zeros((), device=device)
        self.autocast = autocast(device, config.precision)

    def __call__(self, batch: ImageReportBatch, stage: int) -> Any:
        with self.autocast:
            return self.module(batch, stage)

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.scale.value / self.accumulation).backward()

    def step(self, learning_rate: float) -> None:
        trained = [p for p in self.module.parameters() if p.grad is not None]
        gradients = [p.grad for p in trained if p.grad is not None]
        average_over_ranks(gradients)
        if self.scale.used:
            for gradient in gradients:
                gradient /= self.scale.value
        self.gradient_norm = nn.utils.get_total_norm(gradients)
        if self.gradient_clip:
            nn.utils.clip_grads_with_norm_(trained, self.gradient_clip, self.gradient_norm)
        set_learning_rate(self.optimizer, learning_rate)
        if self.optimizer.defaults["fused"] and not self.scale.used:
            # the kernel skips the step by itself, so the host need not wait for the norm
            self.optimizer.found_inf = (~self.gradient_norm.isfinite()).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        else:
            [finite] = self.gradient_norm.isfinite().view(1).tolist()
            if finite:
                self.optimizer.step()
            self.scale.update(finite)
        self.optimizer.zero_grad()

    def weights(self, keep: bool = True) -> State:
        return {name: to_cpu(value) for name, value in self.module.state_dict().items() if keep}

    def weights_shard(self) -> Parts:
        return {name: Part.of(split(value)) for name, value in self.module.state_dict().items()}

    def optimizer_state(self) -> Parts:
        state = {
            f"{moment}.{name}": Part.of(split(self.optimizer.state[parameter][moment]))
            for name, parameter in self.module.named_parameters()
            for moment in MOMENTS
            if parameter in self.optimizer.state
        }
        steps = max((int(slot["step"]) for slot in self.optimizer.state.values()), default=0)
        return state | {"optimizer_steps": Part.of(torch.tensor(steps))}

    def load_optimizer_state(self, state: State) -> None:
        trained = ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)
        restore_adam(self.optimizer, trained, state)

    def close(self) -> None:
        del self.optimizer, self.module


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, in one all-reduce."""
    if distributed.world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= distributed.world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average_buffers(model: nn.Module) -> None:
    """Average running statistics over ranks, except fixed ones. Call it in training mode, before anything reads them.

    Collective.
    """
    buffers = [buffer for module in model.modules() if module.training for buffer in module.buffers(recurse=False)]
    average_over_ranks([buffer for buffer in buffers if buffer.is_floating_point()])


def to_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU; bf16 and fp16 become float32."""
    copied = tensor.detach().to("cpu", copy=True)
    return copied.float() if copied.dtype in AUTOCAST.values() else copied
