"""Metrics of a validation by which runs are ranked."""

from typing import Any

from cmcgns.errors import UserError

MEAN_RECALL = "mean_recall_at_1"
MEASURES = tuple(
    f"{way}_{kind}recall_at_{depth}"
    for kind in ("", "parts_", "combined_")
    for way in ("mean", "i2t", "t2i")
    for depth in (1, 5)
)
"""Metrics of a validation that can rank runs; `parts` and `combined` are those of methods that compare sentences with films."""


def measure(metric: str, scores: dict[str, Any]) -> float:
    """The value of ``metric`` in the scores of a validation; larger is better.

    Raises:
        UserError: the method does not report it.
    """
    ways = ("i2t", "t2i") if metric.startswith("mean_") else (metric[:3],)
    names = [f"{way}_{metric.partition('_')[2]}" for way in ways]
    if not set(names) <= scores.keys():
        raise UserError(not_reported(metric))
    return float(sum(scores[name] for name in names)) / len(names)


def needs_parts(metric: str) -> bool:
    """Whether only methods that compare sentences with films report ``metric``."""
    return "_parts_" in metric or "_combined_" in metric


def not_reported(metric: str) -> str:
    """Message for a ``metric`` that the method does not report."""
    return f"{metric} is not reported by this method, which compares no sentences with films; choose {MEAN_RECALL}"
