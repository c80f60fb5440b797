"""What CM-CGNS adds to the two encoders: cross-modal attention, SimSiam's predictor and a decoder that reconstructs films.

B studies, P patches (g x g), S sentences (padded), D embedding.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmcgns.data.batch import ImageReportBatch, mask_positions
from cmcgns.models.attention import attention_weights, linear, sigmoid_attention, unit
from cmcgns.models.backbones import ImageEncoder
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.models.text import TextEncoder

RECONSTRUCTION_PARTS = ("decoder.", "mask_token")
"""Name prefixes of the parameters that only stage 2 trains."""

PREDICTOR = ("predictor.",)
"""Name prefixes of the parameters that only the patch loss trains."""
PATCH_ATTENTION = tuple(f"cross_attention.{part}." for part in ("image.query", "text.key", "text.value"))
"""Those that only the patch loss and the reconstruction train: what a patch attends to in the report."""


class CmCgnsOutputs(NamedTuple):
    """Outputs of the model for one microbatch."""

    image_BD: Tensor
    """Normalised film embeddings."""
    report_BD: Tensor
    """Normalised report embeddings."""
    patches_BPD: Tensor
    """Normalised patch embeddings."""
    sentences_BSD: Tensor
    """Sentence embeddings: means of normalised tokens, not normalised again."""
    image_to_text_BSD: Tensor
    """Features that each sentence attends to on its study's patches, not normalised (z2)."""
    text_to_image_BPD: Tensor
    """Features that each patch attends to in its study's sentences, not normalised."""
    predicted_patches_BPD: Tensor
    """SimSiam prediction from the patches."""
    predicted_attended_BPD: Tensor
    """SimSiam prediction from the attended sentences."""
    sentence_query_BSD: Tensor
    """Queries of the sentences, with which they can attend to any film."""
    patch_key_BPD: Tensor
    """Keys of the patches."""
    patch_value_BPD: Tensor
    """Values of the patches."""
    scale: Tensor
    """Inverse temperature of the global loss, shape (1,)."""
    masked_BP: Tensor | None
    """True where a patch is hidden from the reconstruction (stage 2)."""
    reconstruction_B1HW: Tensor | None
    """Films reconstructed from unmasked patches and reports (stage 2)."""


