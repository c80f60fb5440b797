"""Builds encoders from settings: a preset with new weights, or any model that transformers can load.

An image backbone is any module that takes ``pixel_values`` and returns ``last_hidden_state``; grid, stride and width follow
from the shape of its output. B studies, P patches, L tokens, C channels of the backbone.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    BertConfig,
    PreTrainedModel,
    ResNetConfig,
    ViTConfig,
)

from cmcgns.errors import UserError, first_line
from cmcgns.models.attention import AttentionPool
from cmcgns.models.presets import IMAGE_PRESETS, TEXT_PRESETS
from cmcgns.plugins import is_plugin, load_plugin

NEVER_REMOTE_CODE = {"trust_remote_code": False}
"""Without it transformers asks the user whether to run Python files of the model's folder, or of the hub."""
PROBE_SIZE = 448
"""Image side in pixels for the shape probe: a multiple of the strides 4, 7, 8, 14, 16, 28, 32 and 56."""
MAX_PREFIX_TOKENS = 8
"""Maximum number of tokens before the patches."""


def build_image_backbone(name: str, image_size: int, dropout: float) -> PreTrainedModel:
    """A preset with new weights, a pretrained encoder from a local folder or the hub, or a plugin's module."""
    if name in IMAGE_PRESETS:
        if name.startswith("resnet"):
            return AutoModel.from_config(ResNetConfig(**IMAGE_PRESETS[name]))
        dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0}
        config = ViTConfig(image_size=image_size, **IMAGE_PRESETS[name], **dropouts)
        return AutoModel.from_config(config, add_pooling_layer=False)
    if is_plugin(name):
        build = getattr(load_plugin("model.image_encoder", name, {}), "build", None)
        if build is None:
            raise UserError(f"model.image_encoder {name} defines no build(image_size, dropout) (docs/methods.md)")
        backbone: PreTrainedModel = build(image_size, dropout)
        return backbone
    kind = _model_type("model.image_encoder", name)
    model = MODEL_MAPPING.get(type(AutoConfig.from_pretrained(name, **NEVER_REMOTE_CODE)), None)
    if model is not None and model.main_input_name != "pixel_values":
        raise UserError(f"model.image_encoder '{name}' is a {kind}; give an image model")
    return _pretrained("model.image_encoder", name)


def build_text_backbone(name: str, vocabulary_size: int, max_tokens: int, dropout: float) -> PreTrainedModel:
    """A BERT preset with new weights and ``vocabulary_size`` entries, or a pretrained encoder from a folder or the hub."""
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
        raise UserError(f"model.text_encoder '{name}' is a {kind}; give a BERT-like encoder")
    backbone = _pretrained("model.text_encoder", name)
    longest, entries = backbone.config.max_position_embeddings, backbone.config.vocab_size
    if max_tokens > longest:
        raise UserError(f"data.max_tokens {max_tokens} is too long for model.text_encoder '{name}': at most {longest}")
    if vocabulary_size > entries:
        raise UserError(
            f"the tokenizer has {vocabulary_size} entries, but model.text_encoder '{name}' has {entries}; "
            "set model.tokenizer=auto"
        )
    return backbone


def _pretrained(key: str, name: str) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name, **NEVER_REMOTE_CODE)
        kind = MODEL_MAPPING.get(type(config), None)
        options = {"add_pooling_layer": False} if kind and has_parameter(kind.__init__, "add_pooling_layer") else {}
        # the driver only needs shapes, and transformers cannot load weights on the meta device
        if torch.get_default_device().type == "meta":
            return AutoModel.from_config(config, **options)
        model, found = AutoModel.from_pretrained(
            name, dtype=torch.float32, **NEVER_REMOTE_CODE, output_loading_info=True, **options
        )
    except (OSError, ValueError, ImportError) as error:  # ImportError: timm models without timm
        raise _no_model(key, name, error) from None
    lacking = sorted(found["missing_keys"])
    if lacking:  # transformers would give them new weights
        raise UserError(
            f"{key} '{name}' lacks {len(lacking)} weights of its architecture: {', '.join(lacking[:3])}; get the whole model"
        )
    check_finite(f"{key} '{name}'", model.state_dict())
    trained: PreTrainedModel = model
    return trained


