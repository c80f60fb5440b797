"""Settings of CM-CGNS: the section `objective`. Does not import torch, so that `--help` is fast."""

import math
from typing import Any, ClassVar, Literal

from pydantic import Field

from cmcgns.config import Bank, MethodSettings, ModelConfig
from cmcgns.methods.loss_weights import LossWeight

MAX_CLUSTERS, MIN_CLUSTERS, SENTENCES_PER_CLUSTER = 1024, 16, 4


class Settings(MethodSettings):
    stages: ClassVar[int] = 2

    num_clusters: int = Field(128, ge=2)
    """Centroids K of the sentence clustering."""
    mask_ratio: float = Field(0.5, gt=0.0, lt=1.0)
    """Fraction of the patches masked for the reconstruction in stage 2."""
    decoder_channels: int = Field(256, ge=16, multiple_of=8)
    """Width of the decoder that reconstructs films. With 256 it costs more than a small encoder."""
    temperature: float = Field(0.1, ge=0.01, le=1.0)
    """Temperature of the global InfoNCE; the initial value if it is learned."""
    learn_temperature: bool = True
    """Learn the global temperature; a sweep over `temperature` sets it to false."""
    local_negatives: Literal["sentences", "films", "both"] = "sentences"
    """What a sentence's attended features are compared with: those of other sentences (published), those of the same sentence
    on other films, or both."""
    sentence_temperature: float = Field(0.1, gt=0.0)
    """Temperature of the sentence loss, never learned (published: 1.0)."""
    hard_negative_logit: float = 3.0
    """Added to the logit of a sentence's own hard negative."""
    false_negatives: Literal["margin", "exclude", "both"] = "both"
    """Sentences of the same cluster: pulled closer by the margin loss (published), excluded from the denominator, or both."""
    margin_alpha: float = 0.2
    """Margin loss: a false negative's cosine may be at most the positive's minus this."""
    margin_beta: float = 0.5
    """Margin loss: a false negative's cosine must be at least the positive's minus this."""
    margin_weight: float = Field(1e-4, ge=0.0)
    """Weight of the margin loss in the local report loss."""
    film_temperature: float = Field(0.1, gt=0.0)
    """Temperature of the film loss, never learned."""
    film_guidance: Literal["none", "exclude", "soft", "hard"] = "exclude"
    """Films whose report has a sentence of the same cluster: negatives like others, left out, or weighted by the distance of the
    clusters; `hard` leaves them out and adds `hard_negative_logit` to films with a sentence of the second-nearest cluster."""
    parts_temperature: float = Field(0.02, gt=0.0)
    """Temperature of the loss by parts, never learned. Less than `film_temperature`: a mean over sentences varies less."""
    reconstruct: Literal["masked", "all"] = "masked"
    """Pixels in the reconstruction loss: those of masked patches, or all (published)."""
    balance: Literal["fixed", "uncertainty"] = "fixed"
    """`uncertainty`: each loss counts by its logarithm, so that its gradient is divided by the loss itself. This is what learned
    uncertainty weights (Kendall et al. 2018) come to when they fit the losses of each step. Weights stay factors: set
    `reconstruction_weight` to about 1 with it."""
    reconstruction_weight: LossWeight = 10.0
    """Weight of the L1 reconstruction error."""
    global_weight: LossWeight = 1.0
    """Weight of the global image-report loss. This and the other weights of losses may be a ramp instead of a number:
    `{begin: 0.0, end: 0.3, first_step: 100, last_step: 400}`."""
    local_image_weight: LossWeight = 1.0
    """Weight of the patch alignment loss."""
    local_report_weight: LossWeight = 1.0
    """Weight of the sentence loss (`local_negatives` sentences or both)."""
    local_film_weight: LossWeight = 0.3
    """Weight of the film loss (`local_negatives` films or both)."""

    parts_weight: LossWeight = 0.0
    """Weight of InfoNCE between films and reports by parts: the score of a report on a film is the mean over its sentences of how
    well each finds itself there (ours)."""

    @property
    def compares_films(self) -> bool:
        """True if sentences are compared with the films of other studies."""
        return self.local_negatives != "sentences" or self.parts_weight != 0.0

    def banks(self, model: ModelConfig) -> tuple[Bank, ...]:
        """Attended features of the sentences (z2)."""
        return (Bank("sentences", self.num_clusters, model.embed_dim, "objective.num_clusters", "mean_cosine"),)

    def sweep_space(self, sentences: int) -> dict[str, Any]:
        """Mask ratio, number of clusters (powers of two with at least 4 sentences per cluster) and the temperatures in use."""
        most = max(min(MAX_CLUSTERS, sentences // SENTENCES_PER_CLUSTER), MIN_CLUSTERS)
        powers = [2**power for power in range(int(math.log2(MIN_CLUSTERS)), int(math.log2(most)) + 1)]
        used = {"sentences": ["sentence"], "films": ["film"], "both": ["sentence", "film"]}[self.local_negatives]
        return {
            "objective.mask_ratio": {"uniform": [0.25, 0.85]},
            "objective.num_clusters": {"choice": powers},
            "objective.temperature": {"log_uniform": [0.02, 0.5]},
            **{f"objective.{name}_temperature": {"log_uniform": [0.02, 0.5]} for name in used},
        }
