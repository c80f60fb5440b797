"""Scores with intervals, and the resampling that makes encoders comparable in pairs.

N test images or queries, R resamples, S label draws.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
OF_A_CLASS = ": "
"""Separates a metric from its class; metrics without it are means over classes."""
CHUNK_BYTES = 256 * 2**20
"""Memory for resampling weights at a time."""


@dataclass(frozen=True)
class Score:
    """One score of one encoder. Scores with the same ``key`` use the same resamples, for paired comparison."""

    task: str
    images: str
    """Name of the set."""
    setting: str
    """Other conditions, such as the fraction of the labels."""
    metric: str
    encoder: str
    value: float
    number: int
    """Number of test images, studies or sentences."""
    resampled_R: Floats | None = field(default=None, repr=False, compare=False)
    """The score on each resample of the test groups (and label draws); None if it was not resampled."""
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Identifies the score, without the encoder."""
        return self.task, self.images, self.setting, self.metric

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % percentile interval."""
        return None if self.resampled_R is None else percentiles(self.resampled_R)

    def row(self) -> dict[str, Any]:
        """The score as a row of result files."""
        low, high = self.interval or (None, None)
        names = ("task", "images", "setting", "metric", "encoder", "value")
        return {name: getattr(self, name) for name in names} | {
            "low": low,
            "high": high,
            "number": self.number,
            "note": self.note,
        }


@dataclass(frozen=True)
class Difference:
    """Difference between two encoders, paired over the same resamples."""

    first: Score
    second: Score

    @property
    def value(self) -> float:
        """First minus second."""
        return self.first.value - self.second.value

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval; None if the two do not have the same resamples."""
        a, b = self.first.resampled_R, self.second.resampled_R
        alike = a is not None and b is not None and len(a) == len(b) and self.first.number == self.second.number
        return percentiles(a - b) if alike and a is not None and b is not None else None


def differences(scores: Sequence[Score], encoder: str) -> list[Difference]:
    """Difference of ``encoder`` to each other encoder, for each score that both have."""
    own = {score.key: score for score in scores if score.encoder == encoder}
    others = [score for score in scores if score.encoder != encoder and score.key in own]
    return [Difference(own[score.key], score) for score in others]


def percentiles(values_R: Floats) -> tuple[float, float] | None:
    """The 2.5 and 97.5 % percentiles, ignoring NaN; None if all are NaN."""
    if not np.isfinite(values_R).any():
        return None
    low, high = np.nanpercentile(values_R, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Resampling:
    """Bootstrap of a test split: draws whole groups with replacement, the same for every encoder and metric."""

    group_N: NDArray[np.int64]
    """Number of each image's group."""
    resamples: int
    seed: int = 0

    @classmethod
    def of(cls, groups: Sequence[str], resamples: int, seed: int = 0) -> "Resampling":
        """Resampling of images with these ``groups``; no resamples if there is only one group."""
        resamples = resamples if len(set(groups)) > 1 else 0
        return cls(np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)[1], resamples, seed)

    def chunks(self) -> Iterator[tuple[slice, Floats]]:
        """The R x N table of how often each image was drawn, in chunks of rows."""
        groups = int(self.group_N.max()) + 1 if len(self.group_N) else 0
        random = np.random.default_rng([self.seed, groups])
        size = max(int(CHUNK_BYTES / 8 / max(len(self.group_N), 1)), 1)
        for start in range(0, self.resamples, size):
            rows = slice(start, min(start + size, self.resamples))
            drawn_rG = random.multinomial(groups, np.full(groups, 1 / groups), size=rows.stop - rows.start)
            yield rows, drawn_rG[:, self.group_N].astype(np.float64)

    def mean(self, value_N: Floats) -> Floats:
        """Mean of ``value_N`` in each resample, ignoring NaN."""
        known_N, found_R = np.isfinite(value_N), np.empty(self.resamples)
        for rows, weight_rN in self.chunks():
            weight_rn = weight_rN[:, known_N]
            with np.errstate(invalid="ignore"):
                found_R[rows] = weight_rn @ value_N[known_N] / weight_rn.sum(1)
        return found_R

    def auc(self, score_N: Floats, label_N: Floats) -> Floats:
        """Area under the ROC curve in each resample, over images with a known label."""
        known_N, found_R = np.isfinite(label_N), np.empty(self.resamples)
        for rows, weight_rN in self.chunks():
            found_R[rows] = weighted_auc(score_N[known_N], label_N[known_N] > 0.5, weight_rN[:, known_N])
        return found_R


def weighted_auc(score_N: Floats, positive_N: NDArray[np.bool_], weight_RN: Floats) -> Floats:
    """Area under the ROC curve for each row of weights: the probability that a positive scores higher than a negative; ties
    count half. NaN if a row has only positives or only negatives.
    """
    _, level_N = np.unique(score_N, return_inverse=True)
    order_N = np.argsort(level_N, kind="stable")
    starts = np.flatnonzero(np.diff(level_N[order_N], prepend=-1))
    weight_RN = weight_RN[:, order_N]
    positive_RL = np.add.reduceat(weight_RN * positive_N[order_N], starts, axis=1)
    negative_RL = np.add.reduceat(weight_RN * ~positive_N[order_N], starts, axis=1)
    below_RL = np.cumsum(negative_RL, axis=1) - negative_RL
    above_R = (positive_RL * (below_RL + 0.5 * negative_RL)).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area_R: Floats = above_R / (positive_RL.sum(1) * negative_RL.sum(1))
    return area_R


def over_draws(values_S: Sequence[float], resampled_SR: Sequence[Floats], seed: int = 0) -> tuple[float, Floats]:
    """Mean over label draws, and its resamples, which resample the draws as well."""
    table_SR = np.stack(resampled_SR)
    draws, resamples = table_SR.shape
    picked_SR = np.random.default_rng([seed, draws, resamples]).integers(0, draws, (draws, resamples))
    return float(np.nanmean(values_S)), np.nanmean(np.take_along_axis(table_SR, picked_SR, axis=0), axis=0)


def percent(share: float) -> str:
    """A fraction of the labels as text, without rounding."""
    return f"{100 * share:g}%"


def with_suffix(scores: Sequence[Score], ending: str) -> list[Score]:
    """``scores`` with ``ending`` appended to the encoder names."""
    return [replace(score, encoder=score.encoder + ending) for score in scores]
