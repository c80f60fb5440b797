"""From blocks of studies to batches on the training device: crop, augment, normalise, pad."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns.config import Config, DataConfig

if TYPE_CHECKING:
    from cmcgns.data.record import Block  # a model alone does not need Arrow
    from cmcgns.data.views import ViewSettings

# B studies on this rank, R pixels of the stored square, H = W pixels of the crop, C draws, P patches

CROP_STREAM = 1
MASK_STREAM = 2
AUGMENT_STREAM = 3
SENTENCE_STREAM = 4
NOISE_STREAM = 5
"""This and the following streams are noise of sentences."""

# splitmix64 (Steele, Lea and Flood, 2014); int64 arithmetic wraps around, so the constants are written as signed
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def keyed_uniform(key_B: Tensor, count: int, stream: int) -> Tensor:
    """float32 (B, count) in [0, 1): depends only on key, stream and column, bit-equal on every device."""
    state_B1 = _mix(key_B + _mix(torch.full_like(key_B, stream)))[:, None]
    place_C = torch.arange(1, count + 1, dtype=torch.int64, device=key_B.device)
    bits_BC = _mix(state_B1 + place_C * _GAMMA)
    # the upper 24 bits: as many as float32 holds exactly
    return _logical_shift(bits_BC, 40).to(torch.float32) * 2.0**-24


def sentence_keys(key_B: Tensor, sentence_row_n: Tensor, size_S: int) -> Tensor:
    """A 64-bit key for each real sentence, from its study's key and its place in the report alone."""
    study_n, place_n = sentence_row_n.div(size_S, rounding_mode="floor"), sentence_row_n.remainder(size_S)
    return _mix(key_B[study_n] + (place_n + 1) * _GAMMA)


