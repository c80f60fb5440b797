"""A method in one file: pairwise sigmoid loss between films and reports (SigLIP, Zhai et al. 2023)."""

import torch
from torch.nn import functional as F

from cmcgns.distributed import all_gather_with_grad, rank
from cmcgns.methods.base import Losses, Method, column, in_full_precision
from cmcgns.methods.infonce import InfoNCEModel, Settings
from cmcgns.models.dual_encoder import build_encoders


class SigLIP(Method[Settings]):
    def build_model(self, vocabulary_size):
        encoders, own = build_encoders(self.config, vocabulary_size), self.settings
        return InfoNCEModel(*encoders, self.config.model.embed_dim, own.temperature, own.learn_temperature)

    def terms(self, stage):
        return ("loss",)

    def losses(self, outputs, batch, centroids, stage, step):
        wide = in_full_precision(outputs)
        logits_BG = wide.scale * (wide.image_BD @ all_gather_with_grad(wide.report_BD).T - 0.5)
        label_BG = -torch.ones_like(logits_BG)
        label_BG.narrow(1, rank() * len(logits_BG), len(logits_BG)).fill_diagonal_(1.0)
        loss = -F.logsigmoid(label_BG * logits_BG).sum(1).mean()
        return Losses(loss, column(loss), column(1 / wide.scale[0]))


METHOD = SigLIP
