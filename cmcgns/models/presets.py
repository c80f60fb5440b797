"""Small and standard encoder shapes that are trained from scratch, and the way from a setting to an encoder."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, BertConfig, PreTrainedModel, ResNetConfig, ViTConfig

from cmcgns.errors import UserError

IMAGE_PRESETS: dict[str, dict[str, Any]] = {
    "resnet-tiny": {
        "embedding_size": 32,
        "hidden_sizes": [32, 64, 128, 192],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
    },
    "resnet-small": {
        "embedding_size": 64,
        "hidden_sizes": [64, 128, 256, 512],
        "depths": [2, 2, 2, 2],
        "layer_type": "basic",
    },
    "resnet-50": {},
    "vit-tiny": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768},
    "vit-small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "vit-base": {},
}
TEXT_PRESETS: dict[str, dict[str, int]] = {
    "bert-tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "bert-mini": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "bert-base": {},
}


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
