"""Draws on the device: each study's crop and mask come from its own key, whatever batch or rank it is in."""

# B studies on this rank, R pixels of the stored square, H = W pixels of the crop, C draws, P patches

import torch
from torch import Tensor

CROP_STREAM = 1
MASK_STREAM = 2

# splitmix64 (Steele, Lea and Flood, 2014); int64 arithmetic wraps around, so the constants are written as signed
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def keyed_uniform(key_B: Tensor, count: int, stream: int) -> Tensor:
    """float32 (B, count) in [0, 1): a function of key, stream and place alone, bit-equal on every device."""
    state_B1 = _mix(key_B + _mix(torch.full_like(key_B, stream)))[:, None]
    place_C = torch.arange(1, count + 1, dtype=torch.int64, device=key_B.device)
    bits_BC = _mix(state_B1 + place_C * _GAMMA)
    # the upper 24 bits: as many as float32 holds exactly
    return _logical_shift(bits_BC, 40).to(torch.float32) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30)) * _MIX_1
    x = (x ^ _logical_shift(x, 27)) * _MIX_2
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    """``x`` shifted right with zeros coming in: on int64 ``>>`` would repeat the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def crop(image_B1RR: Tensor, size: int, key_B: Tensor | None) -> Tensor:
    """(B, 1, size, size): a square of each image, placed by its key, or in the middle without keys."""
    batch, _, stored, _ = image_B1RR.shape
    if size > stored:
        raise ValueError(f"cannot crop {size} pixels from images of {stored}")
    room = stored - size
    if key_B is None:
        return image_B1RR[:, :, room // 2 : room // 2 + size, room // 2 : room // 2 + size]
    offset_B2 = (keyed_uniform(key_B, 2, CROP_STREAM) * (room + 1)).to(torch.int64).clamp_(max=room)
    place_H = torch.arange(size, device=image_B1RR.device)
    row_BH1 = (offset_B2[:, :1] + place_H)[:, :, None]
    column_B1W = (offset_B2[:, 1:] + place_H)[:, None, :]
    study_B11 = torch.arange(batch, device=image_B1RR.device)[:, None, None]
    return image_B1RR[study_B11, 0, row_BH1, column_B1W][:, None]


def normalise(image: Tensor) -> Tensor:
    """float32 in [-1, 1] of a uint8 image."""
    return image.to(torch.float32) / 127.5 - 1.0


def mask_positions(key_B: Tensor, positions: int, ratio: float) -> Tensor:
    """bool (B, positions): True at exactly round(ratio * positions) places of each row."""
    order_BP = keyed_uniform(key_B, positions, MASK_STREAM).argsort(dim=1, stable=True)
    mask_BP = torch.zeros_like(order_BP, dtype=torch.bool)
    return mask_BP.scatter_(1, order_BP[:, : round(ratio * positions)], True)
