"""Segmentation: a U-Net decoder trained on fractions of the labels, scored by Dice.

N films, B films of a batch, K mask classes, R pixels of the square.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cmcgns.data.labelled.base import ImageSet
from cmcgns.errors import UserError
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.encoders import EncoderSpec
from cmcgns.evaluate.figures import SAMPLES, Figure, masks
from cmcgns.evaluate.films import Films
from cmcgns.evaluate.heads import DenseModel, build_dense, fit_head, predict_head
from cmcgns.evaluate.scores import OF_A_CLASS, Resampling, Score, percent
from cmcgns.models.device import CPU

Floats = NDArray[np.float64]
STRIDE = 2
"""The head's maps have half the film's size; they are upsampled before they are compared."""
SMOOTH = 1.0
PRESENT, TOGETHER = "Dice where present", "Dice of all films"


def segmentation_scores(
    encoder: EncoderSpec, images: ImageSet, parts: dict[str, Films], groups: list[str], share: float, tuned: bool,
    settings: EvaluateConfig, shown: list[Figure] | None = None, device: torch.device = CPU,
) -> list[Score]:  # fmt: skip
    """Mean Dice over the films with a class, and Dice over the pixels of all films, for each class and averaged.

    Appends some test films with masks to ``shown``.
    """
    if not parts["test"].mask_NKRR.any():
        raise UserError(f"{images.name}: no test film has any of {', '.join(images.mask_classes)}")
    side = parts["train"].film_NRR.shape[-1]
    loaded, kinds = encoder.load().to(device), len(images.mask_classes)
    model = build_dense(loaded, side, STRIDE, kinds, tuned, settings.seed, settings.precision)
    steps = fit_head(model, dice_and_cross_entropy, parts["train"], parts["valid"], settings, settings.seed)
    if shown is not None:
        some = parts["test"].take(np.flatnonzero(parts["test"].mask_NKRR.any(axis=(1, 2, 3)))[:SAMPLES].tolist())
        answer_NRR = np.concatenate([each.any(1) for _, each in answers(model, some, settings.head_batch)])
        title = f"{encoder.name}: masks of {images.name}, {percent(share)} of labels"
        shown.append(masks(title, some.film_NRR, np.asarray(some.mask_NKRR.any(axis=1)), answer_NRR))
    overlap_NK, area_NK = counts(model, parts["test"], settings.head_batch)
    there_NK = np.asarray(parts["test"].mask_NKRR.any(axis=(2, 3)))
    resampling = Resampling.of(groups, settings.resamples, settings.seed)
    setting = f"{'tuned' if tuned else 'frozen'}, {percent(share)} of labels"
    rows = [
        row
        for k, name in enumerate(images.mask_classes)
        if there_NK[:, k].any()
        for row in _dice_of_class(name, overlap_NK[:, k], area_NK[:, k], there_NK[:, k], resampling)
    ]
    for metric in (PRESENT, TOGETHER):
        own = [row for row in rows if row[0].startswith(metric)]
        left_out = [name for k, name in enumerate(images.mask_classes) if not there_NK[:, k].any()]
        note = f"{steps} steps" + (f"; left out, on no test film: {', '.join(left_out)}" if left_out else "")
        resampled_R = np.nanmean(np.stack([row[2] for row in own]), axis=0)
        number = int(there_NK.any(1).sum()) if metric == PRESENT else len(there_NK)
        rows.append((f"mean {metric}", float(np.mean([row[1] for row in own])), resampled_R, number, note))
    return [
        Score("segmentation", images.name, setting, metric, encoder.name, value, number, resampled_R, note)
        for metric, value, resampled_R, number, note in reversed(rows)
    ]


def _dice_of_class(
    name: str, overlap_N: Floats, area_N: Floats, there_N: NDArray[np.bool_], resampling: Resampling
) -> list[tuple[str, float, Floats, int, str]]:
    """Both scores of one class. Films without the class have no Dice: an empty prediction there does not count as 1."""
    dice_N = np.where(there_N, 2 * overlap_N / np.maximum(area_N, 1), np.nan)
    together = 2 * overlap_N.sum() / max(area_N.sum(), 1)
    together_R = 2 * resampling.mean(overlap_N) / np.maximum(resampling.mean(area_N), 1e-12)
    number = int(there_N.sum())
    return [
        (f"{PRESENT}{OF_A_CLASS}{name}", float(np.nanmean(dice_N)), resampling.mean(dice_N), number, ""),
        (f"{TOGETHER}{OF_A_CLASS}{name}", float(together), together_R, len(there_N), ""),
    ]


def dice_and_cross_entropy(map_BKrr: Tensor, films: Films) -> Tensor:
    """Cross-entropy of each pixel plus 1 - soft Dice of each class over the batch."""
    target_BKRR = torch.from_numpy(films.mask_NKRR).to(map_BKrr.device).float()
    logit_BKRR = enlarged(map_BKrr, target_BKRR.shape[-1])
    overlap_K = (logit_BKRR.sigmoid() * target_BKRR).sum((0, 2, 3))
    area_K = logit_BKRR.sigmoid().sum((0, 2, 3)) + target_BKRR.sum((0, 2, 3))
    soft_dice = (2 * overlap_K + SMOOTH) / (area_K + SMOOTH)
    return F.binary_cross_entropy_with_logits(logit_BKRR, target_BKRR) + (1 - soft_dice).mean()


def enlarged(map_BKrr: Tensor, side: int) -> Tensor:
    """(B, K, side, side)."""
    return F.interpolate(map_BKrr, size=(side, side), mode="bilinear", align_corners=False)


def answers(model: DenseModel, films: Films, size: int) -> Iterator[tuple[slice, NDArray[np.bool_]]]:
    """The model's masks, batch by batch, (B, K, R, R)."""
    for rows, map_BKrr in predict_head(model, films, size):
        yield rows, (enlarged(map_BKrr, films.film_NRR.shape[-1]) > 0).cpu().numpy()


def counts(model: DenseModel, films: Films, size: int) -> tuple[Floats, Floats]:
    """Intersection of true and predicted mask, and the sum of both areas, in pixels per film and class, (N, K)."""
    kinds = films.mask_NKRR.shape[1]
    overlap_NK, area_NK = np.zeros((len(films), kinds)), np.zeros((len(films), kinds))
    for rows, answer_BKRR in answers(model, films, size):
        mask_BKRR = films.mask_NKRR[rows]
        overlap_NK[rows] = (answer_BKRR & mask_BKRR).sum((2, 3))
        area_NK[rows] = answer_BKRR.sum((2, 3)) + mask_BKRR.sum((2, 3))
    return overlap_NK, area_NK
