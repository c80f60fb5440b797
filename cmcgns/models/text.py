"""Sentence embeddings and a report embedding from any BERT-like encoder of transformers.

B studies, T tokens, S sentences (padded), C channels of the backbone, D embedding.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cmcgns.models.attention import AttentionPool, linear, unit


class TextEncoder(nn.Module):
    """Projects token states to D and normalises them; a sentence is the mean of its tokens, a report pools its sentences."""

    def __init__(self, backbone: PreTrainedModel, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = linear(backbone.config.hidden_size, dim)
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
        if by_length_B is None:
            sentences_BSD = self._sentences(token_BT, token_mask_BT, sentence_of_token_BT, sentence_mask_BS.shape[1])
        else:
            parts = [
                self._sentences(
                    token_BT[rows_b, :size_t],
                    token_mask_BT[rows_b, :size_t],
                    sentence_of_token_BT[rows_b, :size_t],
                    sentence_mask_BS.shape[1],
                )
                for rows_b, size_t in zip(by_length_B.tensor_split(len(slice_tokens)), slice_tokens, strict=True)
            ]
            sorted_BSD = torch.cat(parts)
            sentences_BSD = torch.zeros_like(sorted_BSD).index_copy(0, by_length_B, sorted_BSD)
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


def sentence_means(token_BTD: Tensor, sentence_of_token_BT: Tensor, size_S: int) -> Tensor:
    """Mean of each sentence's tokens, (B, S, D); zero for sentences without tokens."""
    sentence_S1 = torch.arange(size_S, device=token_BTD.device).unsqueeze(1)
    member_BST = (sentence_of_token_BT.unsqueeze(1) == sentence_S1).to(token_BTD.dtype)
    return member_BST @ token_BTD / member_BST.sum(-1, keepdim=True).clamp(min=1)