class CmCgnsModel(DualEncoder):
    """Image and text encoder, cross-modal attention, SimSiam predictor, decoder and temperature."""

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        dim: int,
        temperature: float,
        learn_temperature: bool,
        mask_ratio: float,
        decoder_channels: int = 256,
    ) -> None:
        self.decoder_channels = decoder_channels  # add_parts reads it
        super().__init__(image_encoder, text_encoder, dim, temperature, learn_temperature)
        self.mask_ratio = mask_ratio

    def add_parts(self, dim: int) -> None:
        # do not reorder: the order determines which weights a seed gives
        self.patch_projection = linear(self.image_encoder.dim, dim)
        self.image_projection = linear(self.image_encoder.dim, dim)
        self.cross_attention = CrossModalAttention(dim)
        self.predictor = nn.Sequential(linear(dim, dim // 2), nn.ReLU(), linear(dim // 2, dim))
        # only for reconstruction; not in stage 1's optimizer. mask_token is on the root module, where ZeRO-3 gathers it
        self.mask_token = nn.Parameter(torch.randn(dim) / math.sqrt(dim))
        encoder = self.image_encoder
        kind = ConvolutionalDecoder if encoder.is_convolutional else TransformerDecoder
        self.decoder = kind(dim, encoder.grid, encoder.stride, self.decoder_channels)

    def forward(self, batch: ImageReportBatch, stage: int = 1) -> CmCgnsOutputs:
        """Embeddings and attention of one microbatch; in stage 2 also films reconstructed from their visible patches."""
        features_BPC, image_BD = self.embed_images(batch.image_B1HW)
        patches_BPD = unit(self.patch_projection(features_BPC))
        sentences_BSD, report_BD = self.embed_reports(batch)
        attended = self.cross_attention(
            patches_BPD, sentences_BSD, batch.sentence_mask_BS, self.mask_token if stage == 2 else None
        )
        masked_BP, reconstruction_B1HW = None, None
        if attended.hidden_B1D is not None:
            masked_BP = mask_positions(batch.draw_key_B, features_BPC.shape[1], self.mask_ratio)
            visible_BPD = hide(patches_BPD, self.mask_token, masked_BP)
            answered_BPD = hide(attended.text_to_image_BPD, attended.hidden_B1D, masked_BP)
            reconstruction_B1HW = self.decoder(torch.cat([visible_BPD, answered_BPD], dim=-1))
        return CmCgnsOutputs(
            image_BD=image_BD,
            report_BD=report_BD,
            patches_BPD=patches_BPD,
            sentences_BSD=sentences_BSD,
            image_to_text_BSD=attended.image_to_text_BSD,
            text_to_image_BPD=attended.text_to_image_BPD,
            predicted_patches_BPD=self.predictor(patches_BPD),
            predicted_attended_BPD=self.predictor(attended.text_to_image_BPD),
            sentence_query_BSD=attended.sentence_query_BSD,
            patch_key_BPD=attended.patch_key_BPD,
            patch_value_BPD=attended.patch_value_BPD,
            scale=self.scale,
            masked_BP=masked_BP,
            reconstruction_B1HW=reconstruction_B1HW,
        )


def hide(rows_BPD: Tensor, replacement: Tensor, masked_BP: Tensor) -> Tensor:
    """``rows_BPD`` with ``replacement`` at masked positions."""
    return torch.where(masked_BP.unsqueeze(-1), replacement.to(rows_BPD.dtype), rows_BPD)


class Attended(NamedTuple):
    """Outputs of the cross-modal attention; each field as in ``CmCgnsOutputs``."""

    image_to_text_BSD: Tensor
    text_to_image_BPD: Tensor
    sentence_query_BSD: Tensor
    patch_key_BPD: Tensor
    patch_value_BPD: Tensor
    hidden_B1D: Tensor | None
    """What a hidden patch attends to in the sentences."""


class CrossModalAttention(nn.Module):
    """One head with a sigmoid instead of a softmax, so that a patch may attend to no sentence (PRIOR, ICCV 2023)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.image = nn.ModuleDict({role: linear(dim, dim) for role in ("query", "key", "value")})
        self.text = nn.ModuleDict({role: linear(dim, dim) for role in ("query", "key", "value")})

    def forward(
        self, patches_BPD: Tensor, sentences_BSD: Tensor, sentence_mask_BS: Tensor, mask_token_D: Tensor | None = None
    ) -> Attended:
        """What sentences and patches attend to, and with a mask token what a hidden patch attends to."""
        text_key_BSD, text_value_BSD = self.text["key"](sentences_BSD), self.text["value"](sentences_BSD)
        query_BSD, key_BPD = self.text["query"](sentences_BSD), self.image["key"](patches_BPD)
        value_BPD = self.image["value"](patches_BPD)
        image_to_text_BSD = sigmoid_attention(query_BSD, key_BPD, value_BPD)
        text_to_image_BPD = sigmoid_attention(
            self.image["query"](patches_BPD), text_key_BSD, text_value_BSD, sentence_mask_BS
        )
        hidden_B1D = None
        if mask_token_D is not None:
            query_B1D = self.image["query"](mask_token_D).expand(patches_BPD.shape[0], 1, -1)
            hidden_B1D = sigmoid_attention(query_B1D, text_key_BSD, text_value_BSD, sentence_mask_BS)
        return Attended(image_to_text_BSD, text_to_image_BPD, query_BSD, key_BPD, value_BPD, hidden_B1D)

    def sentence_weights(self, patches_BPD: Tensor, sentences_BSD: Tensor) -> Tensor:
        """Attention weight of each sentence for each patch of its study's film, (B, S, P) between 0 and 1."""
        return attention_weights(self.text["query"](sentences_BSD), self.image["key"](patches_BPD))


class ConvolutionalDecoder(nn.Module):
    """For a ResNet: each stage doubles the side and halves the channels, until a patch is ``stride`` pixels wide."""

    def __init__(self, dim: int, grid: int, stride: int, channels: int) -> None:
        super().__init__()
        self.grid = grid
        widths = [max(channels >> stage, 16) for stage in range(int(math.log2(stride)) + 1)]
        self.entry = nn.Conv2d(2 * dim, widths[0], 1)
        self.stages = nn.Sequential(*(upsampling_stage(*pair) for pair in itertools.pairwise(widths)))
        self.exit = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, joint_BPE: Tensor) -> Tensor:
        """(B, 1, H, W) from patches concatenated with what they attend to, E = 2D."""
        features_BEgg = joint_BPE.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.exit(self.stages(self.entry(features_BEgg)))


def upsampling_stage(width_in: int, width_out: int) -> nn.Module:
    """Doubles the side; with group norm, so that ranks do not have to share statistics."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        nn.Conv2d(width_in, width_out, 3, padding=1),
        nn.GroupNorm(min(8, width_out // 4), width_out),
        nn.GELU(),
    )


class TransformerDecoder(nn.Module):
    """For a ViT: four transformer layers over all positions, then a square of pixels for each position."""

    def __init__(self, dim: int, grid: int, stride: int, width: int, layers: int = 4) -> None:
        super().__init__()
        self.grid = grid
        self.entry = nn.Linear(2 * dim, width)
        self.position_PC = nn.Parameter(torch.randn(grid * grid, width) * 0.02)
        # separate layers: nn.TransformerEncoder would start all of them with the same weights
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
                for _ in range(layers)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.exit = nn.Linear(width, stride * stride)
        self.upsample = nn.PixelShuffle(stride)

    def forward(self, joint_BPE: Tensor) -> Tensor:
        """(B, 1, H, W) from patches concatenated with what they attend to, E = 2D."""
        hidden_BPC = self.entry(joint_BPE)
        hidden_BPC = self.layers(hidden_BPC + self.position_PC.to(hidden_BPC.dtype))
        pixels_BPp = self.exit(self.norm(hidden_BPC))
        return self.upsample(pixels_BPp.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
