"""The contract between data and model: one microbatch of studies on one rank.

B studies, T tokens, S sentences (padded), P patches, n valid sentences of this rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SLICE_STUDIES, MOST_SLICES = 8, 4
"""A microbatch's reports go through the text encoder in up to four slices of at least eight, by length: a mean report
has half the tokens of the longest."""


class ImageReportBatch(NamedTuple):
    """One film and one report a row. A NamedTuple, because ZeRO-3's hooks walk into nothing fancier."""

    image_B1HW: Tensor
    """Grey films in [-1, 1] (float), cropped."""
    token_BT: Tensor
    """Token ids, int64, padded."""
    token_mask_BT: Tensor
    """True where a token is real."""
    sentence_of_token_BT: Tensor
    """Which sentence a token belongs to, -1 for [CLS], [SEP] and padding."""
    sentence_mask_BS: Tensor
    """True where a sentence is real."""
    sentence_row_n: Tensor
    """Flat positions b x S + s of the real sentences, so that no device has to search for them."""
    sentence_hash_n: Tensor
    """64-bit hash of each real sentence's words; equal hash, same text."""
    report_hash_B: Tensor
    """64-bit hash of each report's words."""
    masked_BP: Tensor
    """True where a patch is hidden from the reconstruction."""
    rank_sentences: tuple[int, ...]
    """Real sentences of every rank, known on the host."""
    by_length_B: Tensor | None = None
    """The studies from the shortest report to the longest; None where reports are not sliced."""
    slice_tokens: tuple[int, ...] = ()
    """Tokens of the longest report in each of as many equal slices of ``by_length_B``, known on the host."""

    @property
    def studies(self) -> int:
        """Studies of this rank's microbatch, B."""
        return self.token_BT.shape[0]

    def to(self, device: torch.device | str) -> "ImageReportBatch":
        """The same batch on ``device``; copies from pinned memory do not wait."""
        moved = (part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in self)
        return ImageReportBatch(*moved)  # type: ignore[arg-type]


class PaddedReports(NamedTuple):
    """Reports of different lengths as rectangles, with what the host knows about them."""

    token_BT: Tensor
    token_mask_BT: Tensor
    sentence_of_token_BT: Tensor
    sentence_mask_BS: Tensor
    sentence_row_n: Tensor
    by_length_B: Tensor
    slice_tokens: tuple[int, ...]


def pad_reports(
    tokens: Sequence[np.ndarray],
    sentence_of_token: Sequence[np.ndarray],
    sentence_counts: np.ndarray,
    pad_id: int,
) -> PaddedReports:
    """``tokens`` of B reports as one rectangle, T rounded up to a multiple of 8, and how to cut it into slices."""
    lengths = np.array([len(ids) for ids in tokens])
    size_T, size_S = _rounded(lengths.max()), int(sentence_counts.max())
    order = np.argsort(lengths, kind="stable")
    # their number depends on B alone: ranks under ZeRO-3 must call the encoder equally often
    slices = np.array_split(lengths[order], min(max(len(tokens) // SLICE_STUDIES, 1), MOST_SLICES))
    token_mask_BT = np.arange(size_T) < lengths[:, None]
    token_BT = np.full(token_mask_BT.shape, pad_id, dtype=np.int64)
    sentence_BT = np.full(token_mask_BT.shape, -1, dtype=np.int64)
    token_BT[token_mask_BT] = np.concatenate(list(tokens))
    sentence_BT[token_mask_BT] = np.concatenate(list(sentence_of_token))
    sentence_mask_BS = np.arange(size_S) < sentence_counts[:, None]
    return PaddedReports(
        torch.from_numpy(token_BT),
        torch.from_numpy(token_mask_BT),
        torch.from_numpy(sentence_BT),
        torch.from_numpy(sentence_mask_BS),
        torch.from_numpy(np.flatnonzero(sentence_mask_BS)),
        torch.from_numpy(order),
        tuple(_rounded(part[-1]) for part in slices),
    )


def _rounded(tokens: int) -> int:
    return -(-int(tokens) // 8) * 8
