"""Heads and losses of every method, forward and backward, against the bare matrix products that they call.

No encoders and no decoders: their place is taken by ready features. What a step multiplies is recorded as it runs, and multiplied
again with nothing else. B studies, P patches, T tokens, S sentences, C channels of both encoders, D embedding.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from cmcgns.config import Config
from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.base import BankCentroids, load_method
from cmcgns.methods.prior import model as prior_model
from cmcgns.methods.prior.matching import matches
from cmcgns.models import dual_encoder
from cmcgns.models.backbones import PROBE_SIZE
from tests.benchmarks.gpu_step import Shape, random_batches
from tests.benchmarks.measure import Line, interleaved, peak_in_child, ratio_of_medians, where

STRIDE = 4
"""Pixels of a patch: films are not read, so they may be small."""
ROUNDS = 7
METHODS = {
    "cm-cgns": 1, "infonce": 1, "convirt": 1, "clip": 1, "siglip": 1, "gloria": 1, "mgca": 1, "lovt": 1, "xdc": 1,
    "images100m": 1, "prior": 3,
}  # fmt: skip
"""The methods, and the stage of each."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of one table."""

    studies: int = 64
    side: int = 7
    """Patches along a side of a film."""
    sentences: int = 6
    tokens: int = 64
    channels: int = 768
    embed_dim: int = 768


FULL = Sizes()
SMALL = Sizes(studies=4, side=3, sentences=3, tokens=16, channels=32, embed_dim=32)


class ReadyBackbone(nn.Module):
    """Stands for a backbone: its features are ready, and receive gradients."""

    supports_gradient_checkpointing = False

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.made = nn.Parameter(torch.randn(*shape))
        self.config = SimpleNamespace(
            hidden_size=shape[-1], num_hidden_layers=1, model_type="", _attn_implementation=""
        )


class ReadyFilms(ReadyBackbone):
    """Feature maps of films, or of their views."""

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        if pixel_values.shape[-1] == PROBE_SIZE:  # asks for the layout
            side = PROBE_SIZE // STRIDE
            return SimpleNamespace(last_hidden_state=pixel_values.new_zeros(1, self.made.shape[1], side, side))
        return SimpleNamespace(last_hidden_state=self.made[: len(pixel_values)])


class ReadyTokens(ReadyBackbone):
    """Token states of reports."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.made[:, : input_ids.shape[1]])


class ReadyDecoder(nn.Module):
    """Stands for a decoder: what it makes is ready, and receives gradients."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.made = nn.Parameter(torch.randn(*shape))

    def forward(self, *_: Tensor) -> Tensor:
        return self.made


def build_step(name: str, sizes: Sizes = FULL) -> Callable[[], None]:
    """Forward and backward of the heads and losses of the method ``name``; for PRIOR with the assignment given."""
    torch.manual_seed(0)
    method, model, batch = build(name, sizes)
    stage, centroids = METHODS[name], ready_centroids(method.banks)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with patch.object(prior_model, "matches", given_matches):
            method.losses(model(batch, stage), batch, centroids, stage, 100).total.backward()

    return step


def build(name: str, sizes: Sizes) -> tuple[Any, Any, ImageReportBatch]:
    """Method, model on ready features, and batch."""
    channels, image_size = sizes.channels, sizes.side * STRIDE
    config = config_of(name, sizes)
    method = load_method(config)
    films = ReadyFilms(2 * sizes.studies, channels, sizes.side, sizes.side)
    films.config.hidden_size = channels
    with ExitStack() as stack:
        for what, made in (("image", films), ("text", ReadyTokens(sizes.studies, sizes.tokens, channels))):
            stack.enter_context(patch.object(dual_encoder, f"build_{what}_backbone", lambda *_, made=made: made))
        model = method.build_model(1000).train()
    if name == "prior":
        model.decoder = ReadyDecoder(sizes.studies, 1, image_size, image_size)
        model.sentence_decoder = ReadyDecoder(sizes.studies, config.objective.generated_sentences, sizes.embed_dim)
    shape = Shape("", "", sizes.studies, image_size, sizes.tokens, sizes.sentences, sizes.embed_dim, vocabulary=1000)
    [batch, *_] = random_batches(shape, torch.device("cpu"))
    batch = batch._replace(by_length_B=None, slice_tokens=())
    if method.views is not None:
        batch = batch._replace(view_VB1HW=torch.stack([batch.image_B1HW] * method.views[0]))
    return method, model, batch


