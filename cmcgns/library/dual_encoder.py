"""Both encoders and their projections as one model that plain transformers loads, compared with ours before it is kept.

transformers' VisionTextDualEncoder has a projection without bias on the pooled output of each backbone. The pooler of a ViT is a
linear layer on [CLS], that of a BERT the hyperbolic tangent of one: the poolers hold our projections, and the projections only
pick the first D channels.

B films or texts, C channels of a backbone, D embedding.
"""

import copy
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, normalizers
from torch import Tensor, nn
from transformers import (
    BertModel,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTModel,
)

from cmcgns.config import Config
from cmcgns.data.tokenizer import ReportTokenizer
from cmcgns.errors import UserError
from cmcgns.library.film_encoder import FilmEncoder
from cmcgns.library.onnx import example_films, example_tokens
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.models.text import PooledTextEncoder

SMALL = 2.0**-20
"""Texts are scaled by it before the tangent, which is linear there to 1e-9 for channels up to 50, and back after it."""
TOLERANCE = 1e-6
"""Largest difference to ours of a number of a unit vector."""


def write_dual_encoder(model: DualEncoder, config: Config, tokenizer: ReportTokenizer, folder: Path) -> None:
    """Write config.json, model.safetensors and a tokenizer for ``AutoModel`` and ``AutoTokenizer`` into ``folder``.

    Raises:
        UserError: the architecture does not fit, or the features are not ours.
    """
    reason = misfit(model, config)
    if reason:
        raise UserError(
            f"export: --transformers cannot hold this model: {reason}; leave it out, cmcgns.load opens the export without remote "
            "code (docs/library.md)"
        )
    made = dual_encoder(model, config.model.embed_dim).eval()
    made.save_pretrained(folder)
    plain_tokenizer(tokenizer).save_pretrained(folder)
    compare(VisionTextDualEncoderModel.from_pretrained(folder).eval(), model.eval(), config, tokenizer.vocabulary_size)


def misfit(model: DualEncoder, config: Config) -> str | None:
    """Why transformers' dual encoder cannot hold ``model``; None if it can."""
    image, text, dim = model.image_encoder, model.text_encoder, config.model.embed_dim
    if not config.data.reports:
        return "it reads no reports"
    if not isinstance(image.backbone, ViTModel):
        return f"its image encoder is a {type(image.backbone).__name__} with attention pooling, and only a ViT's [CLS] fits"
    if image.forward_options:
        return f"films have {config.data.image_size} pixels and the ViT was made for {image.backbone.config.image_size}"
    if not isinstance(text.backbone, BertModel):
        return f"its text encoder is a {type(text.backbone).__name__}, and only a BERT fits"
    if not isinstance(text, PooledTextEncoder) or text.pooling != "cls" or text.layers != 1:
        return "its texts are not pooled by [CLS], as in mgca, and in clip, siglip and convirt with objective.text_pooling=cls"
    if not isinstance(model.image_projection, nn.Linear) or not isinstance(text.projection, nn.Linear):
        return "a projection is not linear (objective.heads=linear)"
    narrow = min(model.image_projection.in_features, text.projection.in_features)
    return f"an encoder of {narrow} channels is narrower than the embedding of {dim}" if narrow < dim else None


def dual_encoder(model: DualEncoder, dim: int) -> VisionTextDualEncoderModel:
    """The weights of ``model``, which fits, in transformers' architecture."""
    image, text = model.image_encoder, model.text_encoder
    vision, text_config = copy.deepcopy(image.backbone.config), copy.deepcopy(text.backbone.config)
    vision.pooler_act = "linear"
    vision._name_or_path = text_config._name_or_path = ""  # the folder on this machine from which each was loaded
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text_config, projection_dim=dim, logit_scale_init_value=float(model.scale.detach().log())
    )
    made = VisionTextDualEncoderModel(config)
    made.vision_model.load_state_dict(image.backbone.state_dict(), strict=False)
    made.text_model.load_state_dict(text.backbone.state_dict(), strict=False)
    fill(made.vision_model.pooler.dense, made.visual_projection, model.image_projection, 1.0)
    fill(made.text_model.pooler.dense, made.text_projection, text.projection, SMALL)
    return made


@torch.no_grad()
def fill(pooler: nn.Linear, picks: nn.Linear, projection: nn.Module, scale: float) -> None:
    """Make ``picks(pooler(x))`` equal ``projection(x)``, with the pooler's output scaled by ``scale``."""
    assert isinstance(projection, nn.Linear)
    dim = projection.out_features
    for parameter in (pooler.weight, pooler.bias, picks.weight):
        parameter.zero_()
    pooler.weight[:dim], pooler.bias[:dim] = scale * projection.weight, scale * projection.bias
    picks.weight[:, :dim] = torch.eye(dim) / scale


def plain_tokenizer(tokenizer: ReportTokenizer) -> PreTrainedTokenizerFast:
    """Our tokenizer that also does, to a sentence as one types it, what reading a report does: no punctuation, no capitals.

    Only the point in a word like v1.2 stays, which a report loses.
    """
    pieces = Tokenizer.from_str(tokenizer.pieces.to_str())
    steps = [
        normalizers.Replace("’", "'"),
        normalizers.Replace(Regex(r"(?<=\b[A-Za-z])\.(?=[A-Za-z]\.)|(?<=\b[A-Za-z]\.[A-Za-z])\."), ""),  # a.m. is am
        # what is left but words, points within numbers and apostrophes within words
        normalizers.Replace(Regex(r"[^\w\s.']|_|(?<!\d)\.|\.(?!\d)|(?<![^\W_])'|'(?![^\W_])"), " "),
        normalizers.Lowercase(),
    ]
    pieces.normalizer = normalizers.Sequence([*steps, *([pieces.normalizer] if pieces.normalizer else [])])
    return PreTrainedTokenizerFast(tokenizer_object=pieces, model_max_length=tokenizer.max_tokens, **tokenizer.names)


@torch.inference_mode()
def compare(made: VisionTextDualEncoderModel, model: DualEncoder, config: Config, vocabulary_size: int) -> None:
    """Raise ``UserError`` if the features of ``made`` are not the embeddings of ``model``."""
    (image_B1HW,), tokens = example_films(config, 3), example_tokens(vocabulary_size, 3, 24, 4)
    _, image_BD = FilmEncoder(model.image_encoder, model.image_projection).eval()(image_B1HW)
    found = {
        "films": (made.get_image_features(pixel_values=image_B1HW.expand(-1, 3, -1, -1)), image_BD),
        "texts": (
            made.get_text_features(input_ids=tokens[0], attention_mask=tokens[1].long()),
            model.text_encoder(*tokens)[1],
        ),
    }
    for name, (features, ours_BD) in found.items():
        gap = float((unit_rows(features.pooler_output) - ours_BD).abs().max())
        if not gap <= TOLERANCE:
            raise UserError(
                f"export: the features of {name} in transformers differ from ours by {gap:.1e}, more than {TOLERANCE}; leave out "
                "--transformers"
            )


def unit_rows(rows_BD: Tensor) -> Tensor:
    """Rows of length 1."""
    return nn.functional.normalize(rows_BD, dim=-1)
