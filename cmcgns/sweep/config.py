"""Settings of `jobs/sweep.py`: those of a pretraining run, and what is tried on them."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from cmcgns.config import MEAN_RECALL, MEASURES, Config, Section


class SweepConfig(Section):
    space: dict[str, Any] | None = None
    """What is drawn: `section.key: {form: values}` with the forms uniform, log_uniform, integer, log_integer (two bounds)
    and choice (values). By default mask ratio, cluster count and both temperatures, within what the corpus allows."""
    trials: PositiveInt = 16
    """Trials; a grid ends when all of its points have been tried."""
    search: Literal["random", "grid", "optuna"] = "optuna"
    """Who proposes them: `optuna` goes by the results so far (TPE), `grid` takes only choices."""
    scheduler: Literal["asha", "none"] = "asha"
    """`asha` stops a trial at a rung where it is not among the best of those that came there before."""
    metric: str = MEAN_RECALL
    """What trials are ranked by on the validation split, larger is better: mean_recall_at_1, or one way's recall at 1 or 5."""
    first_rung: float = Field(0.25, gt=0.0, lt=1.0)
    """Share of the steps before which no trial is stopped; each further rung lies `reduction_factor` times as far."""
    reduction_factor: int = Field(2, ge=2)
    """One in so many trials goes on at a rung."""
    max_concurrent: PositiveInt | None = None
    """Most trials at the same time; by default as many as the cluster has capacity for."""
    finalists: PositiveInt = 2
    """Best trials that are run again with other seeds."""
    repeats: int = Field(2, ge=0)
    """Times that each finalist is run again; the best mean wins."""
    seed: int = 0
    """Decides what is drawn."""
    resume: str | None = None
    """Name of a sweep under `run.storage` to go on with."""
    retry_failed: bool = False
    """When resumed, trials that failed (for want of storage, say) go on from their last checkpoints."""


class SweepJobConfig(Config):
    """All settings of a sweep."""

    sweep: SweepConfig = SweepConfig()

    @model_validator(mode="after")
    def sweep_makes_sense(self) -> Self:
        sweep, run = self.sweep, self.run
        if sweep.metric not in MEASURES:
            raise ValueError(
                f"sweep.metric {sweep.metric} is never reported; choose one of {', '.join(MEASURES)} (losses do not "
                "compare between temperatures, cluster counts and mask ratios)"
            )
        if run.resume:
            raise ValueError(f"run.resume {run.resume} is for single runs; a sweep goes on with --sweep.resume=<name>")
        if sweep.resume and run.name and sweep.resume != run.name:
            raise ValueError(f"sweep.resume {sweep.resume} goes on under its own name; leave run.name {run.name} out")
        return self

    def pretraining(self) -> Config:
        """The settings that all trials share."""
        return Config(**{name: getattr(self, name) for name in Config.model_fields})
