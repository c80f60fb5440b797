"""A method in one file: each film has to be closer to its report than to the closest other one (VSE++, Faghri et al. 2018)."""

import torch
from pydantic import Field

from cmcgns.config import MethodSettings
from cmcgns.distributed import all_gather_with_grad, rank
from cmcgns.methods.base import Losses, Method, column, in_full_precision
from cmcgns.methods.infonce import InfoNCEModel
from cmcgns.models.dual_encoder import build_encoders


class Settings(MethodSettings):
    margin: float = Field(0.2, gt=0.0)
    """By how much the cosine with the own report has to be larger."""


class HardestNegative(Method[Settings]):
    statistics = ("too_close",)

    def build_model(self, vocabulary_size):
        encoders = build_encoders(self.config, vocabulary_size)
        return InfoNCEModel(*encoders, self.config.model.embed_dim, temperature=0.1, learn_temperature=False)

    def terms(self, stage):
        return ("loss",)

    def losses(self, outputs, batch, centroids, stage, step):
        wide = in_full_precision(outputs)
        cosine_BG = wide.image_BD @ all_gather_with_grad(wide.report_BD, self.wire_dtype).T
        own_BG = torch.zeros_like(cosine_BG, dtype=torch.bool)
        own_BG.narrow(1, rank() * len(own_BG), len(own_BG)).fill_diagonal_(True)
        own_B, hardest_B = (wide.image_BD * wide.report_BD).sum(1), cosine_BG.masked_fill(own_BG, -1.0).amax(1)
        missing_B = (self.settings.margin + hardest_B - own_B).relu()
        return Losses(missing_B.mean(), column(missing_B.mean()), column((missing_B > 0).float().mean()))


METHOD = HardestNegative
