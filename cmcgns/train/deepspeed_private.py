"""All uses of DeepSpeed's private attributes, one function each. If a new DeepSpeed breaks one,
tests/train/test_deepspeed_private.py says which."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def flat_weights(optimizer: Any, zero_stage: int) -> Sequence[Tensor]:
    """This rank's flat float32 weights, one tensor per parameter group. The public `safe_get_*` functions only work once the
    averages exist; a new optimizer stores them under these tensors as keys."""
    name = "fp32_partitioned_groups_flat" if zero_stage == 3 else "single_partition_of_fp32_groups"
    weights: Sequence[Tensor] = getattr(optimizer, name)
    return weights


def link_averages(optimizer: Any) -> None:
    """ZeRO-1/2: map every parameter to its part of the flat averages. DeepSpeed does this only after the first group's step,
    and has no public call for it."""
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def shard(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """ZeRO-3: what this rank stores of ``parameter``, padded, and the elements of the whole. The public function for it returns
    None for a frozen parameter."""
    stored: Any = parameter
    return stored.ds_tensor, stored.ds_numel


def forget_modules() -> None:
    """ZeRO-3: drop the model from a list of DeepSpeed's module, where it stays after `destroy()` (0.19)."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()
