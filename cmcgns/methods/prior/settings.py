"""Settings of PRIOR: the keys of section `objective`."""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from cmcgns.config import MethodSettings
from cmcgns.methods.loss_weights import LossWeight


class Settings(MethodSettings):
    stages: ClassVar[int] = 3

    temperature: float = Field(0.01, ge=0.01, le=1.0)
    """Initial temperature of InfoNCE between films and reports; learned."""
    local_temperature: float = Field(0.01, ge=0.01, le=1.0)
    """Initial temperature of the loss of sentences inside a report; learned."""
    num_prototypes: int = Field(512, ge=2)
    """Prototypes K of sentences."""
    prototype_temperature: float = Field(0.9, gt=0.0)
    """Temperature of the choice among prototypes (published: fixed)."""
    generated_sentences: PositiveInt = 16
    """Rows Q that are generated from a film; stage 3 reads the first Q sentences of a report."""
    decoder_layers: PositiveInt = 8
    """Layers of the sentence decoder."""
    decoder_heads: PositiveInt = 8
    """Attention heads of the sentence decoder (published: 12); they divide `model.embed_dim`."""
    decoder_channels: PositiveInt = 256
    """Width of the decoder that rebuilds films."""
    mask_ratio: float = Field(0.5, gt=0.0, lt=1.0)
    """Share of a film's patches that is hidden before the film is rebuilt (stage 3)."""
    reconstruct: Literal["masked", "all"] = "masked"
    """Pixels that count: those of hidden patches, or all (published)."""
    same_text: Literal["left_out", "negatives"] = "left_out"
    """Reports of the same text, and sentences of one report with the same text: neither positives nor negatives of each other, or
    negatives like all others (published)."""

    global_weight: LossWeight = 1.0
    """Weight of InfoNCE between films and reports in stages 1 and 2; a number or a ramp, like all weights here."""
    stage3_global_weight: LossWeight = 10.0
    """The same in stage 3."""
    local_image_weight: LossWeight = 1.0
    """Weight of the loss of patches."""
    local_report_weight: LossWeight = 1.0
    """Weight of the loss of sentences."""
    prototype_weight: LossWeight = 10.0
    """Weight of the distance between sentences and what they pick (stages 2 and 3)."""
    reconstruction_weight: LossWeight = 1.0
    """Weight of the rebuilt film (stage 3)."""
    generation_weight: LossWeight = 10.0
    """Weight of the distance between generated rows and the report's prototypes (stage 3)."""
    consistency_weight: LossWeight = 1.0
    """Weight of the divergence between what sentences and generated rows pick (stage 3)."""
    prediction_weight: LossWeight = 1.0
    """Weight of InfoNCE between reports and those made of generated rows (stage 3)."""

    def complaints(self) -> Iterable[str]:
        if self.num_prototypes < self.generated_sentences:
            yield (
                f"objective.num_prototypes {self.num_prototypes} is less than objective.generated_sentences "
                f"{self.generated_sentences}; give at least as many"
            )

    def sweep_space(self, sentences: int) -> dict[str, Any]:
        """Both temperatures and the number of prototypes."""
        return {
            "objective.temperature": {"log_uniform": [0.01, 0.5]},
            "objective.local_temperature": {"log_uniform": [0.01, 0.5]},
            "objective.num_prototypes": {"choice": [64, 128, 256, 512]},
        }
