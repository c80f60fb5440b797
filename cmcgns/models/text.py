"""Sentence embeddings and a report embedding from any BERT-like encoder of transformers.

B studies, T tokens, S sentences (padded), C channels of the backbone, D embedding.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from cmcgns.models.attention import AttentionPool, masked_mean, projection, unit


class TextEncoder(nn.Module):
    """Projects token states to D and normalises them; a sentence is the mean of its tokens, a report pools its sentences."""

    def __init__(self, backbone: PreTrainedModel, dim: int, head: Literal["linear", "mlp"] = "linear") -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = projection(head, backbone.config.hidden_size, dim)
        self.pool = AttentionPool(dim)

    def forward(
        self,
        token_BT: Tensor,
        token_mask_BT: Tensor,
        sentence_of_token_BT: Tensor,
        sentence_mask_BS: Tensor,
        by_length_B: Tensor | None = None,
        slice_tokens: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """``sentences_BSD`` (zero where padded) and normalised ``report_BD``.

        With ``by_length_B`` reports of similar length go through the backbone together, which saves padding.
        """
        read = partial(self._sentences, size_S=sentence_mask_BS.shape[1])
        tokens = token_BT, token_mask_BT, sentence_of_token_BT
        sentences_BSD = in_slices(read, tokens, by_length_B, slice_tokens)
        return sentences_BSD, unit(self.pool(sentences_BSD, sentence_mask_BS))

    def _sentences(self, token_BT: Tensor, token_mask_BT: Tensor, sentence_of_token_BT: Tensor, size_S: int) -> Tensor:
        """Means of each sentence's tokens, (B, S, D)."""
        hidden_BTC = self.backbone(
            input_ids=token_BT, attention_mask=self._attention_mask(token_mask_BT)
        ).last_hidden_state
        token_BTD = unit(self.projection(hidden_BTC))
        return sentence_means(token_BTD, sentence_of_token_BT, size_S)

    def _attention_mask(self, token_mask_BT: Tensor) -> Tensor:
        """The mask in the shape of BERT's attention.

        For a (B, T) mask transformers checks on the host whether there is padding, which stalls each microbatch.
        """
        config = self.backbone.config
        if (config.model_type, config._attn_implementation) != ("bert", "sdpa"):
            return token_mask_BT.long()
        return token_mask_BT[:, None, None, :].expand(-1, 1, token_mask_BT.shape[1], -1)


class PooledTextEncoder(TextEncoder):
    """Pools token states over the whole report, then projects: [CLS], the maximum or the mean of all real tokens.

    A sentence is pooled from its own tokens; with ``cls`` it is their mean.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        dim: int,
        pooling: Literal["cls", "max", "mean"],
        head: Literal["linear", "mlp"] = "linear",
        layers: int = 1,
    ) -> None:
        """``layers``: how many last layers are summed to the state of a token."""
        super().__init__(backbone, dim, head)
        del self.pool  # of projected sentences
        self.pooling, self.layers = pooling, layers

    def forward(
        self,
        token_BT: Tensor,
        token_mask_BT: Tensor,
        sentence_of_token_BT: Tensor,
        sentence_mask_BS: Tensor,
        by_length_B: Tensor | None = None,
        slice_tokens: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        hidden_BTC = self.token_states(token_BT, token_mask_BT, by_length_B, slice_tokens)
        return self.embed(hidden_BTC, token_mask_BT, sentence_of_token_BT, sentence_mask_BS)

    def embed(
        self, hidden_BTC: Tensor, token_mask_BT: Tensor, sentence_of_token_BT: Tensor, sentence_mask_BS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``sentences_BSD`` and ``report_BD`` of token states, both of length 1, sentences zero where padded."""
        size_S = sentence_mask_BS.shape[1]
        if self.pooling == "max":
            sentences_BSC = sentence_maxima(hidden_BTC, sentence_of_token_BT, size_S)
            report_BC = hidden_BTC.masked_fill(~token_mask_BT.unsqueeze(-1), -torch.inf).amax(1)
        else:
            sentences_BSC = sentence_means(hidden_BTC, sentence_of_token_BT, size_S)
            report_BC = hidden_BTC[:, 0] if self.pooling == "cls" else masked_mean(hidden_BTC, token_mask_BT)
        both_BXD = unit(self.projection(torch.cat([report_BC.unsqueeze(1), sentences_BSC], dim=1)))
        return both_BXD[:, 1:] * sentence_mask_BS.unsqueeze(-1), both_BXD[:, 0]

    def token_states(
        self,
        token_BT: Tensor,
        token_mask_BT: Tensor,
        by_length_B: Tensor | None = None,
        slice_tokens: tuple[int, ...] = (),
    ) -> Tensor:
        """Sum of the last ``layers`` hidden states, (B, T, C); padding has any values."""
        read = partial(self._token_states, length=token_BT.shape[1])
        return in_slices(read, (token_BT, token_mask_BT), by_length_B, slice_tokens)

    def _token_states(self, token_bt: Tensor, token_mask_bt: Tensor, length: int) -> Tensor:
        """States of a slice, padded to ``length`` tokens."""
        mask = self._attention_mask(token_mask_bt)
        if self.layers == 1:
            state_btC = self.backbone(input_ids=token_bt, attention_mask=mask).last_hidden_state
        else:
            hidden = self.backbone(input_ids=token_bt, attention_mask=mask, output_hidden_states=True).hidden_states
            state_btC = torch.stack(hidden[-self.layers :]).sum(0)
        return F.pad(state_btC, (0, 0, 0, length - token_bt.shape[1]))


