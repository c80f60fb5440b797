"""Classification: linear probes on frozen features with scikit-learn, and fine-tuned encoders.

N images, C channels, K classes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from cmcgns.data.batch import normalise
from cmcgns.data.labelled.base import ImageSet
from cmcgns.errors import UserError
from cmcgns.evaluate.base import Inputs, Task
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.encoders import EncoderSpec
from cmcgns.evaluate.features import Features
from cmcgns.evaluate.figures import Figure, curves
from cmcgns.evaluate.films import Films
from cmcgns.evaluate.heads import fit_head, predict_head
from cmcgns.evaluate.scores import OF_A_CLASS, Resampling, Score, over_draws, percent, weighted_auc
from cmcgns.library.film_encoder import FilmEncoder
from cmcgns.models.device import CPU

Floats = NDArray[np.float64]
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Inverse L2 penalties on standardised features; the best one on the validation split is used."""
ITERATIONS, TOLERANCE = 300, 1e-3


def linear_probe(
    train_NC: Floats, label_NK: Floats, valid_NC: Floats, valid_label_NK: Floats, test_NC: Floats, exclusive: bool,
    device: torch.device = CPU,
) -> Floats:  # fmt: skip
    """Scores (N, K) of the test images from one logistic regression per class, or one over all classes if they are ``exclusive``.
    Ignores NaN labels. A class with only positives or only negatives in training has score 0 everywhere."""
    mean_C, spread_C = train_NC.mean(0), train_NC.std(0) + 1e-6
    train, valid, test = (((rows - mean_C) / spread_C).astype(np.float32) for rows in (train_NC, valid_NC, test_NC))
    # each task has one CPU; off it scikit-learn computes with torch
    with threadpool_limits(limits=1), sklearn.config_context(array_api_dispatch=device != CPU):
        if exclusive:
            return _exclusive(train, label_NK, valid, valid_label_NK, test, device)
        labels = zip(label_NK.T, valid_label_NK.T, strict=True)
        columns = [_binary(train, label_N, valid, valid_N, test, device) for label_N, valid_N in labels]
    return np.stack(columns, axis=1)


def _placed(values: NDArray[Any], device: torch.device) -> Any:
    """The array as scikit-learn takes it: on the CPU as it is, elsewhere as a tensor."""
    return values if device == CPU else torch.from_numpy(values).to(device)


def _on_host(values: Any) -> NDArray[Any]:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _binary(
    train: Floats, label_N: Floats, valid: Floats, valid_label_N: Floats, test: Floats, device: torch.device
) -> Floats:
    known, known_valid = np.isfinite(label_N), np.isfinite(valid_label_N)
    target = label_N[known] > 0.5
    if target.all() or not target.any():
        return np.zeros(len(test))
    valid_target = valid_label_N[known_valid] > 0.5
    one_sided = valid_target.all() or not valid_target.any()
    best, best_auc = None, -1.0
    for model in _path(_placed(train[known], device), _placed(target, device)):
        scores = valid[known_valid] @ model[0] + model[1]
        auc = 0.0 if one_sided else float(weighted_auc(scores, valid_target, np.ones((1, len(scores))))[0])
        if auc > best_auc:
            best, best_auc = model, auc
    assert best is not None
    return np.asarray(test @ best[0] + best[1], np.float64)


def _path(train: Any, target: Any) -> list[tuple[Floats, float]]:
    """Weights and bias for each of ``STRENGTHS``, each initialised with the previous one."""
    model = LogisticRegression(max_iter=ITERATIONS, tol=TOLERANCE, warm_start=True)
    models = []
    for strength in STRENGTHS:
        model.set_params(C=strength).fit(train, target)
        models.append((_on_host(model.coef_[0]).copy(), float(model.intercept_[0])))
    return models


def _exclusive(
    train: Floats, label_NK: Floats, valid: Floats, valid_label_NK: Floats, test: Floats, device: torch.device
) -> Floats:
    """Log-probabilities of a multinomial regression; -1e9 for classes without training images."""
    target, valid_target = label_NK.argmax(1), valid_label_NK.argmax(1)
    scores = np.full((len(test), label_NK.shape[1]), -1e9)
    if len(np.unique(target)) == 1:
        scores[:, target[0]] = 0.0
        return scores
    model = LogisticRegression(max_iter=ITERATIONS, tol=TOLERANCE, warm_start=True)
    placed_train, placed_target, placed_valid, placed_test = (
        _placed(each, device) for each in (train, target, valid, test)
    )
    best, best_accuracy = None, -1.0
    for strength in STRENGTHS:
        model.set_params(C=strength).fit(placed_train, placed_target)
        accuracy = float((_on_host(model.predict(placed_valid)) == valid_target).mean())
        if accuracy > best_accuracy:
            best, best_accuracy = _on_host(model.predict_log_proba(placed_test)), accuracy
    assert best is not None
    scores[:, _on_host(model.classes_)] = best
    return scores


DRAWS = 1000
"""Maximum number of label draws per seed; draw seeds of different seeds do not overlap."""
AUC, ACCURACY = "AUC", "accuracy"


def labels_of(rows: pa.Table) -> Floats:
    """(N, K): 1, 0, NaN where unknown."""
    return np.array(rows["labels"].to_pylist(), np.float64)


def drawn_groups(groups: Sequence[str], share: float, seed: int) -> NDArray[np.bool_]:
    """Mask of the images in a random ``share`` of the groups; with the same seed a smaller share is a subset of a larger one."""
    names = sorted(set(groups), key=lambda name: hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8).digest())
    taken = set(names[: max(round(share * len(names)), 1)])
    return np.array([group in taken for group in groups])


