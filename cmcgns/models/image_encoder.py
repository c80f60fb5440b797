"""Films to patch features and one global feature, from any ResNet or ViT that transformers knows.

B studies, P patches, C channels of the backbone.
"""

from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from cmcgns.errors import UserError
from cmcgns.models.cross_attention import AttentionPool


class ImageEncoder(nn.Module):
    """A backbone that gives patches in raster order and a global feature: attention pool of a ResNet, CLS of a ViT."""

    def __init__(self, backbone: PreTrainedModel, image_size: int, fixed_batch_statistics: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        config = backbone.config
        self.is_convolutional = hasattr(config, "hidden_sizes") and hasattr(config, "depths")
        self.dim: int = config.hidden_sizes[-1] if self.is_convolutional else config.hidden_size
        self.stride: int = 32 if self.is_convolutional else config.patch_size
        if image_size % self.stride:
            near = image_size // self.stride * self.stride
            raise UserError(
                f"data.image_size {image_size} is not a multiple of the image encoder's patch of {self.stride} pixels; "
                f"nearest: {near or self.stride} and {near + self.stride}"
            )
        self.grid = image_size // self.stride
        self.pool: nn.Module | None = None
        if self.is_convolutional:
            self.pool = AttentionPool(self.dim, positions=self.patches)
        self.fixed_batch_statistics = fixed_batch_statistics
        resized = getattr(config, "image_size", image_size) not in (image_size, [image_size, image_size])
        self.forward_options = {"interpolate_pos_encoding": True} if resized and not self.is_convolutional else {}

    @property
    def patches(self) -> int:
        """Patches P of one film."""
        return self.grid * self.grid

    def forward(self, image_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        """``features_BPC`` and ``pooled_BC``; grey becomes three equal channels."""
        pixels_B3HW = image_B1HW.to(next(self.parameters()).dtype).expand(-1, 3, -1, -1)
        hidden = self.backbone(pixel_values=pixels_B3HW, **self.forward_options).last_hidden_state
        if self.pool is not None:
            # permute, never view: a patch is all channels of one position
            features_BPC = hidden.flatten(2).transpose(1, 2)
            return features_BPC, self.pool(features_BPC)
        prefix = hidden.shape[1] - self.patches  # CLS, and DeiT's distillation token
        return hidden[:, prefix:], hidden[:, 0]

    def train(self, mode: bool = True) -> "ImageEncoder":
        super().train(mode)
        if self.fixed_batch_statistics:
            for norm in self._batch_norms():
                norm.eval()
        return self

    def _batch_norms(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