def check_finite(name: str, weights: Mapping[str, Tensor]) -> None:
    """Raise ``UserError`` if one of the ``weights`` of ``name`` is not finite."""
    broken = [key for key, each in weights.items() if each.is_floating_point() and not bool(each.isfinite().all())]
    if broken:
        raise UserError(
            f"{name} has weights that are not finite: {', '.join(broken[:3])}; its training diverged or a file is damaged: use "
            "another checkpoint or copy"
        )


def _model_type(key: str, name: str) -> str:
    """The architecture behind a name.

    Raises:
        UserError: there is no such model; names the presets.
    """
    try:
        return str(AutoConfig.from_pretrained(name, **NEVER_REMOTE_CODE).model_type)
    except (OSError, ValueError) as error:
        raise _no_model(key, name, error) from None


def _no_model(key: str, name: str, error: Exception) -> UserError:
    presets = IMAGE_PRESETS if key.endswith("image_encoder") else TEXT_PRESETS
    problem = (
        "contains no model"
        if Path(name).is_dir()
        else "is neither a preset nor a local folder, nor available on the hub"
    )
    return UserError(f"{key} '{name}' {problem} (presets: {', '.join(presets)}): {str(error).splitlines()[0]}")


class Layout(NamedTuple):
    """Layout of a backbone's output, from its shape."""

    dim: int
    """Channels C of a patch."""
    stride: int
    """Side of a patch in pixels."""
    prefix: int
    """Tokens before the patches: CLS, DeiT's distillation token, DINOv2's registers."""
    is_convolutional: bool
    """A feature map (B, C, h, w) instead of tokens (B, L, C)."""