def config_of(name: str, sizes: Sizes) -> Config:
    """Default settings of the method ``name`` for one rank."""
    size, stages = sizes.side * STRIDE, {f"stage{stage}_steps": int(stage <= METHODS[name]) for stage in (1, 2, 3)}
    small = {"prior": {"num_prototypes": 16, "decoder_heads": 1}} if sizes == SMALL else {}
    return Config.model_validate(
        {
            "data": {"image_size": size, "resize": size, "max_tokens": max(sizes.tokens, 64)},
            "model": {"embed_dim": sizes.embed_dim, "dropout": 0.0},
            "method": {"name": name},
            "objective": small.get(name, {}),
            "train": {
                "num_workers": 1, "microbatch_size": sizes.studies, "global_batch_size": sizes.studies, "warmup_steps": 0,
                **stages,
            },
        }
    )  # fmt: skip


def ready_centroids(banks: Any) -> BankCentroids:
    """Random centroids of every bank, with equal members."""
    rows = {bank.name: F.normalize(torch.randn(bank.num_clusters, bank.dim), dim=1) for bank in banks}
    return BankCentroids(rows, {bank.name: torch.ones(bank.num_clusters) for bank in banks})


def given_matches(generated_BQD: Tensor, target_BQD: Tensor) -> Tensor:
    """An assignment that nobody had to look for."""
    return torch.arange(generated_BQD.shape[1]).expand(generated_BQD.shape[:2])


def build_assignment(sizes: Sizes = FULL) -> Callable[[], None]:
    """PRIOR's assignment, the only loop over studies: scipy solves one problem for each."""
    torch.manual_seed(0)
    rows = torch.randn(2, sizes.studies, 16, sizes.embed_dim)

    def run() -> None:
        matches(*rows)

    return run


class Operand(NamedTuple):
    """A matrix, or a batch of them, as it lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def random(self) -> Tensor:
        if 0 in self.stride:  # expanded
            return torch.randn(self.shape)
        return torch.empty_strided(self.shape, self.stride).normal_()


class Recorder(TorchDispatchMode):
    """Counts the matrix products of what runs in it by their operands."""

    places = {
        torch.ops.aten.mm.default: 0, torch.ops.aten.bmm.default: 0, torch.ops.aten.mv.default: 0,
        torch.ops.aten.addmm.default: 1, torch.ops.aten.baddbmm.default: 1, torch.ops.aten.addmv.default: 1,
    }  # fmt: skip
    """Products, and the place of their left side among the arguments: what they are added to is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[Operand, Operand]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.places:
            first = self.places[func]
            left, right = (Operand(tuple(each.shape), each.stride()) for each in args[first : first + 2])
            self.products[left, right] += 1
        return func(*args, **(kwargs or {}))


def products_of(step: Callable[[], None]) -> Counter[tuple[Operand, Operand]]:
    """The matrix products of one ``step`` by their operands, those inside fused attention included."""
    with sdpa_kernel(SDPBackend.MATH), Recorder() as recorder:
        step()
    return recorder.products


def gflop(products: Counter[tuple[Operand, Operand]]) -> float:
    """Billions of floating-point operations of ``products``."""
    columns = lambda right, left: right.shape[-1] if len(right.shape) == len(left.shape) else 1
    return sum(
        2 * number * torch.Size(left.shape).numel() * columns(right, left) / 1e9
        for (left, right), number in products.items()
    )


def build_products(products: Counter[tuple[Operand, Operand]]) -> Callable[[], None]:
    """The bare ``products`` and nothing else."""
    operands = [(left.random(), right.random(), number) for (left, right), number in products.items()]

    def run() -> None:
        for left, right, number in operands:
            for _ in range(number):
                torch.matmul(left, right)

    return run


def lines(sizes: Sizes = FULL, rounds: int = ROUNDS, memory: bool = True) -> Iterator[Line]:
    """A line for each method, and one for PRIOR's assignment."""
    for name in METHODS:
        step = build_step(name, sizes)
        products = products_of(step)
        seconds = interleaved({"ours": step, "products": build_products(products)}, rounds)
        ours, bare = (1000 * median(seconds[key]) for key in ("ours", "products"))
        build = f"build_step({name!r}, {sizes!r})"
        mib = f"  {peak_in_child('tests.benchmarks.method_heads', build):.0f} MiB" if memory else ""
        ratio = ratio_of_medians(seconds, "ours", "products")
        yield Line(
            f"{name}, stage {METHODS[name]}: ms, of {gflop(products):.1f} GFLOP bare ms, ratio",
            f"{ours:.1f}  {bare:.1f}  {ratio:.2f}{mib}",
        )
    seconds = interleaved({"assignment": build_assignment(sizes)}, rounds)
    yield Line(f"prior's assignment, {sizes.studies} studies", f"{1000 * median(seconds['assignment']):.1f} ms")


if __name__ == "__main__":
    print(where())
    print(FULL)
    for line in lines(rounds=int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS):
        print(line, flush=True)