def probe_scores(
    features: Features, images: ImageSet, encoder: str, settings: EvaluateConfig, shown: list[Figure] | None = None,
    device: torch.device = CPU,
) -> list[Score]:  # fmt: skip
    """AUC of each class and their mean, or accuracy if classes are exclusive, for each fraction of the labels.

    Appends the curves of the last fraction to ``shown``.
    """
    parts = {}
    for split in ("train", "valid", "test"):
        rows = images.split(split)
        indices, kept_features = features.of(rows["image_id"].to_pylist())
        kept = rows.take(indices)
        parts[split] = kept, labels_of(kept), kept_features.pooled_NC.astype(np.float64)
    for split, (rows, *_) in parts.items():
        if not len(rows):
            raise UserError(f"{images.name}: the {split} split has no usable image")
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
                linear_probe(train_NC[taken], train_NK[taken], valid_NC, valid_NK, test_NC, images.exclusive, device)
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


MetricRow = tuple[str, float, Floats | None, str]


def auc_scores(
    score_SNK: Sequence[Floats], images: ImageSet, label_NK: Floats, resampling: Resampling
) -> list[MetricRow]:
    """The mean over classes, then each class. A class without positives or without negatives in the test images is excluded
    and named in the note."""
    rows: list[MetricRow] = []
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
    """Area under the ROC curve by torchmetrics, over images with a known label."""
    import torch
    from torchmetrics.functional.classification import binary_auroc

    known = np.isfinite(label_N)
    # ranks: torchmetrics treats scores outside [0, 1] as logits, and its sigmoid maps large ones to the same value
    rank_n = np.unique(score_N[known], return_inverse=True)[1] / max(known.sum(), 1)
    return float(binary_auroc(torch.from_numpy(rank_n), torch.from_numpy(label_N[known] > 0.5).long()))


def accuracy_scores(
    score_SNK: Sequence[Floats], images: ImageSet, label_NK: Floats, resampling: Resampling
) -> list[MetricRow]:
    """Fraction of the test images with the correct class."""
    hit_SN = [(scores_NK.argmax(1) == label_NK.argmax(1)).astype(np.float64) for scores_NK in score_SNK]
    value, resampled = over_draws(
        [hit_N.mean() for hit_N in hit_SN], [resampling.mean(hit_N) for hit_N in hit_SN], resampling.seed
    )
    return [(ACCURACY, value, resampled, "")]


@dataclass
class Classifier:
    """A tuned encoder with a linear head on its global feature."""

    encoder: FilmEncoder
    head: nn.Linear
    tuned: bool = True
    precision: str = "fp32"

    def train(self, mode: bool) -> None:
        """Set training or evaluation mode."""
        self.encoder.train(mode)

    def __call__(self, film_BRR: Tensor) -> Tensor:
        return self.head(self.encoder(normalise(film_BRR.unsqueeze(1)))[0])


def finetune_scores(
    encoder: EncoderSpec, images: ImageSet, parts: dict[str, Films], groups: list[str], share: float,
    settings: EvaluateConfig, device: torch.device = CPU,
) -> list[Score]:  # fmt: skip
    """The same scores as for linear probes, for an encoder fine-tuned on one draw of ``share`` of the labels."""
    labels = dict(zip(images.table["image_id"].to_pylist(), images.table["labels"].to_pylist(), strict=True))

    def labels_of(films: Films) -> NDArray[np.float64]:
        return np.array([labels[name] for name in films.image_ids], np.float64).reshape(len(films), len(images.classes))

    def loss(logit_BK: Tensor, films: Films) -> Tensor:
        label_BK = torch.from_numpy(labels_of(films)).float().to(logit_BK.device)
        if images.exclusive:
            return F.cross_entropy(logit_BK, label_BK.argmax(1))
        known_BK = label_BK.isfinite()
        error_BK = F.binary_cross_entropy_with_logits(logit_BK, label_BK.nan_to_num(), reduction="none")
        return (error_BK * known_BK).sum() / known_BK.sum().clamp_min(1)

    loaded = encoder.load().to(device)
    torch.manual_seed(settings.seed)
    head = nn.Linear(loaded.dim, len(images.classes)).to(device)
    model = Classifier(loaded, head, precision=settings.precision)
    steps = fit_head(model, loss, parts["train"], parts["valid"], settings, settings.seed)
    logits = [logit_BK.cpu().numpy() for _, logit_BK in predict_head(model, parts["test"], settings.head_batch)]
    score_NK = np.concatenate(logits).astype(np.float64)
    resampling = Resampling.of(groups, settings.resamples, settings.seed)
    measured = accuracy_scores if images.exclusive else auc_scores
    return [
        Score(
            "classification",
            images.name,
            f"tuned, {percent(share)} of labels",
            metric,
            encoder.name,
            value,
            len(score_NK),
            resampled,
            "; ".join(part for part in (f"{steps} steps", note) if part),
        )
        for metric, value, resampled, note in measured([score_NK], images, labels_of(parts["test"]), resampling)
    ]


class Classification(Task):
    """Linear probes on frozen features; tuned encoders run with the film heads."""

    reads = "features"
    uses_gpu = True

    def scores(self, inputs: Inputs) -> list[Score]:
        assert inputs.features is not None
        assert inputs.images is not None
        encoder, own = inputs.encoder.name, inputs.settings
        return probe_scores(inputs.features, inputs.images, encoder, own, inputs.shown, inputs.device)


TASK = Classification()
