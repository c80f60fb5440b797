"""Steps of each stage, and the learning rate at each step."""

import itertools
import math
from dataclasses import dataclass

from cmcgns.config import TrainConfig
from cmcgns.errors import UserError

STAGES = ("stage1", "stage2", "stage3")


@dataclass(frozen=True)
class Schedule:
    """Steps of each stage, computed from the steps or epochs in the settings; 0 for a stage that is skipped."""

    stage1: int
    stage2: int
    warmup: int
    stage3: int = 0
    wave: int = 0
    """Steps in which the learning rate falls to 0, and in which it rises again; 0 if it only falls, over the stage."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps of the stages in order."""
        return self.stage1, self.stage2, self.stage3

    @property
    def ends(self) -> tuple[int, ...]:
        """Last step of each stage."""
        return tuple(itertools.accumulate(self.lengths))

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return sum(self.lengths)

    @property
    def last_stage(self) -> int:
        """The last stage that has steps."""
        return max(stage for stage, length in enumerate(self.lengths, start=1) if length or stage == 1)

    def stage(self, step: int) -> int:
        """The stage of ``step`` (counted from 1); the last one for a step after the end."""
        return next((stage for stage, end in enumerate(self.ends, start=1) if step <= end), self.last_stage)

    def warmed_up(self, step: int) -> bool:
        """True if ``step`` is after its stage's warm-up."""
        return self._within(step)[0] > self.warmup

    def learning_rate(self, step: int, peak: float, start: float) -> float:
        """Linear warm-up from ``start`` to ``peak``, then a half cosine to 0 over the stage of ``step``, or a wave."""
        done, length = self._within(step)
        if done <= self.warmup:
            return start + (peak - start) * (done - 1) / max(self.warmup, 1)
        share = (done - 1 - self.warmup) / (self.wave or max(length - self.warmup, 1))
        return peak * 0.5 * (1 + math.cos(math.pi * share))

    def _within(self, step: int) -> tuple[int, int]:
        """Steps of its stage done with ``step``, and the stage's length."""
        stage = self.stage(step)
        length = self.lengths[stage - 1]
        return step - self.ends[stage - 1] + length, length


def build_schedule(config: TrainConfig, studies: int) -> Schedule:
    """The schedule for a corpus with ``studies`` training studies; an epoch is the whole global batches in it."""
    per_epoch = studies // config.global_batch_size
    if per_epoch == 0:
        raise UserError(
            f"train.global_batch_size {config.global_batch_size} is larger than the corpus's {studies} training studies; lower it"
        )
    steps = {
        name: given if given is not None else round(epochs * per_epoch)
        for name, given, epochs in (
            ("stage1", config.stage1_steps, config.stage1_epochs or 0),
            ("stage2", config.stage2_steps, config.stage2_epochs or 0),
            ("stage3", config.stage3_steps, config.stage3_epochs or 0),
            ("warmup", config.warmup_steps, config.warmup_epochs or 0),
        )
    }
    for name in STAGES:
        epochs = getattr(config, f"{name}_epochs")
        if epochs and not steps[name]:
            raise UserError(
                f"train.{name}_epochs {epochs} of {per_epoch} steps each is less than one step; raise it, or give "
                f"train.{name}_steps"
            )
    shortest = min(steps[name] for name in STAGES if steps[name])
    if steps["warmup"] >= shortest:
        raise UserError(
            f"a warm-up of {steps['warmup']} steps does not fit into a stage of {shortest} steps; lower train.warmup_steps or "
            "train.warmup_epochs"
        )
    return Schedule(**steps, wave=per_epoch if config.schedule == "wave" else 0)
