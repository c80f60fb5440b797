"""What ranks send each other in the losses: features in the precision of the encoders, gradients in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cmcgns import distributed
from cmcgns.config import Config
from cmcgns.methods.base import Losses
from cmcgns.models.device import autocast
from cmcgns.models.dual_encoder import DualEncoder
from tests.methods.test_ranks import QUICK, centroids, config_of, rows_of_ranks
from tests.ranks import run_on_ranks
from tests.small import losses_of, random_batch, small_model

COMPARING = [name for name in QUICK if name not in ("xdc", "images100m")]
"""Methods that compare features of all ranks."""
WITH_CODES = ("mgca", "images100m with reports", "images100m with labels")
"""Methods that also gather scores, once and in float32: codes are exponentials of them."""
GATHER, SUM = "_allgather_base_", "_reduce_scatter_base_"


class Sent(TorchDispatchMode):
    """Types of the floating-point tensors that this rank gathers, and of the gradients that it sends back."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, list[torch.dtype]] = {GATHER: [], SUM: []}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.types and args[1].is_floating_point():
            self.types[name].append(args[1].dtype)
        return func(*args, **(kwargs or {}))


def own_microbatch(config: Config) -> tuple[DualEncoder, Losses]:
    """The model and the losses of this rank's part of the global batch, before the backward pass."""
    stage, rows = config.objective.stages, rows_of_ranks()
    model, batch = small_model(config).train(), random_batch(config, rows[distributed.rank()], ranks=rows)
    with autocast(torch.device("cpu"), config.train.precision):
        outputs = model(batch, stage)
    return model, losses_of(config, outputs, batch, centroids(), stage)


def types_sent(names: list[str], precision: str) -> dict[str, dict[str, list[torch.dtype]]]:
    """In one forward and backward pass of each method on this rank."""
    found = {}
    for name in names:
        with Sent() as sent:
            own_microbatch(config_of(name, precision=precision))[1].total.backward()
        found[name] = sent.types
    return found


@pytest.mark.distributed
def test_features_travel_in_the_precision_of_the_encoders_and_gradients_in_float32() -> None:
    for found in run_on_ranks(2, types_sent, COMPARING, "bf16"):
        for name, types in found.items():
            assert set(types[SUM]) == {torch.float32}, name
            assert set(types[GATHER]) <= {torch.bfloat16, torch.float32}, name
            assert types[GATHER].count(torch.float32) == (name in WITH_CODES), name
    for found in run_on_ranks(2, types_sent, ["films"], "fp32"):
        assert set(found["films"][GATHER]) == set(found["films"][SUM]) == {torch.float32}


Whole = tuple[float, Tensor]


def mean_over_ranks(name: str) -> dict[str, Whole]:
    """The loss and the whole gradient of the global batch, by precision."""
    world, found = distributed.world_size(), dict[str, Whole]()
    for precision in ("fp32", "bf16"):
        model, losses = own_microbatch(config_of(name, precision=precision))
        losses.total.backward()
        gradient = torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
        found[precision] = float(distributed.all_reduce(losses.total)) / world, distributed.all_reduce(gradient) / world
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["vit", "films"])
def test_two_ranks_in_bf16_are_closer_to_one_double_batch_than_bf16_is_to_fp32(name: str) -> None:
    alone = mean_over_ranks(name)
    (loss, gradient), (exact_loss, exact_gradient) = alone["bf16"], alone["fp32"]
    for found in run_on_ranks(2, mean_over_ranks, name):
        own_loss, own_gradient = found["bf16"]
        assert abs(own_loss - loss) < abs(loss - exact_loss)
        assert (own_gradient - gradient).norm() < (gradient - exact_gradient).norm()
