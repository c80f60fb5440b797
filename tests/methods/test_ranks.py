"""Every method on several ranks: one global batch gives one loss and gradient, and every ZeRO stage trains alike.

Here on three ranks and over eight steps; ``tests/acceptance/test_ranks.py`` adds two ranks, twenty steps and the published
variants with a ResNet.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

from cmcgns import distributed
from cmcgns.config import METHODS, Config, MethodConfig
from cmcgns.methods import siglip
from cmcgns.methods.base import load_method
from cmcgns.train.engine import build_engine
from tests.jobs import REPOSITORY
from tests.ranks import run_on_ranks
from tests.small import VOCABULARY, losses_of, random_batch, small_config, small_model

GLOBAL_BATCH, STEPS = 6, 8
OTHERS = [name for name in METHODS if name != MethodConfig().name]
"""Methods but the default, whose engines are compared in tests/train/test_engine.py and whose variants are below."""
SMALLER: dict[str, dict[str, Any]] = {
    # five sentences in the longest report: the last one is cut
    "prior": {"objective__num_prototypes": 12, "objective__generated_sentences": 4, "objective__decoder_layers": 2},
}
"""Settings with which a method is fast enough here."""
CONFIGS = {
    **{name: {"method__name": name, **SMALLER.get(name, {})} for name in OTHERS},
    "convirt published": {
        "method__name": "convirt", "objective__same_text": "negatives", "objective__heads": "mlp",
        "objective__text_pooling": "max", "objective__caption": "sentence",
    },
    "clip by [CLS]": {"method__name": "clip", "objective__text_pooling": "cls"},
    "siglip positives": {
        "method__name": "siglip", "objective__same_text": "positives", "objective__text_pooling": "mean",
    },
    "gloria published": {
        "method__name": "gloria", "objective__regions": "before_last", "objective__word_layers": 2,
        "objective__same_text": "negatives", "objective__caption": "sentence", "objective__whole_words": True,
        "model__image_encoder": "resnet-tiny", "model__fixed_batch_statistics": True, "data__image_size": 64, "data__resize": 72,
    },
    "mgca published": {
        "method__name": "mgca", "objective__word_weights": "attention", "objective__separator": True,
        "objective__regions": "before_last", "objective__heads": "mlp", "objective__text_layers": 1,
        "objective__same_text": "negatives", "objective__whole_words": True, "model__image_encoder": "resnet-tiny",
        "model__fixed_batch_statistics": True, "data__image_size": 64, "data__resize": 72,
    },
    "mgca vit": {
        "method__name": "mgca", "objective__patch_weights": "attention", "objective__attended_patches": "raw",
        "objective__prototype_source": "pool", "objective__num_prototypes": 6,
    },
    "lovt published": {
        "method__name": "lovt", "objective__norm": "none", "objective__same_text": "negatives",
        "model__image_encoder": "resnet-tiny", "model__fixed_batch_statistics": True, "data__image_size": 64,
        "data__resize": 72,
    },
    "prior published": {
        "method__name": "prior", **SMALLER["prior"], "objective__reconstruct": "all", "objective__same_text": "negatives",
        "model__image_encoder": "resnet-tiny", "model__fixed_batch_statistics": True, "data__image_size": 64,
        "data__resize": 72,
    },
    **{f"xdc {each}": {"method__name": "xdc", "objective__variant": each} for each in ("sdc", "mdc", "cdc")},
    "xdc hybrid": {"method__name": "xdc", "objective__global_weight": 0.5, "objective__class_weights": "none"},
    "images100m": {
        # batch normalisation over 2 studies is not that over 6
        "method__name": "images100m", "objective__freeze_steps": 0, "objective__projector_norm": "none",
    },
    "images100m by k-means": {
        "method__name": "images100m", "objective__codes": "kmeans", "objective__prototypes": 6, "objective__embed": 32,
        "objective__projector_norm": "none",
    },
    "images100m with labels": {
        "method__name": "images100m", "objective__freeze_steps": 0, "objective__supervision": "labels",
        "objective__projector_norm": "none", "objective__classes": ("Edema", "Fracture", "Mass"),
    },
    "images100m with reports": {
        "method__name": "images100m", "objective__freeze_steps": 0, "objective__supervision": "reports",
        "objective__projector_norm": "none",
        "objective__instance_weight": 0.5, "objective__num_views": 3, "objective__queue": 8,
    },
    "vit": {},
    # fixed statistics, since batch normalisation over 2 studies is not that over 6
    "resnet": {
        "model__image_encoder": "resnet-tiny", "model__fixed_batch_statistics": True,
        "data__image_size": 64, "data__resize": 72,
    },
    "films": {
        "objective__local_negatives": "both", "objective__parts_weight": 0.5, "objective__balance": "uncertainty",
    },
    "published": {"objective__false_negatives": "margin", "objective__reconstruct": "all", "objective__margin_weight": 0.5},
}  # fmt: skip
QUICK = [*OTHERS, "vit", "films", "published", "xdc hybrid", "images100m with reports", "images100m with labels"]
"""Each method, and variants with collectives of their own; ``tests/acceptance/test_ranks.py`` has all."""
FLOAT32 = ("mgca vit",)
"""transformers computes the attention that it returns of a ViT with a softmax in float32."""
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch", "zero_stage": 0},
    **{f"zero{stage}": {"zero_stage": stage} for stage in (2, 3)},
}
Found = tuple[float, list[float], dict[str, Tensor]]


def config_of(name: str, **more: Any) -> Config:
    return small_config(**CONFIGS[name], **more)


def centroids() -> Tensor:
    return F.normalize(torch.randn(6, 32, generator=torch.Generator().manual_seed(1)), dim=1)


def rows_of_ranks() -> list[slice]:
    """The studies of each rank's part of the global batch."""
    size = GLOBAL_BATCH // distributed.world_size()
    return [slice(rank * size, (rank + 1) * size) for rank in range(distributed.world_size())]