def keyed_gumbel(key_n: Tensor, count: int, stream: int) -> Tensor:
    """float64 (n, count) of the standard Gumbel distribution, from key, stream and column alone."""
    # in float32 the largest values would round to 1, and the noise to infinity
    uniform_nK = keyed_uniform(key_n, count, stream).double() + 2.0**-25
    return -(-uniform_nK.log()).log()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30)) * _MIX_1
    x = (x ^ _logical_shift(x, 27)) * _MIX_2
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: on int64 ``>>`` would repeat the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def crop(image_B1RR: Tensor, size: int, key_B: Tensor | None) -> Tensor:
    """(B, 1, size, size): a random square of each image by its key, or the centre without keys."""
    batch, _, stored, _ = image_B1RR.shape
    if size > stored:
        raise ValueError(f"cannot crop {size} pixels from images of {stored}")
    room = stored - size
    if key_B is None:
        return image_B1RR[:, :, room // 2 : room // 2 + size, room // 2 : room // 2 + size]
    offset_B2 = _crop_offsets(key_B, room)
    place_H = torch.arange(size, device=image_B1RR.device)
    row_BH1 = (offset_B2[:, :1] + place_H)[:, :, None]
    column_B1W = (offset_B2[:, 1:] + place_H)[:, None, :]
    study_B11 = torch.arange(batch, device=image_B1RR.device)[:, None, None]
    return image_B1RR[study_B11, 0, row_BH1, column_B1W][:, None]


def _crop_offsets(key_B: Tensor, room: int) -> Tensor:
    """Row and column of each crop's corner, int64 (B, 2) in [0, room]."""
    return (keyed_uniform(key_B, 2, CROP_STREAM) * (room + 1)).to(torch.int64).clamp_(max=room)


def augmented_crop(image_B1RR: Tensor, data: DataConfig, key_B: Tensor) -> Tensor:
    """The crop of each film by its key, turned, scaled and toned by ``data.augment_*``; grey values from 0 to 255.

    Films are never mirrored: reports name the side of a finding. With all strengths 0 it is ``crop``, bit for bit.
    """
    moved, toned_too = data.augment_rotation or data.augment_scale, data.augment_brightness or data.augment_contrast
    if not (moved or toned_too):
        return crop(image_B1RR, data.image_size, key_B)
    turn_B, zoom_B, gamma_B, contrast_B = (keyed_uniform(key_B, 4, AUGMENT_STREAM) * 2 - 1).unbind(dim=1)
    if moved:
        angle_B = turn_B.double() * math.radians(data.augment_rotation)
        zoom_B = (zoom_B.double() * math.log1p(data.augment_scale)).exp()
        cropped_B1HW = turned_crop(image_B1RR, data.image_size, key_B, angle_B, zoom_B)
    else:
        cropped_B1HW = crop(image_B1RR, data.image_size, key_B)
    if not toned_too:
        return cropped_B1HW
    gamma_B = (gamma_B * math.log1p(data.augment_brightness)).exp()
    return toned(cropped_B1HW, gamma_B, contrast_B * data.augment_contrast)


def turned_crop(image_B1RR: Tensor, size: int, key_B: Tensor, angle_B: Tensor, zoom_B: Tensor) -> Tensor:
    """Each crop turned counter-clockwise by ``angle_B`` radians and enlarged by ``zoom_B`` about its own centre.

    It is sampled once from the stored film, so that corners show what lies beside the crop; outside the film is black.
    """
    stored, middle = image_B1RR.shape[-1], (size - 1) / 2
    # float64: the float32 results are then the same in any batch
    across_B, down_B = angle_B.double().cos() / zoom_B, angle_B.double().sin() / zoom_B
    across_B11, down_B11 = across_B.float()[:, None, None], down_B.float()[:, None, None]
    top_B11, left_B11 = _crop_offsets(key_B, stored - size)[:, :, None, None].unbind(dim=1)
    place_W = torch.arange(size, device=image_B1RR.device) - middle
    place_H1 = place_W[:, None]
    column_BHW = left_B11 + middle + across_B11 * place_W - down_B11 * place_H1
    row_BHW = top_B11 + middle + down_B11 * place_W + across_B11 * place_H1
    grid_BHW2 = (torch.stack([column_BHW, row_BHW], dim=-1) * 2 + 1) / stored - 1
    return F.grid_sample(image_B1RR.float(), grid_BHW2, mode="bilinear", padding_mode="zeros", align_corners=False)


def toned(image_B1HW: Tensor, gamma_B: Tensor, contrast_B: Tensor) -> Tensor:
    """Grey values to the power ``gamma_B``, then with the slope 1 + ``contrast_B`` at mid-grey.

    Black and white stay what they are, so padding stays black and nothing is clipped.
    """
    grey_B1HW = (image_B1HW.float() / 255) ** gamma_B[:, None, None, None]
    curved_B1HW = grey_B1HW * grey_B1HW * (3 - 2 * grey_B1HW)  # slope 1.5 at mid-grey, 0 at both ends
    return torch.lerp(grey_B1HW, curved_B1HW, 2 * contrast_B[:, None, None, None]) * 255


def normalise(image: Tensor) -> Tensor:
    """float32 in [-1, 1] of an image with grey values from 0 to 255."""
    return image.to(torch.float32) / 127.5 - 1.0


def mask_positions(key_B: Tensor, positions: int, ratio: float) -> Tensor:
    """bool (B, positions): True at exactly round(ratio * positions) places of each row."""
    order_BP = keyed_uniform(key_B, positions, MASK_STREAM).argsort(dim=1, stable=True)
    mask_BP = torch.zeros_like(order_BP, dtype=torch.bool)
    return mask_BP.scatter_(1, order_BP[:, : round(ratio * positions)], True)


SLICE_STUDIES, CPU_SLICES, GPU_SLICES = 8, 4, 2
"""A microbatch's reports go through the text encoder in up to four slices of at least eight, by length: a mean report
has half the tokens of the longest. On a GPU in two, since each takes as many kernel launches as a whole pass."""


class ImageReportBatch(NamedTuple):
    """One film and one report per row. A NamedTuple, because ZeRO-3's hooks handle no other class."""

    image_B1HW: Tensor
    """Grey films in [-1, 1] (float), cropped and in training augmented."""
    token_BT: Tensor
    """Token ids, int64, padded."""
    token_mask_BT: Tensor
    """True where a token is real."""
    sentence_of_token_BT: Tensor
    """Which sentence a token belongs to, -1 for [CLS], [SEP] and padding."""
    sentence_mask_BS: Tensor
    """True where a sentence is real."""
    sentence_row_n: Tensor
    """Flat positions b x S + s of the real sentences, so that the device does not have to search for them."""
    sentence_hash_n: Tensor
    """64-bit hash of each real sentence's words; equal hash, same text."""
    report_hash_B: Tensor
    """64-bit hash of each report's words."""
    draw_key_B: Tensor
    """64-bit key of the random draws of a study (crop, augmentation, masks), the same on any rank."""
    rank_sentences: tuple[int, ...]
    """Real sentences of every rank, known on the host."""
    by_length_B: Tensor | None = None
    """The studies from the shortest report to the longest; None if reports are not sliced."""
    slice_tokens: tuple[int, ...] = ()
    """Tokens of the longest report in each slice; ``by_length_B`` is cut into that many equal slices. Known on the host."""
    view_VB1HW: Tensor | None = None
    """Random views of each film, like ``image_B1HW``; None unless the method asks for them."""
    continues_BT: Tensor | None = None
    """True where a token continues the word of the one before; None unless the method asks for it."""
    label_BL: Tensor | None = None
    """1, 0, -1 uncertain, NaN without an entry (float32), of the labels that the method learns from; None if there are none."""

    @property
    def studies(self) -> int:
        """Studies of this rank's microbatch, B."""
        return self.token_BT.shape[0]

    def to(self, device: torch.device | str) -> "ImageReportBatch":
        """The same batch on ``device``; copies from pinned memory do not wait."""
        moved = (part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in self)
        return ImageReportBatch(*moved)  # type: ignore[arg-type]


def with_one_sentence(batch: ImageReportBatch) -> ImageReportBatch:
    """``batch`` with one sentence of each report, drawn by the study's key, as its whole report: [CLS], its tokens, [SEP]."""
    count_B = batch.sentence_mask_BS.sum(1)
    uniform_B = keyed_uniform(batch.draw_key_B, 1, SENTENCE_STREAM)[:, 0]
    drawn_B = torch.minimum((uniform_B * count_B).long(), count_B - 1)
    of_none_BT = batch.token_mask_BT & (batch.sentence_of_token_BT < 0)
    kept_BT = (batch.sentence_of_token_BT == drawn_B.unsqueeze(1)) | of_none_BT
    # kept tokens move to the front in their order: the encoder gives them the positions that a lone sentence has
    order_BT = (~kept_BT).int().argsort(dim=1, stable=True)
    mask_BT = kept_BT.gather(1, order_BT)
    of_sentence_BT = mask_BT & ~of_none_BT.gather(1, order_BT)
    hash_B = batch.sentence_hash_n[count_B.cumsum(0) - count_B + drawn_B]
    return batch._replace(
        token_BT=batch.token_BT.gather(1, order_BT),
        token_mask_BT=mask_BT,
        sentence_of_token_BT=of_sentence_BT.long() - 1,
        sentence_mask_BS=torch.ones_like(count_B, dtype=torch.bool).unsqueeze(1),
        sentence_row_n=torch.arange(len(count_B), device=count_B.device),
        sentence_hash_n=hash_B,
        report_hash_B=hash_B,
        rank_sentences=(batch.studies,) * len(batch.rank_sentences),
        continues_BT=None if batch.continues_BT is None else batch.continues_BT.gather(1, order_BT),
    )


class PaddedReports(NamedTuple):
    """Reports of different lengths, padded to rectangles, with sizes known on the host."""

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
    most_slices: int = CPU_SLICES,
) -> PaddedReports:
    """``tokens`` of B reports as one rectangle, T rounded up to a multiple of 8, and its cut into slices."""
    lengths = np.array([len(ids) for ids in tokens])
    size_T, size_S = _rounded(lengths.max()), int(sentence_counts.max())
    order = np.argsort(lengths, kind="stable")
    # their number depends on B alone: ranks under ZeRO-3 must call the encoder equally often
    slices = np.array_split(lengths[order], min(max(len(tokens) // SLICE_STUDIES, 1), most_slices))
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


class Batcher:
    """Turns blocks into batches on the device: crop, augment in training, normalise, pad, and views if a method has them."""

    def __init__(
        self,
        config: Config,
        pad_id: int,
        device: torch.device,
        views: "tuple[int, ViewSettings] | None" = None,
        continues_V: np.ndarray | None = None,
    ) -> None:
        """``views`` and ``continues_V`` as the method's ``views`` and ``continuations``."""
        self.config, self.pad_id, self.device, self.views = config, pad_id, device, views
        self.continues_V = None if continues_V is None else torch.from_numpy(continues_V)
        self.most_slices = CPU_SLICES if device.type == "cpu" else GPU_SLICES

    def __call__(self, block: "Block", rank_sentences: tuple[int, ...], training: bool) -> ImageReportBatch:
        """The batch of one block; ``rank_sentences``: sentences of each rank's block."""
        data = self.config.data
        texts = block.tokens, block.sentence_of_token, block.sentence_counts
        reports = pad_reports(*texts, self.pad_id, self.most_slices)
        text: dict[str, Any] = {
            name: self._to_device(part) if isinstance(part, torch.Tensor) else part
            for name, part in reports._asdict().items()
        }
        key_B = self._to_device(torch.from_numpy(block.draw_keys.copy()))
        stored_B1RR = self._to_device(torch.from_numpy(block.images_BRR.copy()).unsqueeze(1))
        film_B1HW = augmented_crop(stored_B1RR, data, key_B) if training else crop(stored_B1RR, data.image_size, None)
        view_VB1HW = None
        if self.views is not None:
            from cmcgns.data.views import random_views  # draws as this file does

            view_VB1HW = random_views(stored_B1RR, data.image_size, key_B, *self.views)
        continues_BT = None
        if self.continues_V is not None:
            continues_BT = self._to_device(self.continues_V[reports.token_BT])
        return ImageReportBatch(
            image_B1HW=normalise(film_B1HW),
            **text,
            view_VB1HW=view_VB1HW,
            continues_BT=continues_BT,
            label_BL=None if block.labels_BL is None else self._to_device(torch.from_numpy(block.labels_BL.copy())),
            sentence_hash_n=self._to_device(torch.from_numpy(np.concatenate(list(block.sentence_hashes)))),
            report_hash_B=self._to_device(torch.from_numpy(block.report_hashes.copy())),
            draw_key_B=key_B,
            rank_sentences=rank_sentences,
        )

    def _to_device(self, part: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cpu":
            return part
        return part.pin_memory().to(self.device, non_blocking=True)


class SideStream:
    """A context in which batches are copied and cropped beside what a GPU computes; on a CPU it changes nothing."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # torch.cuda.stream(None) would start CUDA, also on a machine whose GPUs this run does not use
        self._entered = torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def __enter__(self) -> None:
        self._entered.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)

    def taken(self, batch: ImageReportBatch) -> ImageReportBatch:
        """``batch``, made in this context, for use on the current stream; what is launched there from now on waits for it."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for part in batch:
                if isinstance(part, Tensor):
                    # otherwise its memory goes to the next batch while this one is still read
                    part.record_stream(current)
        return batch