def in_slices(
    read: Callable[..., Tensor],
    tokens: tuple[Tensor, ...],
    by_length_B: Tensor | None,
    slice_tokens: tuple[int, ...],
) -> Tensor:
    """``read`` of the ``tokens``, each (B, T). With ``by_length_B`` it reads slices of reports of similar length.

    The result is in the batch's order.
    """
    if by_length_B is None:
        return read(*tokens)
    parts = [
        read(*(each_BT[rows_b, :size_t] for each_BT in tokens))
        for rows_b, size_t in zip(by_length_B.tensor_split(len(slice_tokens)), slice_tokens, strict=True)
    ]
    sorted_rows = torch.cat(parts)
    return torch.zeros_like(sorted_rows).index_copy(0, by_length_B, sorted_rows)


def whole_words(states_BTC: Tensor, continues_BT: Tensor, owner_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the pieces of each word (B, T, C), and the sentence of each word (B, T): word after word, then other values
    and -1. A special token is a word of its own."""
    word_BT = (~continues_BT).cumsum(1) - 1
    place_T1 = torch.arange(word_BT.shape[1], device=word_BT.device).unsqueeze(1)
    member_BWT = (word_BT.unsqueeze(1) == place_T1).to(states_BTC.dtype)
    owner_BW = torch.full_like(owner_BT, -1).scatter_reduce(1, word_BT, owner_BT, "amax")
    return member_BWT @ states_BTC, owner_BW


def sentence_means(token_BTD: Tensor, sentence_of_token_BT: Tensor, size_S: int) -> Tensor:
    """Mean of each sentence's tokens, (B, S, D); zero for sentences without tokens."""
    sentence_S1 = torch.arange(size_S, device=token_BTD.device).unsqueeze(1)
    member_BST = (sentence_of_token_BT.unsqueeze(1) == sentence_S1).to(token_BTD.dtype)
    return member_BST @ token_BTD / member_BST.sum(-1, keepdim=True).clamp(min=1)


def sentence_maxima(token_BTD: Tensor, sentence_of_token_BT: Tensor, size_S: int) -> Tensor:
    """Maximum over each sentence's tokens, (B, S, D); zero for sentences without tokens."""
    # one row more, for tokens of no sentence
    owner_BTD = sentence_of_token_BT.remainder(size_S + 1).unsqueeze(-1).expand_as(token_BTD)
    lowest_BSD = token_BTD.new_full((len(token_BTD), size_S + 1, token_BTD.shape[-1]), -torch.inf)
    maxima_BSD = lowest_BSD.scatter_reduce(1, owner_BTD, token_BTD, "amax")[:, :size_S]
    return maxima_BSD.masked_fill(maxima_BSD == -torch.inf, 0.0)
