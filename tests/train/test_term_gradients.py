"""What is logged of each loss term's gradient, against the gradient of the total."""

from itertools import combinations

import pytest
import torch

from cmcgns import distributed
from cmcgns.methods.base import load_method
from cmcgns.methods.loss_weights import Ramp, weight_at
from cmcgns.train.engine import build_engine
from cmcgns.train.term_gradients import SHARED, term_gradients
from tests.ranks import run_on_ranks
from tests.small import losses_of, random_batch, small_config, small_model

STUDIES = 6
CONFIG = small_config(objective__local_negatives="both", objective__local_film_weight=0.5)
TERMS = ("global", "local_image", "local_report", "local_film", "reconstruction")


def logged() -> tuple[dict[str, float], float]:
    """The numbers for one global batch, and the squared norm of the total's gradient."""
    model = small_model(CONFIG).double()
    size = STUDIES // distributed.world_size()
    rows = [slice(rank * size, (rank + 1) * size) for rank in range(distributed.world_size())]
    batch = random_batch(CONFIG, rows[distributed.rank()], ranks=rows)
    losses = losses_of(CONFIG, model(batch, 2), batch, None, stage=2)
    found = term_gradients(model, losses.weighted)
    assert all(parameter.grad is None for parameter in model.parameters())
    losses.total.backward()  # the graph is still there
    shared = [
        p.grad.flatten() for name, p in model.named_parameters() if name.startswith(SHARED) and p.grad is not None
    ]
    mean = distributed.all_reduce(torch.cat(shared)) / distributed.world_size()
    return found, float(mean @ mean)


def test_norms_and_cosines_add_up_to_the_gradient_of_the_total() -> None:
    found, squared = logged()
    assert set(found) == {f"gradient_norm_{name}" for name in TERMS} | {
        f"gradient_cosine_{one}_{other}" for one, other in combinations(TERMS, 2)
    }
    norms = {name: found[f"gradient_norm_{name}"] for name in TERMS}
    crossed = sum(
        2 * norms[one] * norms[other] * found[f"gradient_cosine_{one}_{other}"] for one, other in combinations(TERMS, 2)
    )
    assert sum(norm**2 for norm in norms.values()) + crossed == pytest.approx(squared, rel=1e-9)


@pytest.mark.distributed
def test_two_ranks_log_what_one_logs_for_the_whole_batch() -> None:
    expected, _ = logged()
    for found, _ in run_on_ranks(2, logged):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_deepspeed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"log_term_gradients needs train.engine=torch and train.zero_stage=0"):
        small_config(log_term_gradients=True)


def trained(report: bool) -> list[float]:
    """Loss of three steps of plain torch on two ranks."""
    config = small_config(
        objective__local_negatives="both", engine="torch", zero_stage=0, num_workers=2, log_term_gradients=report
    )
    rows = [slice(0, 4), slice(4, 8)]
    engine = build_engine(small_model(config), config.train, torch.device("cpu"), load_method(config).frozen(1))
    losses = []
    for step in range(3):
        batch = random_batch(config, rows[distributed.rank()], seed=step, ranks=rows)
        found = losses_of(config, engine(batch, 1), batch, None)
        if report:
            assert term_gradients(engine.module, found.weighted)
        engine.backward(found.total, True)
        engine.step(1e-3)
        losses.append(found.total.item())
    return losses


@pytest.mark.distributed
def test_training_is_the_same_with_and_without_the_log() -> None:
    assert run_on_ranks(2, trained, True) == run_on_ranks(2, trained, False)


@pytest.mark.parametrize(("step", "weight"), [(1, 0.2), (100, 0.2), (150, 0.35), (200, 0.5), (999, 0.5)])
def test_a_ramp_is_linear_between_its_steps(step: int, weight: float) -> None:
    ramp = Ramp(begin=0.2, end=0.5, first_step=100, last_step=200)
    assert weight_at(ramp, step) == pytest.approx(weight)
    assert weight_at(0.7, step) == 0.7


def test_the_total_follows_the_ramp() -> None:
    ramp = {"begin": 0.0, "end": 1.0, "first_step": 0, "last_step": 4}
    config = small_config(objective__local_negatives="films", objective__local_film_weight=ramp)
    batch = random_batch(config, slice(0, STUDIES))
    found = losses_of(config, small_model(config).eval()(batch), batch, None)  # step 1 of 4
    names = dict(zip(("loss", "global", "image", "film"), found.terms.tolist(), strict=True))
    assert names["loss"] == pytest.approx(names["global"] + names["image"] + 0.25 * names["film"], rel=1e-5)


def test_a_ramp_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match="last_step 3 of a ramp must be after its first_step 3"):
        Ramp(begin=0.0, end=1.0, first_step=3, last_step=3)