def loss_and_gradients(name: str) -> Found:
    """Mean over ranks of the loss, its float32 parts, and the gradients as DeepSpeed averages them."""
    config = config_of(name)
    model, world = small_model(config).double(), distributed.world_size()
    model.train()
    rows, stage = rows_of_ranks(), config.objective.stages
    batch = random_batch(config, rows[distributed.rank()], ranks=rows)
    losses = losses_of(config, model(batch, stage), batch, centroids(), stage)
    losses.total.backward()
    gradients = {}
    frozen = load_method(config).frozen(stage)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and not key.startswith(frozen):  # a temperature may be fixed
            gradients[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if world > 1:
                dist.all_reduce(gradients[key])
    parts = distributed.all_reduce(torch.cat([losses.terms, losses.statistics])) / world
    total = distributed.all_reduce(losses.total) / world
    return float(total), parts.tolist(), {key: value / world for key, value in gradients.items()}


def all_of_them(names: list[str]) -> dict[str, Found]:
    return {name: loss_and_gradients(name) for name in names}


def trained(name: str, engine: str, text_encoder: str, steps: int) -> list[float]:
    """The loss of each step of one method with one engine, from a stream of batches that repeats after four."""
    world = distributed.world_size()
    config = small_config(
        method__name=name, num_workers=world, microbatch_size=GLOBAL_BATCH // world, global_batch_size=GLOBAL_BATCH,
        model__image_encoder=str(REPOSITORY / "examples" / "patchify.py"), model__text_encoder=text_encoder, **ENGINES[engine],
        **SMALLER.get(name, {}),
    )  # fmt: skip
    stage = config.objective.stages  # the last one trains everything
    built = build_engine(small_model(config), config.train, torch.device("cpu"), load_method(config).frozen(stage))
    built.module.train()
    losses, rows = [], rows_of_ranks()
    for step in range(steps):
        batch = random_batch(config, rows[distributed.rank()], step % 4, rows)
        loss = losses_of(config, built(batch, stage), batch, centroids(), stage).total
        built.backward(loss, last=True)
        built.step(1e-4)
        losses.append(float(distributed.all_reduce(loss)) / world)
    return losses


class LargestBlock(TorchDispatchMode):
    """The largest number of films x texts of any tensor with one row a film and one column a text."""

    pairs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dim() == 2 and 32 not in made.shape:
            self.pairs = max(self.pairs, made.numel())
        return made


def largest_block() -> int:
    """Pairs of the largest block of logits on this rank, in the forward and backward pass of SigLIP's loss for 5 studies."""
    siglip.TEXTS = 5
    image_BD, report_BD = (torch.randn(5, 32, requires_grad=True) for _ in range(2))
    with LargestBlock() as seen:
        siglip.sigmoid_loss(
            image_BD, report_BD, torch.arange(5), torch.ones(1), torch.zeros(1), "left_out"
        ).backward()  # fmt: skip
    return seen.pairs


def with_every_engine(name: str, text_encoder: str, steps: int) -> dict[str, list[float]]:
    return {engine: trained(name, engine, text_encoder, steps) for engine in ENGINES}


@pytest.fixture(scope="module", name="single")
def fixture_single() -> dict[str, Found]:
    return all_of_them(QUICK)


@pytest.fixture(scope="module", name="text_encoder")
def fixture_text_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text")
    # the smallest encoder: DeepSpeed takes its time for every parameter
    tiny = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(tiny, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", name="of_three")
def fixture_of_three() -> list[dict[str, Found]]:
    """What each of three ranks has."""
    return run_on_ranks(3, all_of_them, QUICK)


@pytest.mark.distributed
@pytest.mark.parametrize("name", QUICK)
def test_three_ranks_give_the_loss_and_gradient_of_one_whole_batch(
    name: str, single: dict[str, Found], of_three: list[dict[str, Found]]
) -> None:
    check_ranks(name, single, of_three)


def check_ranks(name: str, single: dict[str, Found], ranks: list[dict[str, Found]]) -> None:
    """Each of several ranks has the loss, its parts and the gradients of one rank with the whole batch."""
    expected_total, expected_parts, expected = single[name]
    method, stage = load_method(config_of(name)), config_of(name).objective.stages
    for total, parts, gradients in (rank[name] for rank in ranks):
        assert total == pytest.approx(expected_total, rel=1e-12)
        for part, theirs, ours in zip((*method.terms(stage), *method.statistics), expected_parts, parts, strict=True):
            # per-rank statistics: their mean is close, not equal
            if part not in ("patches_std", "attended_std", "report_std"):
                assert ours == pytest.approx(theirs, rel=1e-5), part  # logged as float32
        for key, gradient in gradients.items():
            # float64: sums in another order differ by about 1e-15 of the largest
            assert torch.allclose(gradient, expected[key], rtol=0, atol=1e-6 if name in FLOAT32 else 1e-10), key


@pytest.mark.parametrize("name", QUICK)
def test_every_parameter_takes_part_in_the_last_stage(name: str, single: dict[str, Found]) -> None:
    still = [key for key, gradient in single[name][2].items() if not gradient.any()]
    # attention is invariant to a bias that is equal for all keys
    assert all(key.endswith(("key.bias", "k_proj.bias")) for key in still), still


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["gloria", "prior", "xdc"])  # all in tests/acceptance/test_ranks.py
def test_every_zero_stage_trains_a_method_like_plain_torch(name: str, text_encoder: str) -> None:
    check_engines(name, text_encoder, STEPS)


def check_engines(name: str, text_encoder: str, steps: int) -> None:
    """Over ``steps`` steps of two ranks, every engine has the losses of plain torch, and they fall."""
    for losses_of_engine in run_on_ranks(2, with_every_engine, name, text_encoder, steps):
        plain = losses_of_engine["torch"]
        assert plain[-4:] < plain[:4]
        for engine, losses in losses_of_engine.items():
            assert losses == pytest.approx(plain, rel=1e-4), engine


@pytest.mark.distributed
def test_siglip_holds_logits_of_some_texts_at_a_time() -> None:
    assert run_on_ranks(2, largest_block) == [5 * 5, 5 * 5]
