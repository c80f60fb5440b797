"""Lengths of the stages and the learning rate at each step."""

import math

import pytest

from cmcgns.config import TrainConfig
from cmcgns.errors import UserError
from cmcgns.train.schedule import Schedule, build_schedule
from tests.golden import golden


def train_config(**values: object) -> TrainConfig:
    lengths = {"stage1_steps": 10, "stage2_steps": 20, "warmup_steps": 2}
    return TrainConfig.model_validate({"global_batch_size": 8, **lengths, **values})


def test_each_stage_warms_up_to_the_peak_and_falls_by_a_half_cosine_towards_zero() -> None:
    schedule = Schedule(stage1=10, stage2=20, warmup=4)
    rates = [schedule.learning_rate(step, 1.0, 0.2) for step in range(1, 31)]
    for stage in (rates[:10], rates[10:]):
        assert stage[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        falling = [0.5 * (1 + math.cos(math.pi * i / (len(stage) - 4))) for i in range(len(stage) - 4)]
        assert stage[4:] == pytest.approx(falling)
        assert 0 < stage[-1] < 0.1  # 0 would be a step that does nothing


def test_the_wave_is_the_published_rate_of_lovt() -> None:
    """Its scheduler is never restarted: the rate falls in one epoch and rises in the next."""
    schedule = build_schedule(
        train_config(stage1_steps=41, stage2_steps=0, warmup_steps=0, schedule="wave"), studies=85
    )
    published = golden("lovt")["schedule.learning_rate_10_steps_an_epoch"].tolist()
    rates = [schedule.learning_rate(step, 1e-4, 0.0) for step in range(1, 42)]
    assert rates == pytest.approx(published, rel=0, abs=1e-15)
    assert rates[10] == 0.0
    assert rates[20] == 1e-4


def test_without_a_warm_up_a_stage_begins_at_the_peak() -> None:
    schedule = Schedule(stage1=10, stage2=0, warmup=0)
    assert schedule.learning_rate(1, 0.5, 1e-7) == 0.5
    assert schedule.warmed_up(1)


def test_the_warm_up_ends_in_each_stage_anew() -> None:
    schedule = Schedule(stage1=10, stage2=20, warmup=4)
    assert [step for step in range(1, 31) if not schedule.warmed_up(step)] == [1, 2, 3, 4, 11, 12, 13, 14]
    assert [schedule.stage(step) for step in (1, 10, 11, 30)] == [1, 1, 2, 2]
    assert schedule.total == 30


def test_a_third_stage_warms_up_anew_and_any_later_stage_may_be_skipped() -> None:
    schedule = Schedule(stage1=4, stage2=0, warmup=1, stage3=6)
    assert [schedule.stage(step) for step in (1, 4, 5, 10)] == [1, 1, 3, 3]
    assert [step for step in range(1, 11) if not schedule.warmed_up(step)] == [1, 5]
    assert (schedule.total, schedule.last_stage, schedule.ends) == (10, 3, (4, 4, 10))
    assert schedule.learning_rate(6, 1.0, 0.2) == 1.0
    assert Schedule(stage1=4, stage2=0, warmup=1).last_stage == 1
    epochs = {"stage2_steps": 3, "stage3_epochs": 0.5}
    assert build_schedule(train_config(**epochs), studies=80) == Schedule(stage1=10, stage2=3, warmup=2, stage3=5)


def test_epochs_are_whole_global_batches() -> None:
    epochs = {"stage1_steps": None, "stage1_epochs": 2.5, "warmup_steps": None, "warmup_epochs": 1}
    schedule = build_schedule(train_config(**epochs), studies=39)  # 4 steps of 8; the last 7 studies are dropped
    assert schedule == Schedule(stage1=10, stage2=20, warmup=4)


def test_stage_2_can_be_left_out() -> None:
    assert build_schedule(train_config(stage2_steps=0), studies=8).total == 10


@pytest.mark.parametrize(
    ("values", "studies", "message"),
    [
        ({}, 7, "train.global_batch_size 8 is larger than the corpus's 7 training studies"),
        ({"warmup_steps": 10}, 80, "a warm-up of 10 steps does not fit into a stage of 10 steps"),
        ({"stage1_steps": None, "stage1_epochs": 0.04}, 80, "train.stage1_epochs 0.04 of 10 steps each is less than one step"),
        ({"stage2_steps": None, "stage2_epochs": 0.01}, 80, "train.stage2_epochs 0.01 of 10 steps each is less than one step"),
    ],
)  # fmt: skip
def test_lengths_that_cannot_be_are_refused_with_numbers(values: dict[str, object], studies: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_schedule(train_config(**values), studies)
