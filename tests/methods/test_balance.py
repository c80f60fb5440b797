"""Balanced losses: each counts by its logarithm, which is what uncertainty weights come to at their best."""

import pytest
import torch
from torch import Tensor

from cmcgns.methods.base import load_method
from cmcgns.methods.cm_cgns.losses import LEAST_LEVEL, by_logarithm
from tests.small import losses_of, random_batch, small_config, small_model


def terms_of(weight: Tensor) -> dict[str, Tensor]:
    return {
        "loss_global": weight.square().sum(),
        "loss_local_film": (weight - 3).abs().sum(),
        "loss_local_image": -weight.cos().mean(),
    }


def test_the_gradient_is_that_of_uncertainty_weights_whose_variances_fit_best() -> None:
    weight = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64, requires_grad=True)
    total = sum(by_logarithm(terms_of(weight)).values(), start=torch.zeros((), dtype=torch.float64))
    (found,) = torch.autograd.grad(total, weight)
    # variances by minimising L / v + log v for each loss, with the patch loss moved to [0, 2]
    losses = {name: term + (name == "loss_local_image") for name, term in terms_of(weight).items()}
    expected, value = torch.zeros_like(weight), 0.0
    for loss in losses.values():
        grid = torch.linspace(0.01, 20, 2_000_000, dtype=torch.float64)
        variance = grid[(loss.detach() / grid + grid.log()).argmin()]
        expected += torch.autograd.grad(loss / variance, weight, retain_graph=True)[0]
        value += float(loss.detach().log())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert total.item() == pytest.approx(value)


def test_a_loss_of_zero_neither_divides_by_zero_nor_takes_over() -> None:
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    balanced = by_logarithm({"loss_global": weight.abs().sum() * 1e-9, "loss_local_film": (weight - 3).abs().sum()})
    sum(balanced.values(), start=torch.zeros(())).backward()
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())
    assert float(weight.grad.abs().max()) <= 1 / 9 + 1e-9 / LEAST_LEVEL


def test_only_the_total_is_balanced_and_the_terms_are_logged_as_they_are() -> None:
    logged, totals = [], []
    for balance in ("fixed", "uncertainty"):
        config = small_config(objective__local_negatives="films", objective__balance=balance)
        batch = random_batch(config, slice(0, 6))
        losses = losses_of(config, small_model(config)(batch, 2), batch, None, stage=2)
        logged.append(dict(zip(load_method(config).terms(2), losses.terms.tolist(), strict=True)))
        totals.append(losses.total)
    assert logged[0].keys() == logged[1].keys()
    assert {name for name in logged[0] if logged[0][name] != logged[1][name]} == {"loss"}
    assert totals[0] != totals[1]
