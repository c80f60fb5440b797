"""The whole model and objective on one, two and three ranks: the same global batch, the same loss and gradient."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.config import Config
from cmcgns.methods.base import load_method
from tests.ranks import run_on_ranks
from tests.small import losses_of, random_batch, small_config, small_model

GLOBAL_BATCH = 6
CONFIGS = {
    "vit": {},
    # fixed statistics, since batch normalisation over 2 studies is not that over 6
    "resnet": {
        "model__image_encoder": "resnet-tiny", "model__fixed_batch_statistics": True,
        "data__image_size": 64, "data__resize": 72,
    },
    "films": {
        "objective__local_negatives": "both", "objective__parts_weight": 0.5, "objective__balance": "uncertainty",
    },
    "published": {"objective__false_negatives": "margin", "objective__reconstruct": "all", "objective__margin_weight": 0.5},
}  # fmt: skip


def config_of(name: str) -> Config:
    return small_config(**CONFIGS[name])


def loss_and_gradients(name: str) -> tuple[float, list[float], dict[str, Tensor]]:
    """Mean over ranks of the loss, its float32 parts, and the gradients as DeepSpeed averages them."""
    config = config_of(name)
    model, world = small_model(config).double(), distributed.world_size()
    model.train()
    size = GLOBAL_BATCH // world
    rows = [slice(rank * size, (rank + 1) * size) for rank in range(world)]
    batch = random_batch(config, rows[distributed.rank()], ranks=rows)
    centroids_KD = F.normalize(torch.randn(6, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    losses = losses_of(config, model(batch, 2), batch, centroids_KD, stage=2)
    losses.total.backward()
    gradients = {}
    for key, parameter in model.named_parameters():
        gradients[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if world > 1:
            dist.all_reduce(gradients[key])
    parts = distributed.all_reduce(torch.cat([losses.terms, losses.statistics])) / world
    total = distributed.all_reduce(losses.total) / world
    return float(total), parts.tolist(), {key: value / world for key, value in gradients.items()}


def all_of_them() -> dict[str, tuple[float, list[float], dict[str, Tensor]]]:
    return {name: loss_and_gradients(name) for name in CONFIGS}


@pytest.fixture(scope="module", name="single")
def fixture_single() -> dict[str, tuple[float, list[float], dict[str, Tensor]]]:
    return all_of_them()


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_more_ranks_give_the_loss_and_gradient_of_one_whole_batch(
    ranks: int, single: dict[str, tuple[float, list[float], dict[str, Tensor]]]
) -> None:
    for found in run_on_ranks(ranks, all_of_them):
        for name, (total, parts, gradients) in found.items():
            expected_total, expected_parts, expected = single[name]
            assert total == pytest.approx(expected_total, rel=1e-12), name
            method = load_method(config_of(name))
            for part, theirs, ours in zip((*method.terms(2), *method.statistics), expected_parts, parts, strict=True):
                if part not in ("patches_std", "attended_std"):  # per-rank statistics: their mean is close, not equal
                    assert ours == pytest.approx(theirs, rel=1e-5), (name, part)  # logged as float32
            for key, gradient in gradients.items():
                # float64: sums in another order differ by about 1e-15 of the largest
                assert torch.allclose(gradient, expected[key], rtol=0, atol=1e-10), (name, key)


def test_every_parameter_takes_part_in_stage_2(single: dict[str, tuple[float, list[float], dict[str, Tensor]]]) -> None:
    for name, (_, _, gradients) in single.items():
        still = [key for key, gradient in gradients.items() if not gradient.any()]
        # attention is invariant to a bias that is equal for all keys
        assert all(key.endswith(("key.bias", "k_proj.bias")) for key in still), (name, still)
