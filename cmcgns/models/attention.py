"""Attention between the two modalities, and attention pooling.

B studies, P patches, S sentences (padded), L parts (patches or sentences), D embedding, H heads.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def unit(rows: Tensor) -> Tensor:
    """Rows normalised to length 1, computed in at least float32 and returned in the input's dtype."""
    wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    return F.normalize(wide, dim=-1).to(rows.dtype)


def linear(dim_in: int, dim_out: int) -> nn.Linear:
    """A linear layer whose initial weights preserve the scale of the input, with zero bias.

    torch's default initialisation gives biases several times larger than the signal of unit rows: all studies would start
    with almost the same embedding.
    """
    layer = nn.Linear(dim_in, dim_out)
    nn.init.normal_(layer.weight, std=dim_in**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


def projection(kind: Literal["linear", "mlp"], dim_in: int, dim_out: int) -> nn.Module:
    """A projection to the shared space: one linear layer, or two with a ReLU between them."""
    if kind == "linear":
        return linear(dim_in, dim_out)
    return nn.Sequential(linear(dim_in, dim_in), nn.ReLU(), linear(dim_in, dim_out))


def sigmoid_attention(query_BLD: Tensor, key_BMD: Tensor, value_BMD: Tensor, mask_BM: Tensor | None = None) -> Tensor:
    """sigmoid(q k^T / sqrt(D)) v; masked keys are ignored."""
    weight_BLM = attention_weights(query_BLD, key_BMD)
    if mask_BM is not None:
        weight_BLM = weight_BLM * mask_BM.unsqueeze(1)
    return weight_BLM @ value_BMD


def attention_weights(query_BLD: Tensor, key_BMD: Tensor) -> Tensor:
    """sigmoid(q k^T / sqrt(D)), (B, L, M)."""
    return torch.sigmoid(query_BLD @ key_BMD.mT / math.sqrt(query_BLD.shape[-1]))


class AttentionPool(nn.Module):
    """Multi-head attention; the query is the mean of the parts, the keys are the mean and the parts."""

    def __init__(self, dim: int, heads: int = 8, positions: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (linear(dim, dim) for _ in range(4))
        self.position_LD = None if positions is None else nn.Parameter(torch.randn(positions + 1, dim) / math.sqrt(dim))

    def forward(self, parts_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """One vector per study, (B, D)."""
        tokens_BLD = torch.cat([masked_mean(parts_BLD, mask_BL).unsqueeze(1), parts_BLD], dim=1)
        if self.position_LD is not None:
            tokens_BLD = tokens_BLD + self.position_LD.to(tokens_BLD.dtype)
        keep_B11L = None if mask_BL is None else F.pad(mask_BL, (1, 0), value=True)[:, None, None]
        pooled_BH1d = F.scaled_dot_product_attention(
            self._split(self.q_proj(tokens_BLD[:, :1])),
            self._split(self.k_proj(tokens_BLD)),
            self._split(self.v_proj(tokens_BLD)),
            attn_mask=keep_B11L,
        )
        return self.c_proj(pooled_BH1d.transpose(1, 2).flatten(1))

    def _split(self, tokens_BLD: Tensor) -> Tensor:
        return tokens_BLD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def masked_mean(parts_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Mean over the unmasked parts, (B, D)."""
    if mask_BL is None:
        return parts_BLD.mean(dim=1)
    weight_B1L = mask_BL.to(parts_BLD.dtype).unsqueeze(1)
    return (weight_B1L @ parts_BLD).squeeze(1) / weight_B1L.sum(-1)
