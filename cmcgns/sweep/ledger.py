"""The ledger of a sweep: every trial with what it drew and how it went, written down before anything depends on it."""

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
    """One trial, or the repetition of one with another seed."""

    number: int
    drawn: dict[str, Any]
    """Value of each drawn ``section.key``."""
    seed: int
    """The trial's train.seed."""
    repeats: int | None = None
    """Number of the trial that this one repeats."""
    status: Status = "waiting"
    values: dict[int, float] = field(default_factory=dict)
    """The metric at each step that it was measured at."""
    step: int = 0
    seconds: float = 0.0
    """Wall-clock time, of all attempts."""
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
        """The metric when it was measured last."""
        return self.values[max(self.values)] if self.values else None


@dataclass(frozen=True)
class SeedScores:
    """A trial beside its repetitions."""

    trial: Trial
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, of two or more."""
        return stdev(self.values) if len(self.values) > 1 else None


class Ledger:
    """All trials of a sweep. Every change is in storage before the next thing happens."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.trials: list[Trial] = []
        if folder.resumed and storage.exists(folder.file(LEDGER)):
            rows = json.loads(storage.read_bytes(folder.file(LEDGER)))["trials"]
            self.trials = [Trial(**row | {"values": {int(k): v for k, v in row["values"].items()}}) for row in rows]

    @property
    def first_runs(self) -> list[Trial]:
        """The trials proper, without repetitions."""
        return [trial for trial in self.trials if trial.repeats is None]

    @property
    def unfinished(self) -> list[Trial]:
        """Trials that have not come to an end, in the order in which they were proposed."""
        return [trial for trial in self.trials if trial.status not in DONE]

    def retry_failed(self) -> None:
        """Let the trials that failed wait for another attempt."""
        for trial in self.trials:
            if trial.status == "failed":
                trial.status, trial.reason = "waiting", None

    def add(self, drawn: dict[str, Any], seed: int, repeats: int | None = None) -> Trial:
        """A new trial."""
        trial = Trial(len(self.trials), drawn, seed, repeats)
        self.trials.append(trial)
        self.save()
        return trial

    def save(self) -> None:
        """Write everything down."""
        self.folder.write_json(LEDGER, {"trials": [asdict(trial) for trial in self.trials]})

    def ranked(self) -> list[Trial]:
        """The trials that ran to their end, best first; of equals the earlier."""
        done = [trial for trial in self.first_runs if trial.status == "finished" and trial.values]
        return sorted(done, key=lambda trial: (-(trial.value or 0.0), trial.number))

    def missing_repeats(self, finalists: int, repeats: int) -> list[tuple[Trial, int]]:
        """Each of the best ``finalists`` trials with the numbers of its repetitions that are not there yet."""
        return [
            (trial, again)
            for trial in self.ranked()[:finalists]
            for again in range(sum(other.repeats == trial.number for other in self.trials), repeats)
        ]

    def standing(self, trial: Trial) -> SeedScores:
        """``trial`` with its repetitions."""
        runs = [other for other in self.trials if other.repeats == trial.number and other.status == "finished"]
        return SeedScores(trial, tuple(run.value for run in (trial, *runs) if run.value is not None))

    def finalist_scores(self, finalists: int) -> list[SeedScores]:
        """The best ``finalists`` trials, by the mean over their seeds."""
        return sorted(map(self.standing, self.ranked()[:finalists]), key=lambda found: -found.mean)
