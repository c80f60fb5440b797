"""Detection: box centres and sides from a U-Net decoder (Zhou et al. 2019, "Objects as Points"), scored by COCO's mAP.

N films, B films of a batch, K box classes, h cells of the map along a side, n detections.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cmcgns.data.labelled.base import ImageSet
from cmcgns.errors import UserError
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.encoders import EncoderSpec
from cmcgns.evaluate.figures import SAMPLES, Figure, boxes
from cmcgns.evaluate.films import Films
from cmcgns.evaluate.heads import DenseModel, build_dense, fit_head, predict_head
from cmcgns.evaluate.scores import Resampling, Score, percent
from cmcgns.models.device import CPU

Floats = NDArray[np.float64]
STRIDE = 4
MAX_DETECTIONS, MIN_SCORE = 100, 0.01
"""Maximum number of detections per film, as in COCO, and their minimum score."""
NEAR = 0.5
"""Cells with at least this heat are trained to predict the sides of the box."""
RESAMPLES = 100
"""Maximum number of resamples of the films: each one is a whole evaluation."""
SIDES_WEIGHT = 2.0
EMPTY = -3.0
"""Initial log-odds of a centre in each cell: almost all cells are empty."""


class Detections(NamedTuple):
    """Detections on one film, best first."""

    kind_n: NDArray[np.int64]
    score_n: Floats
    box_n4: Floats
    """x0, y0, x1, y1 in pixels of the square."""


def detection_scores(
    encoder: EncoderSpec, images: ImageSet, parts: dict[str, Films], groups: list[str], share: float, tuned: bool,
    settings: EvaluateConfig, shown: list[Figure] | None = None, device: torch.device = CPU,
) -> list[Score]:  # fmt: skip
    """COCO's mAP (0.50:0.95) and AP at 0.50 over all test films, including those without boxes.

    Appends some test films with boxes to ``shown``.
    """
    if not any(map(len, parts["test"].boxes)):
        raise UserError(f"{images.name}: no test film has any of {', '.join(images.box_classes)}")
    side, kinds = parts["train"].film_NRR.shape[-1], len(images.box_classes)
    model = build_dense(encoder.load().to(device), side, STRIDE, kinds + 4, tuned, settings.seed, settings.precision)
    torch.nn.init.constant_(model.head.bias[:kinds], EMPTY)
    steps = fit_head(model, centre_loss, parts["train"], parts["valid"], settings, settings.seed)
    predicted = detections(model, parts["test"], kinds, settings.head_batch)
    if shown is not None:
        some = [i for i, box_n4 in enumerate(parts["test"].boxes) if len(box_n4)][:SAMPLES]
        films, title = parts["test"].take(some), f"{encoder.name}: boxes of {images.name}, {percent(share)} of labels"
        shown.append(boxes(title, films.film_NRR, films.boxes, [predicted[i] for i in some], images.box_classes))
    value = mean_average_precision(predicted, parts["test"], kinds)
    # only boxes: they are copied for each resample
    no_films, no_masks = np.zeros((len(predicted), 0, 0), np.uint8), np.zeros((len(predicted), 0, 0, 0), bool)
    truth = replace(parts["test"], film_NRR=no_films, mask_NKRR=no_masks)
    resampling = Resampling.of(groups, min(settings.resamples, RESAMPLES), settings.seed)
    resampled = []
    for _, weight_rN in resampling.chunks():
        for weight_N in weight_rN:
            drawn = np.repeat(np.arange(len(predicted)), weight_N.astype(int))
            resampled.append(mean_average_precision([predicted[i] for i in drawn], truth.take(drawn.tolist()), kinds))
    setting, number = f"{'tuned' if tuned else 'frozen'}, {percent(share)} of labels", len(predicted)
    return [
        Score(
            "detection",
            images.name,
            setting,
            metric,
            encoder.name,
            value[index],
            number,
            np.array([row[index] for row in resampled]),
            f"{steps} steps",
        )
        for index, metric in enumerate(("mAP", "AP at 0.50"))
    ]


def targets(films: Films, kinds: int, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heat (B, K, h, h), 1 at the centre of each box, a Gaussian with a sixth of its sides; distances in cells from each cell's
    centre to the four sides of its box (B, 4, h, h); and the weight of each cell's distances in the loss (B, h, h)."""
    side = films.film_NRR.shape[-1]
    middle_h = np.arange(cells) + 0.5
    heat = np.zeros((len(films), kinds, cells, cells), np.float32)
    sides, weight = (
        np.zeros((len(films), 4, cells, cells), np.float32),
        np.zeros((len(films), cells, cells), np.float32),
    )
    for b in range(len(films)):
        scaled_n4 = films.boxes[b] * cells / side
        area_n = (scaled_n4[:, 2] - scaled_n4[:, 0]) * (scaled_n4[:, 3] - scaled_n4[:, 1])
        for n in np.argsort(-area_n):  # largest first: in overlapping boxes the smaller one gets the cell
            x0, y0, x1, y1 = scaled_n4[n]
            column, row = (min(int((low + high) / 2), cells - 1) for low, high in ((x0, x1), (y0, y1)))
            spread_x, spread_y = (max((high - low) / 6, 0.4) for low, high in ((x0, x1), (y0, y1)))
            across_h = np.exp(-((middle_h - column - 0.5) ** 2) / (2 * spread_x**2))
            bump_hh = np.exp(-((middle_h - row - 0.5) ** 2) / (2 * spread_y**2))[:, None] * across_h
            kind = films.kinds[b][n]
            heat[b, kind] = np.maximum(heat[b, kind], bump_hh)
            near_hh = bump_hh >= NEAR
            for index, distance in enumerate(
                (middle_h - x0, middle_h[:, None] - y0, x1 - middle_h, y1 - middle_h[:, None])
            ):
                sides[b, index] = np.where(near_hh, np.broadcast_to(distance, near_hh.shape), sides[b, index])
            weight[b] = np.where(near_hh, bump_hh, weight[b])
    return torch.from_numpy(heat), torch.from_numpy(sides).clamp_min(0.05), torch.from_numpy(weight)


