"""Collects what late interaction compares over the batches of a split: ``Parts`` of its first studies."""

import torch
from torch import Tensor

from cmcgns.methods.base import Parts


class CollectedParts:
    """``Parts`` of the first ``most`` studies, to the end of a batch: the patches of all would take too much memory."""

    def __init__(self, most: int) -> None:
        self.most, self.studies = most, 0
        self._kept: list[Parts] = []

    @property
    def is_full(self) -> bool:
        return self.studies >= self.most

    def add(self, parts: Parts, real: int) -> None:
        """Append the parts of the first ``real`` studies of a batch; the others are padding."""
        size = int((parts.study_n < real).sum())
        sentences = tuple(rows[:size] for rows in parts.sentences)
        films = tuple(rows[:real] for rows in parts.films)
        self._kept.append(Parts(sentences, films, parts.study_n[:size] + self.studies))
        self.studies += real

    def joined(self) -> Parts:
        """The parts of all studies, with their index in the split. At least one batch must have been added."""
        sentences, films, study_n = zip(*self._kept, strict=True)
        return Parts(_joined(sentences), _joined(films), torch.cat(study_n))


def _joined(pieces: tuple[tuple[Tensor, ...], ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(rows) for rows in zip(*pieces, strict=True))
