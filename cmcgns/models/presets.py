"""Sizes of the encoders that are trained from scratch. Does not import torch, so that prepare does not load it."""

from typing import Any

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
    # three stages: a patch is 16 pixels wide, not 32, so that a film has four times as many
    "resnet-tiny-16": {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1], "layer_type": "basic"},
    "resnet-small-16": {
        "embedding_size": 64,
        "hidden_sizes": [64, 128, 256],
        "depths": [2, 2, 2],
        "layer_type": "basic",
    },
    "resnet-50-16": {"hidden_sizes": [256, 512, 1024], "depths": [3, 4, 6]},
    "vit-tiny": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768},
    "vit-small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "vit-base": {},
    # patches of 8 pixels, not 16
    "vit-tiny-8": {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "patch_size": 8,
    },
    "vit-small-8": {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "patch_size": 8,
    },
}

TEXT_PRESETS: dict[str, dict[str, int]] = {
    "bert-tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "bert-mini": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "bert-base": {},
}
