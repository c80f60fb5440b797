"""Classification by an encoder that is trained together with a linear head, at shares of the labels.

B films, K classes, C channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cmcgns.data.augment import normalise
from cmcgns.evaluate.classification import accuracy_scores, auc_scores
from cmcgns.evaluate.encoders import EncoderSpec, FilmEncoder
from cmcgns.evaluate.films import Films
from cmcgns.evaluate.heads import fit_head, predict_head
from cmcgns.evaluate.job_config import EvaluateConfig
from cmcgns.evaluate.scores import Resampling, Score, percent
from cmcgns.evaluate.sets.base import ImageSet


@dataclass
class Classifier:
    """An encoder that is tuned, and a linear head on its global feature."""

    encoder: FilmEncoder
    head: nn.Linear
    tuned: bool = True

    def train(self, mode: bool) -> None:
        """Into training or evaluation mode."""
        self.encoder.train(mode)

    def __call__(self, film_BRR: Tensor) -> Tensor:
        return self.head(self.encoder(normalise(film_BRR.unsqueeze(1)))[0])


def finetune_scores(
    encoder: EncoderSpec, images: ImageSet, parts: dict[str, Films], groups: list[str], share: float,
    settings: EvaluateConfig,
) -> list[Score]:  # fmt: skip
    """The same numbers as those of linear probes, of an encoder trained on one draw of ``share`` of the labels."""
    labels = dict(zip(images.table["image_id"].to_pylist(), images.table["labels"].to_pylist(), strict=True))

    def labels_of(films: Films) -> NDArray[np.float64]:
        return np.array([labels[name] for name in films.image_ids], np.float64).reshape(len(films), len(images.classes))

    def loss(logit_BK: Tensor, films: Films) -> Tensor:
        label_BK = torch.from_numpy(labels_of(films)).float()
        if images.exclusive:
            return F.cross_entropy(logit_BK, label_BK.argmax(1))
        known_BK = label_BK.isfinite()
        error_BK = F.binary_cross_entropy_with_logits(logit_BK, label_BK.nan_to_num(), reduction="none")
        return (error_BK * known_BK).sum() / known_BK.sum().clamp_min(1)

    loaded = encoder.load()
    torch.manual_seed(settings.seed)
    model = Classifier(loaded, nn.Linear(loaded.dim, len(images.classes)))
    steps = fit_head(model, loss, parts["train"], parts["valid"], settings, settings.seed)
    found = [logit_BK.numpy() for _, logit_BK in predict_head(model, parts["test"], settings.head_batch)]
    score_NK = np.concatenate(found).astype(np.float64)
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
