"""What checkpoints and trials are ranked by: retrieval, whose meaning does not change with the settings."""

from typing import Any

MEAN_RECALL = "mean_recall_at_1"
MEASURES = (MEAN_RECALL, "i2t_recall_at_1", "t2i_recall_at_1", "i2t_recall_at_5", "t2i_recall_at_5")


def measure(metric: str, scores: dict[str, Any]) -> float:
    """The value of ``metric`` in the scores of a validation; larger is better."""
    if metric == MEAN_RECALL:
        return float(scores["i2t_recall_at_1"] + scores["t2i_recall_at_1"]) / 2
    return float(scores[metric])
