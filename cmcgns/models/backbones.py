"""The way from a setting to an encoder: a preset's shape with fresh weights, or a pretrained one."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig, PreTrainedModel, ResNetConfig, ViTConfig

from cmcgns.errors import UserError
from cmcgns.models.attention import AttentionPool
from cmcgns.models.presets import IMAGE_PRESETS, TEXT_PRESETS


def build_image_backbone(name: str, image_size: int, dropout: float) -> PreTrainedModel:
    """A preset with fresh weights, or the encoder in a local folder or of that name with its own weights."""
    if name in IMAGE_PRESETS:
        if name.startswith("resnet"):
            return AutoModel.from_config(ResNetConfig(**IMAGE_PRESETS[name]))
        dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0}
        config = ViTConfig(image_size=image_size, **IMAGE_PRESETS[name], **dropouts)
        return AutoModel.from_config(config, add_pooling_layer=False)
    kind = _model_type("model.image_encoder", name)
    if not kind.endswith(("resnet", "vit", "deit")):
        raise UserError(f"model.image_encoder '{name}' is a {kind}; a ResNet or ViT is needed")
    return _pretrained("model.image_encoder", name, {} if kind == "resnet" else {"add_pooling_layer": False})


def build_text_backbone(name: str, vocabulary_size: int, max_tokens: int, dropout: float) -> PreTrainedModel:
    """A BERT preset with fresh weights and ``vocabulary_size`` entries, or the one in a folder or of that name."""
    if name in TEXT_PRESETS:
        config = BertConfig(
            vocab_size=vocabulary_size,
            max_position_embeddings=max(max_tokens, 512),
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **TEXT_PRESETS[name],
        )
        return AutoModel.from_config(config, add_pooling_layer=False)
    kind = _model_type("model.text_encoder", name)
    if "bert" not in kind:
        raise UserError(f"model.text_encoder '{name}' is a {kind}; a BERT-like encoder is needed")
    backbone = _pretrained("model.text_encoder", name, {"add_pooling_layer": False})
    longest, entries = backbone.config.max_position_embeddings, backbone.config.vocab_size
    if max_tokens > longest:
        raise UserError(f"data.max_tokens {max_tokens} is too long for model.text_encoder '{name}': at most {longest}")
    if vocabulary_size > entries:
        raise UserError(
            f"the tokenizer has {vocabulary_size} entries and model.text_encoder '{name}' knows {entries}; "
            "set model.tokenizer=auto"
        )
    return backbone


def _pretrained(key: str, name: str, options: dict[str, bool]) -> PreTrainedModel:
    try:
        # the driver asks for shapes alone, and transformers loads no weights there
        if torch.get_default_device().type == "meta":
            return AutoModel.from_config(AutoConfig.from_pretrained(name), **options)
        return AutoModel.from_pretrained(name, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise _no_model(key, name, error) from None


def _model_type(key: str, name: str) -> str:
    """The architecture behind a name, or a ``UserError`` that says what would do."""
    try:
        return str(AutoConfig.from_pretrained(name).model_type)
    except (OSError, ValueError) as error:
        raise _no_model(key, name, error) from None


def _no_model(key: str, name: str, error: Exception) -> UserError:
    presets = IMAGE_PRESETS if key.endswith("image_encoder") else TEXT_PRESETS
    where = "holds no model" if Path(name).is_dir() else "is no preset, no local folder and not to be had from the hub"
    return UserError(f"{key} '{name}' {where} (presets: {', '.join(presets)}): {str(error).splitlines()[0]}")


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
