"""Weights of losses: fixed, or changing with the steps. Does not import torch, as settings do not."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from cmcgns.config import Section


class Ramp(Section):
    """A weight that changes linearly: `{begin: 0.0, end: 0.3, first_step: 100, last_step: 400}`."""

    begin: float = Field(ge=0.0)
    """Weight until `first_step`."""
    end: float = Field(ge=0.0)
    """Weight from `last_step` on."""
    first_step: int = Field(0, ge=0)
    last_step: PositiveInt
    """Steps count from the start of the run, over all stages."""

    @model_validator(mode="after")
    def check_steps(self) -> Self:
        if self.last_step <= self.first_step:
            raise ValueError(f"last_step {self.last_step} of a ramp must be after its first_step {self.first_step}")
        return self

    def at(self, step: int) -> float:
        """The weight at ``step``."""
        share = (step - self.first_step) / (self.last_step - self.first_step)
        return self.begin + (self.end - self.begin) * min(max(share, 0.0), 1.0)


LossWeight = Annotated[float, Field(ge=0.0)] | Ramp
"""A fixed weight, or one that changes."""


def weight_at(weight: LossWeight, step: int) -> float:
    """The ``weight`` of a loss at a step."""
    return weight.at(step) if isinstance(weight, Ramp) else weight
