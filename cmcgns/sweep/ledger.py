"""Ledger of a sweep: all trials with their drawn settings and results. Each change is stored before anything depends on it.

Alternatives tried on 2026-11-29. Optuna 5.0 JournalStorage: no backend for buckets, and a failed trial cannot be set back to
waiting (`UpdateFinishedTrialError`), so a retry would be another trial. Ray 2.60 `Tuner.restore`: num_samples is fixed, so
sweep.trials could not be raised, and its pickled state is up to 10 s old, so a trial could start twice.
"""

import json
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any, Literal

from cmcgns import storage
from cmcgns.run_folder import RunFolder

Status = Literal["waiting", "running", "finished", "stopped", "failed"]
LEDGER = "sweep.json"
DONE: tuple[Status, ...] = ("finished", "stopped", "failed")


@dataclass
class Trial:
    """One trial, or a repetition of one with another seed."""

    number: int
    drawn: dict[str, Any]
    """Value of each drawn ``section.key``."""
    seed: int
    """The trial's train.seed."""
    repeats: int | None = None
    """Number of the trial that this one repeats."""
    status: Status = "waiting"
    values: dict[int, float] = field(default_factory=dict)
    """The metric at each step where it was measured."""
    step: int = 0
    seconds: float = 0.0
    """Wall-clock time of all attempts."""
    reason: str | None = None
    """Why it failed."""
    costs: dict[str, float] = field(default_factory=dict)
    """Seconds of each part of the last attempt."""

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return f"{self.number:04d}"

    @property
    def value(self) -> float | None:
        """The metric at its last measurement."""
        return self.values[max(self.values)] if self.values else None


@dataclass(frozen=True)
class SeedScores:
    """Metric of a trial for its own seed and those of its repetitions."""

    trial: Trial
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for one seed."""
        return stdev(self.values) if len(self.values) > 1 else None


class Ledger:
    """All trials of a sweep, stored on every change."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.trials: list[Trial] = []
        if folder.resumed and storage.exists(folder.file(LEDGER)):
            rows = json.loads(storage.read_bytes(folder.file(LEDGER)))["trials"]
            self.trials = [Trial(**row | {"values": {int(k): v for k, v in row["values"].items()}}) for row in rows]

    @property
    def first_runs(self) -> list[Trial]:
        """Trials that are not repetitions."""
        return [trial for trial in self.trials if trial.repeats is None]

    @property
    def unfinished(self) -> list[Trial]:
        """Trials that have not ended, in the order of their proposal."""
        return [trial for trial in self.trials if trial.status not in DONE]

    def retry_failed(self) -> None:
        """Set failed trials back to waiting."""
        for trial in self.trials:
            if trial.status == "failed":
                trial.status, trial.reason = "waiting", None

    def add(self, drawn: dict[str, Any], seed: int, repeats: int | None = None) -> Trial:
        """Add a new trial and store it."""
        trial = Trial(len(self.trials), drawn, seed, repeats)
        self.trials.append(trial)
        self.save()
        return trial

    def save(self) -> None:
        """Store all trials."""
        self.folder.write_json(LEDGER, {"trials": [asdict(trial) for trial in self.trials]})

    def ranked(self) -> list[Trial]:
        """Finished trials, best first; ties go to the earlier one."""
        done = [trial for trial in self.first_runs if trial.status == "finished" and trial.values]
        return sorted(done, key=lambda trial: (-(trial.value or 0.0), trial.number))

    def missing_repeats(self, finalists: int, repeats: int) -> list[tuple[Trial, int]]:
        """Missing repetitions of the best ``finalists`` trials: the trial, and the number of the repetition."""
        return [
            (trial, again)
            for trial in self.ranked()[:finalists]
            for again in range(sum(other.repeats == trial.number for other in self.trials), repeats)
        ]

    def scores_of(self, trial: Trial) -> SeedScores:
        """Scores of ``trial`` and its repetitions."""
        runs = [other for other in self.trials if other.repeats == trial.number and other.status == "finished"]
        return SeedScores(trial, tuple(run.value for run in (trial, *runs) if run.value is not None))

    def finalist_scores(self, finalists: int) -> list[SeedScores]:
        """Scores of the best ``finalists`` trials, best mean first."""
        return sorted(map(self.scores_of, self.ranked()[:finalists]), key=lambda scores: -scores.mean)
