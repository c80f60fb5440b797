"""200 steps in fp16 and bf16 beside fp32, with plain torch and ZeRO 1, 2, 3: the loss falls as far, and few steps are skipped."""

import math
from statistics import mean

import pytest

from tests.ranks import run_on_ranks
from tests.small import losses_of, random_batch
from tests.train.test_skipped_steps import ENGINES, engine_of, settings

STEPS, LAST = 200, 20
LEARNING_RATE = 3e-4
"""With 1e-3 the runs of this small model part: fp32 ended at 3.50, bf16 at 3.43 and fp16 at 3.98."""


def trained(engine_name: str, precision: str) -> tuple[list[float], int]:
    """The loss of each step on four batches in turn, and the number of skipped steps."""
    config = settings(engine_name, precision)
    engine = engine_of(config)
    losses, skipped = [], 0
    for number in range(STEPS):
        batch = random_batch(config, slice(0, 4), number % 4)
        loss = losses_of(config, engine(batch, 2), batch, None, 2).total
        engine.backward(loss, last=True)
        engine.step(LEARNING_RATE)
        losses.append(float(loss.detach()))
        skipped += not math.isfinite(float(engine.gradient_norm))
    return losses, skipped


@pytest.fixture(scope="module", name="wide")
def fixture_wide() -> list[float]:
    [(losses, skipped)] = run_on_ranks(1, trained, "torch", "fp32")
    assert skipped == 0
    assert mean(losses[-LAST:]) < 0.8 * mean(losses[:4])
    print(f"fp32: {mean(losses[:4]):.3f} to {mean(losses[-LAST:]):.3f} in {STEPS} steps")
    return losses


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision_learns_as_much_as_fp32(engine: str, precision: str, wide: list[float]) -> None:
    [(losses, skipped)] = run_on_ranks(1, trained, engine, precision)
    first, fell = mean(wide[:4]), mean(wide[:4]) - mean(wide[-LAST:])
    # the first steps in fp16 are skipped while the loss scale falls from 65,536
    assert skipped <= (16 if precision == "fp16" else 0)
    print(f"{engine} {precision}: to {mean(losses[-LAST:]):.3f}, {skipped} steps skipped")
    assert first - mean(losses[-LAST:]) == pytest.approx(fell, rel=0.05)
