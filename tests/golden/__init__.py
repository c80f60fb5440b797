"""Numbers of published methods: inputs, weights and outputs of their pieces, float64, run once on a CPU."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

EXACT = {"rtol": 0.0, "atol": 1e-9}
"""Float64 sums in another order differ by about 1e-14 here; a wrong term by far more than 1e-9."""


def golden(name: str = "cmcgns_published") -> dict[str, Tensor]:
    """Every number of one method by its key (see the README beside the file these came from)."""
    with np.load(Path(__file__).parent / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def padded_sentences(numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The 14 concatenated sentences as (4, 5, 32), rubbish where padded, and their mask."""
    counts_B = numbers["in.sentence_counts"]
    mask_BS = torch.arange(int(counts_B.max())) < counts_B.unsqueeze(1)
    sentences_BSD = torch.full((*mask_BS.shape, 32), 7.0, dtype=torch.float64)
    sentences_BSD[mask_BS] = numbers["in.sentences"]
    return sentences_BSD, mask_BS