def read_layout(backbone: nn.Module) -> Layout:
    """The layout of any model that takes ``pixel_values`` and returns ``last_hidden_state``.

    Runs the model on the meta device, without memory or computation, at ``PROBE_SIZE`` pixels.

    Raises:
        UserError: the model takes or returns something else.
    """
    state = {name: part.to("meta") for name, part in (*backbone.named_parameters(), *backbone.named_buffers())}
    pixels_13HW = torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device="meta", dtype=next(backbone.parameters()).dtype)
    options = {"interpolate_pos_encoding": True} if has_parameter(backbone.forward, "interpolate_pos_encoding") else {}
    mode = backbone.training
    backbone.eval()  # neither dropout nor running statistics
    try:
        with torch.no_grad():
            hidden = functional_call(backbone, state, kwargs={"pixel_values": pixels_13HW, **options}).last_hidden_state
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model.image_encoder: a {type(backbone).__name__} cannot be used: it must take pixel_values and return "
            f"last_hidden_state ({first_line(error)})"
        ) from error
    finally:
        backbone.train(mode)
    if hidden.dim() == 4 and hidden.shape[2] == hidden.shape[3]:
        return Layout(hidden.shape[1], PROBE_SIZE // hidden.shape[2], 0, True)
    tokens = hidden.shape[1]
    grids = [
        side for side in range(1, PROBE_SIZE) if PROBE_SIZE % side == 0 and 0 <= tokens - side**2 <= MAX_PREFIX_TOKENS
    ]
    if hidden.dim() != 3 or not grids:
        raise UserError(
            f"model.image_encoder: a {type(backbone).__name__} returns {tuple(hidden.shape)}; give a model that returns a square "
            "feature map or a square grid of tokens"
        )
    return Layout(hidden.shape[2], PROBE_SIZE // grids[-1], tokens - grids[-1] ** 2, False)


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """True if ``function`` has a parameter called ``name``."""
    return name in inspect.signature(function).parameters


class ImageEncoder(nn.Module):
    """A backbone that returns patches in raster order and a global feature: its CLS token, or attention pooling without one."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        image_size: int,
        fixed_batch_statistics: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.dim, self.stride, self.prefix, self.is_convolutional = read_layout(backbone)
        if image_size % self.stride:
            near = image_size // self.stride * self.stride
            raise UserError(
                f"data.image_size {image_size} is not a multiple of the image encoder's patch of {self.stride} pixels; "
                f"nearest: {near or self.stride} and {near + self.stride}"
            )
        self.grid = image_size // self.stride
        self.pool: nn.Module | None = None
        if not self.prefix:
            self.pool = AttentionPool(self.dim, positions=self.patches)
        self.fixed_batch_statistics = fixed_batch_statistics
        # of the pixels only: convolutions hand it on, and DeepSpeed's flat buffers would undo it for weights
        self.pixel_format = torch.channels_last if channels_last else torch.contiguous_format
        resized = getattr(getattr(backbone, "config", None), "image_size", image_size) not in (
            image_size,
            [image_size, image_size],
        )
        interpolates = has_parameter(backbone.forward, "interpolate_pos_encoding")
        self.forward_options = {"interpolate_pos_encoding": True} if resized and interpolates else {}

    @property
    def patches(self) -> int:
        """Number of patches P of one film."""
        return self.grid * self.grid

    def forward(self, image_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        """``features_BPC`` and ``pooled_BC``; the grey channel is repeated three times."""
        hidden = self.backbone(pixel_values=self._pixels(image_B1HW), **self.forward_options).last_hidden_state
        return self._features(hidden)

    def before_last(self, image_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the feature map before the last stage, (B, P, C), and ``pooled_BC``."""
        pixels_B3HW = self._pixels(image_B1HW)
        found = self.backbone(pixel_values=pixels_B3HW, output_hidden_states=True, **self.forward_options)
        return found.hidden_states[-2].flatten(2).transpose(1, 2), self._features(found.last_hidden_state)[1]

    def with_attention(self, image_B1HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``features_BPC``, ``pooled_BC``, and the attention of [CLS] to each patch (B, P): last layer, mean over heads.

        The backbone must have a [CLS] and the attention implementation ``eager``.
        """
        pixels_B3HW = self._pixels(image_B1HW)
        found = self.backbone(pixel_values=pixels_B3HW, output_attentions=True, **self.forward_options)
        attention_BP = found.attentions[-1][:, :, 0, self.prefix :].mean(1)
        return *self._features(found.last_hidden_state), attention_BP

    @property
    def dim_before_last(self) -> int:
        """Channels of the feature map before the last stage.

        Raises:
            UserError: the encoder has no stages.
        """
        widths = getattr(getattr(self.backbone, "config", None), "hidden_sizes", [])
        if not self.is_convolutional or len(widths) < 2:
            raise UserError(
                f"objective.regions before_last: a {type(self.backbone).__name__} has no stages; give a ResNet, or "
                "objective.regions=last"
            )
        return int(widths[-2])

    def _pixels(self, image_B1HW: Tensor) -> Tensor:
        pixels_B3HW = image_B1HW.to(next(self.parameters()).dtype).expand(-1, 3, -1, -1)
        if self.pixel_format != torch.contiguous_format:
            pixels_B3HW = pixels_B3HW.contiguous(memory_format=self.pixel_format)
        return pixels_B3HW

    def _features(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        features_BPC = self._patches(hidden)
        return features_BPC, hidden[:, 0] if self.pool is None else self.pool(features_BPC)

    def _patches(self, hidden: Tensor) -> Tensor:
        # transpose, not view: a patch is all channels of one position
        return hidden.flatten(2).transpose(1, 2) if self.is_convolutional else hidden[:, self.prefix :]

    def train(self, mode: bool = True) -> "ImageEncoder":
        super().train(mode)
        if self.fixed_batch_statistics:
            for norm in self._batch_norms():
                norm.eval()
        return self

    def _batch_norms(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
