"""Classification: linear probes on frozen features at shares of the labels, by the label draws that all encoders share.

N images, C channels, K classes, S label draws.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cmcgns.errors import UserError
from cmcgns.evaluate.features import Features
from cmcgns.evaluate.figures import Figure, curves
from cmcgns.evaluate.job_config import EvaluateConfig
from cmcgns.evaluate.probe import linear_probe
from cmcgns.evaluate.scores import OF_A_CLASS, Resampling, Score, over_draws, percent
from cmcgns.evaluate.sets.base import ImageSet

Floats = NDArray[np.float64]
DRAWS = 1000
"""Most label draws of one seed; the next seed's are others."""
AUC, ACCURACY = "AUC", "accuracy"


def labels_of(rows: pa.Table) -> Floats:
    """(N, K): 1, 0, NaN where unknown."""
    return np.array(rows["labels"].to_pylist(), np.float64)


def drawn_groups(groups: Sequence[str], share: float, seed: int) -> NDArray[np.bool_]:
    """Which images a draw of ``share`` of the groups takes; a smaller share of the same seed is a part of a larger one."""
    names = sorted(set(groups), key=lambda name: hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8).digest())
    taken = set(names[: max(round(share * len(names)), 1)])
    return np.array([group in taken for group in groups])


def probe_scores(
    features: Features, images: ImageSet, encoder: str, settings: EvaluateConfig, shown: list[Figure] | None = None
) -> list[Score]:
    """AUC of each class and their mean, or accuracy where classes exclude each other, for each share of the labels.

    ``shown`` is given the curves of the last share.
    """
    parts = {}
    for split in ("train", "valid", "test"):
        rows = images.split(split)
        places, found = features.of(rows["image_id"].to_pylist())
        kept = rows.take(places)
        parts[split] = kept, labels_of(kept), found.pooled_NC.astype(np.float64)
    for split, (rows, *_) in parts.items():
        if not len(rows):
            raise UserError(f"{images.name}: no image of the {split} split can be used")
    (_, train_NK, train_NC), (_, valid_NK, valid_NC), (_, test_NK, test_NC) = parts.values()
    groups = parts["train"][0]["group"].to_pylist()
    resampling = Resampling.of(parts["test"][0]["group"].to_pylist(), settings.resamples, settings.seed)
    scores: list[Score] = []
    for share in settings.fractions:
        setting, draws = f"linear, {percent(share)} of labels", settings.draws if share < 1 else 1
        found_S = []
        for draw in range(draws):
            taken = drawn_groups(groups, share, settings.seed * DRAWS + draw)
            found_S.append(
                linear_probe(train_NC[taken], train_NK[taken], valid_NC, valid_NK, test_NC, images.exclusive)
            )
        table = (accuracy_scores if images.exclusive else auc_scores)(found_S, images, test_NK, resampling)
        scores += [
            Score("classification", images.name, setting, metric, encoder, value, len(test_NK), resampled, note)
            for metric, value, resampled, note in table
        ]
    if shown is not None:
        title = f"{encoder}: {setting} of {images.name}"
        shown.append(curves(title, found_S[-1], test_NK, images.classes))
    return scores


Found = tuple[str, float, Floats | None, str]


def auc_scores(score_SNK: Sequence[Floats], images: ImageSet, label_NK: Floats, resampling: Resampling) -> list[Found]:
    """The mean over classes first, then each class. A class without positives, or without negatives, in the test images is left
    out of the mean, and said."""
    rows: list[Found] = []
    left_out = []
    for k, name in enumerate(images.classes):
        known_n = label_NK[np.isfinite(label_NK[:, k]), k] > 0.5
        if known_n.all() or not known_n.any():
            left_out.append(f"{name} (no {'negatives' if len(known_n) and known_n.all() else 'positives'})")
            continue
        values = [class_auc(scores_NK[:, k], label_NK[:, k]) for scores_NK in score_SNK]
        value, resampled = over_draws(
            values, [resampling.auc(scores_NK[:, k], label_NK[:, k]) for scores_NK in score_SNK], resampling.seed
        )
        rows.append((f"{AUC}{OF_A_CLASS}{name}", value, resampled, ""))
    note = f"left out: {', '.join(left_out)}" if left_out else ""
    if not rows:
        raise UserError(f"{images.name}: no class has both positives and negatives in the test images; {note}")
    mean = float(np.mean([value for _, value, _, _ in rows]))
    together = np.nanmean(np.stack([resampled for _, _, resampled, _ in rows if resampled is not None]), axis=0)
    return [(f"mean {AUC}", mean, together, note), *rows]


def class_auc(score_N: Floats, label_N: Floats) -> float:
    """Area under the ROC curve, by torchmetrics, over the images whose label is known."""
    import torch
    from torchmetrics.functional.classification import binary_auroc

    known = np.isfinite(label_N)
    # ranks, since torchmetrics takes scores outside of [0, 1] for logits and rounds the far ones to one value
    rank_n = np.unique(score_N[known], return_inverse=True)[1] / max(known.sum(), 1)
    return float(binary_auroc(torch.from_numpy(rank_n), torch.from_numpy(label_N[known] > 0.5).long()))


def accuracy_scores(
    score_SNK: Sequence[Floats], images: ImageSet, label_NK: Floats, resampling: Resampling
) -> list[Found]:
    """The share of the test images whose class is found."""
    hit_SN = [(scores_NK.argmax(1) == label_NK.argmax(1)).astype(np.float64) for scores_NK in score_SNK]
    value, resampled = over_draws(
        [hit_N.mean() for hit_N in hit_SN], [resampling.mean(hit_N) for hit_N in hit_SN], resampling.seed
    )
    return [(ACCURACY, value, resampled, "")]
