"""The film encoder of a run or of a Hugging Face folder.

B films, C channels of the backbone, D embedding, P patches.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cmcgns.models.backbones import ImageEncoder


class FilmEncoder(nn.Module):
    """An image encoder, with a projection to the space of the reports if there is one.

    ``statistics``: mean and standard deviation of each channel, for pixels in [0, 1], with which the encoder was trained; without
    them its input is in [-1, 1], like ours.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        projection: nn.Module | None,
        mean_of_patches: bool = False,
        statistics: tuple[list[float], list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection
        mean, spread = statistics or ([0.5] * 3, [0.5] * 3)
        self.mean_3, self.spread_3 = (nn.Buffer(torch.tensor(values), persistent=False) for values in (mean, spread))
        self.mean_of_patches = mean_of_patches and encoder.is_convolutional
        if self.mean_of_patches:
            self.encoder.pool = nn.Identity()  # an attention pool would be untrained

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.mean_3.device

    @property
    def dim(self) -> int:
        """Channels C of the global feature."""
        return self.encoder.dim

    def forward(self, image_B1HW: Tensor) -> tuple[Tensor, Tensor | None]:
        """``pooled_BC``, and with a projection ``image_BD`` of length 1, to compare with reports."""
        features_BPC, pooled_BC = self.encoder(self._pixels(image_B1HW))
        if self.mean_of_patches:
            pooled_BC = features_BPC.mean(1)
        image_BD = None if self.projection is None else nn.functional.normalize(self.projection(pooled_BC), dim=-1)
        return pooled_BC, image_BD

    def levels(self, image_B1HW: Tensor) -> list[Tensor]:
        """Feature maps (B, C, h, w), finest first: all stages of a ResNet; else the patches of the last layer."""
        pixels_B3HW = self._pixels(image_B1HW)
        # every CNN of transformers returns its stages; a plugin's need not
        if self.encoder.is_convolutional and isinstance(self.encoder.backbone, PreTrainedModel):
            return list(self.encoder.backbone(pixel_values=pixels_B3HW, output_hidden_states=True).hidden_states)
        features_BPC = self.encoder(pixels_B3HW)[0]
        grid = int(features_BPC.shape[1] ** 0.5)
        return [features_BPC.mT.unflatten(2, (grid, grid)).contiguous()]

    def _pixels(self, image_B1HW: Tensor) -> Tensor:
        """Films in [-1, 1] normalised for the encoder, (B, 3, H, W)."""
        return ((image_B1HW + 1) / 2 - self.mean_3[:, None, None]) / self.spread_3[:, None, None]


def read_statistics(folder: str) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of each channel from the preprocessor_config.json of a Hugging Face folder, None without."""
    path = Path(folder) / "preprocessor_config.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    if not content.get("do_normalize", True) or "image_mean" not in content:
        return None
    return [float(value) for value in content["image_mean"]], [float(value) for value in content["image_std"]]