def centre_loss(map_Bchh: Tensor, films: Films) -> Tensor:
    """Penalty-reduced focal loss of the heat (Law and Deng 2018) plus 1 - IoU of the boxes around their centres."""
    kinds, cells = map_Bchh.shape[1] - 4, map_Bchh.shape[-1]
    heat_BKhh, sides_B4hh, weight_Bhh = (part.to(map_Bchh.device) for part in targets(films, kinds, cells))
    logit_BKhh = map_Bchh[:, :kinds]
    sure_BKhh = logit_BKhh.sigmoid()
    centre = heat_BKhh == 1
    missed = -((1 - sure_BKhh) ** 2) * F.logsigmoid(logit_BKhh) * centre
    wrong = -((1 - heat_BKhh) ** 4) * sure_BKhh**2 * F.logsigmoid(-logit_BKhh) * ~centre
    focal = (missed.sum() + wrong.sum()) / centre.sum().clamp_min(1)
    overlap_Bhh = shared_area(F.softplus(map_Bchh[:, kinds:]), sides_B4hh)
    return focal + SIDES_WEIGHT * (weight_Bhh * (1 - overlap_Bhh)).sum() / weight_Bhh.sum().clamp_min(1)


def shared_area(first_B4hh: Tensor, second_B4hh: Tensor) -> Tensor:
    """Intersection over union of two boxes around each cell's centre, given by their distances to it (B, h, h)."""
    least_B4hh = torch.minimum(first_B4hh, second_B4hh)
    area = lambda sides: (sides[:, 0] + sides[:, 2]) * (sides[:, 1] + sides[:, 3])
    both = area(least_B4hh)
    return both / (area(first_B4hh) + area(second_B4hh) - both).clamp_min(1e-6)


def detections(model: DenseModel, films: Films, kinds: int, size: int) -> list[Detections]:
    """The model's detections on each film."""
    predicted, side = [], films.film_NRR.shape[-1]
    for _, map_Bchh in predict_head(model, films, size):
        predicted += [_decoded(map_chh, kinds, side) for map_chh in map_Bchh.cpu()]
    return predicted


def _decoded(map_chh: Tensor, kinds: int, side: int) -> Detections:
    """The peaks of the heat, at most ``MAX_DETECTIONS``, each with its box."""
    cells = map_chh.shape[-1]
    sure_Khh = map_chh[:kinds].sigmoid()
    peak_Khh = sure_Khh * (F.max_pool2d(sure_Khh, 3, stride=1, padding=1) == sure_Khh)
    score_n, index_n = peak_Khh.flatten().topk(min(MAX_DETECTIONS, peak_Khh.numel()))
    kind_n, cell_n = index_n // cells**2, index_n % cells**2
    row_n, column_n = cell_n // cells + 0.5, cell_n % cells + 0.5
    left, up, right, down = F.softplus(map_chh[kinds:]).flatten(1)[:, cell_n]
    box_n4 = torch.stack([column_n - left, row_n - up, column_n + right, row_n + down], dim=1) * side / cells
    kept_n = score_n >= MIN_SCORE
    kept = (kind_n[kept_n], score_n[kept_n].double(), box_n4[kept_n].clamp(0, side).double())
    return Detections(*(part.numpy() for part in kept))


def mean_average_precision(predicted: Sequence[Detections], films: Films, kinds: int) -> tuple[float, float]:
    """COCO's mAP over IoU 0.50:0.95 and AP at 0.50, over all films, by faster-coco-eval; NaN without any box."""
    from faster_coco_eval import COCO, COCOeval_faster

    truth: dict[str, Any] = {
        "images": [{"id": i + 1} for i in range(len(films))],
        "categories": [{"id": k + 1, "name": str(k)} for k in range(kinds)],
        "annotations": [],
    }
    for i in range(len(films)):
        for kind, box in zip(films.kinds[i], films.boxes[i], strict=True):
            truth["annotations"].append(
                _coco(i, kind, box) | {"id": len(truth["annotations"]) + 1, "area": _area(box), "iscrowd": 0}
            )
    if not truth["annotations"]:
        return float("nan"), float("nan")
    answers = [
        _coco(i, kind, box) | {"score": float(score)}
        for i, each in enumerate(predicted)
        for kind, score, box in zip(each.kind_n, each.score_n, each.box_n4, strict=True)
    ]
    if not answers:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        gold = COCO(truth)
        measured = COCOeval_faster(gold, gold.loadRes(answers), iouType="bbox")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return float(measured.stats[0]), float(measured.stats[1])


def _coco(image: int, kind: int, box: Floats) -> dict[str, Any]:
    x0, y0, x1, y1 = (float(edge) for edge in box)
    return {"image_id": image + 1, "category_id": int(kind) + 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}


def _area(box: Floats) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
