"""An evaluation task in one file: how much nearer a film is to its own report than to the others."""

import numpy as np

from cmcgns.config import Section
from cmcgns.evaluate.base import Task
from cmcgns.evaluate.scores import Resampling, Score


class Settings(Section):
    scale: float = 1.0
    """Factor of the gap."""


class Alignment(Task):
    Settings = Settings
    reads = "pairs"

    def scores(self, inputs):
        pairs, own = inputs.pairs, inputs.settings
        similarity_NN = pairs.image_ND @ pairs.report_ND.T
        gap_N = inputs.options.scale * (np.diag(similarity_NN) - similarity_NN.mean(1)).astype(np.float64)
        resampled = Resampling.of(list(pairs.group_N), own.resamples, own.seed).mean(gap_N)
        return [
            Score(
                inputs.name,
                inputs.set_name,
                "test films",
                "gap",
                inputs.encoder.name,
                float(gap_N.mean()),
                len(gap_N),
                resampled,
            )
        ]


TASK = Alignment()
