"""ConVIRT: InfoNCE of films and texts with a fixed temperature, weighted towards films (Zhang et al. 2022, arXiv 2010.00747).

The authors released no code. Weight, temperature, heads, drawn sentences and frozen layers are those on which two public
re-implementations agree; the maximum over tokens is recalled from the paper. Settings: recipes published-convirt and
published-convirt-mgca, a baseline of the same name.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.base import Losses, column, in_full_precision
from cmcgns.methods.contrastive import directed_losses
from cmcgns.methods.pairs import PairMethod, PairSettings


class Settings(PairSettings):
    film_weight: float = Field(0.75, ge=0.0, le=1.0)
    """Share of the direction in which each film has to find its text; the other direction has the rest."""
    same_text: Literal["left_out", "negatives"] = "left_out"
    """Two studies whose texts are the same: neither positives nor negatives of each other, or negatives like all others
    (published)."""
    temperature: float = Field(0.1, ge=0.01, le=1.0)
    """Temperature of the loss."""
    learn_temperature: bool = False
    """Learn the temperature (published: no)."""


class ConVIRT(PairMethod[Settings]):
    """Each film has to find its text, and each text its film."""

    def terms(self, stage: int) -> tuple[str, ...]:
        return ("loss", "loss_films", "loss_reports")

    def losses(
        self, outputs: Any, batch: ImageReportBatch, centroids: Mapping[str, Tensor | None], stage: int, step: int
    ) -> Losses:
        own, wide = self.settings, in_full_precision(outputs)
        hash_B = wide.text_hash_B if own.same_text == "left_out" else None
        films, reports = directed_losses(wide.image_BD, wide.report_BD, hash_B, wide.scale, self.wire_dtype)
        weighted = {"loss_films": own.film_weight * films, "loss_reports": (1 - own.film_weight) * reports}
        total = weighted["loss_films"] + weighted["loss_reports"]
        return Losses(total, column(total, films, reports), column(1 / wide.scale[0]), weighted=weighted)


METHOD = ConVIRT
