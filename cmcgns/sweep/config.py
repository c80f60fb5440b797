"""Settings of `jobs/sweep.py`: those of a pretraining run, and those of the search."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from cmcgns.config import RUN_NAME, Config, Section
from cmcgns.measures import MEAN_RECALL, MEASURES


class SweepConfig(Section):
    space: dict[str, Any] | None = None
    """Search space, `section.key: {form: values}` with the forms uniform, log_uniform, integer, log_integer (two bounds) and
    choice (values). By default mask ratio, number of clusters and both temperatures, in ranges that suit the corpus."""
    trials: PositiveInt = 16
    """Number of trials; a grid ends earlier if it has fewer points."""
    search: Literal["random", "grid", "optuna"] = "optuna"
    """Search algorithm: `optuna` uses the results so far (TPE); `grid` accepts only choices."""
    scheduler: Literal["asha", "none"] = "asha"
    """`asha` stops a trial at a rung unless it is among the best of those that reached the rung so far."""
    metric: str = MEAN_RECALL
    """Metric that ranks trials, on the validation split; larger is better: mean_recall_at_1, or recall at 1 or 5 one way."""
    first_rung: float = Field(0.25, gt=0.0, lt=1.0)
    """Fraction of the steps before the first rung; each further rung is `reduction_factor` times as far."""
    reduction_factor: int = Field(2, ge=2)
    """One in this many trials continues after a rung."""
    max_concurrent: PositiveInt | None = None
    """Most trials at the same time; by default as many as fit on the cluster."""
    finalists: PositiveInt = 2
    """Number of best trials to run again with other seeds."""
    repeats: int = Field(2, ge=0)
    """Runs of each finalist with other seeds; the best mean wins."""
    seed: int = 0
    """Seed of the search."""
    resume: str | None = Field(None, pattern=RUN_NAME)
    """Name of a sweep under `run.storage` to resume."""
    retry_failed: bool = False
    """When resuming, retry failed trials from their last checkpoints (after a full disk, say)."""


class SweepJobConfig(Config):
    """All settings of a sweep."""

    sweep: SweepConfig = SweepConfig()

    @model_validator(mode="after")
    def check_sweep(self) -> Self:
        sweep, run = self.sweep, self.run
        if sweep.metric not in MEASURES:
            raise ValueError(
                f"sweep.metric {sweep.metric} is not reported; choose one of {', '.join(MEASURES)} (losses are not "
                "comparable between temperatures, numbers of clusters and mask ratios)"
            )
        if run.resume:
            raise ValueError(f"run.resume {run.resume} is for single runs; resume a sweep with --sweep.resume=<name>")
        if sweep.resume and run.name and sweep.resume != run.name:
            raise ValueError(f"sweep.resume {sweep.resume} keeps its name; leave out run.name {run.name}")
        return self

    def pretraining(self) -> Config:
        """Settings shared by all trials."""
        return Config(**{name: getattr(self, name) for name in Config.model_fields})
