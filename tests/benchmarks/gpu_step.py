"""A step of the full models on one device, for `tests.gpu_day` and `scaling`. Needs torch and transformers alone.

Stage 2 with all four losses and centroids in force. B studies, T tokens, S sentences, P patches.
"""

import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.bare_settings import Config

# isort: split
from cmcgns.data.batch import ImageReportBatch, pad_reports
from cmcgns.methods.base import Method, load_method
from cmcgns.train.engine import Engine, build_engine

BATCHES = 4
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362}
"""Dense bf16 peaks by part of the device's name, from the makers' data sheets (SXM parts)."""


@dataclass(frozen=True)
class Shape:
    """Encoders and sizes of one line of the table."""

    image_encoder: str
    text_encoder: str
    studies: int = 64
    image_size: int = 224
    tokens: int = 128
    sentences: int = 6
    embed_dim: int = 768
    num_clusters: int = 128
    vocabulary: int = 28_996
    """Entries of Bio_ClinicalBERT's."""
    loss_steps: int = 20
    """Steps whose losses are compared."""


FULL = (Shape("resnet-50", "bert-base"), Shape("vit-base", "bert-base"))
SMALL = tuple(
    Shape(
        name,
        "bert-tiny",
        studies=2,
        image_size=64,
        tokens=32,
        sentences=4,
        embed_dim=64,
        num_clusters=8,
        vocabulary=1000,
        loss_steps=4,
    )
    for name in ("resnet-tiny", "vit-tiny")
)
"""For a look without a GPU."""


def settings(
    shape: Shape,
    precision: str,
    engine: str,
    device: torch.device,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
) -> Config:
    """One rank, no accumulation, no dropout: two precisions then differ by rounding alone. ``model`` and ``train``: more
    settings."""
    return Config.model_validate(
        {
            "data": {"image_size": shape.image_size, "resize": shape.image_size, "max_tokens": shape.tokens},
            "model": {
                "image_encoder": shape.image_encoder, "text_encoder": shape.text_encoder,
                "embed_dim": shape.embed_dim, "dropout": 0.0, **(model or {}),
            },
            "objective": {"num_clusters": shape.num_clusters},
            "train": {
                "num_workers": 1, "microbatch_size": shape.studies, "global_batch_size": shape.studies,
                "engine": engine, "zero_stage": 1 if engine == "deepspeed" else 0, "precision": precision,
                "use_gpu": device.type == "cuda", "stage1_steps": 1, "stage2_steps": 1, "warmup_steps": 0,
                **(train or {}),
            },
        }
    )  # fmt: skip


def random_batches(shape: Shape, device: torch.device, slices: int | None = None) -> list[ImageReportBatch]:
    """Batches of reports as long as the shape says, in one pass; with ``slices`` of all lengths up to that, in so many passes."""
    generator, number = torch.Generator().manual_seed(0), np.random.default_rng(0)
    studies, sentences = shape.studies, shape.sentences

    def batch() -> ImageReportBatch:
        draw = lambda high, *size: torch.randint(5, high, size, generator=generator)
        least = shape.tokens if slices is None else 2 * sentences + 2
        lengths = number.integers(least, shape.tokens + 1, studies)
        reports = pad_reports(
            [number.integers(5, shape.vocabulary, length) for length in lengths],
            [sentence_of_token(length, sentences) for length in lengths],
            np.full(studies, sentences),
            0,
            slices or 1,
        )
        return ImageReportBatch(
            image_B1HW=torch.rand(studies, 1, shape.image_size, shape.image_size, generator=generator) * 2 - 1,
            **reports._asdict(),
            sentence_hash_n=draw(2**40, studies * sentences),
            report_hash_B=draw(2**40, studies),
            draw_key_B=draw(2**40, studies),
            rank_sentences=(studies * sentences,),
        ).to(device)

    return [batch() for _ in range(BATCHES)]


def sentence_of_token(length: int, sentences: int) -> np.ndarray:
    """Sentences of equal length, between [CLS] and [SEP]."""
    owner_T = (np.arange(length) - 1) * sentences // (length - 2)
    owner_T[0] = owner_T[-1] = -1
    return owner_T


@dataclass
class Run:
    """An engine with its batches: one call is one optimizer step."""

    engine: Engine
    method: Method[Any]
    batches: list[ImageReportBatch]
    centroids_KD: Tensor
    losses: list[Tensor]

    def forward_backward(self) -> None:
        """Gradients of the next batch."""
        batch = self.batches[len(self.losses) % len(self.batches)]
        found = self.method.losses(self.engine(batch, 2), batch, {"sentences": self.centroids_KD}, 2, 1)
        self.losses.append(found.total.detach())
        self.engine.backward(found.total, last=True)

    def __call__(self) -> None:
        self.forward_backward()
        self.engine.step(1e-5)


def build_run(
    shape: Shape, precision: str, engine: str, device: torch.device, slices: int | None = None, **options: Any
) -> Run:
    """The same weights and batches for every precision; ``options`` as for ``settings``."""
    torch.manual_seed(0)
    config = settings(shape, precision, engine, device, **options)
    method = load_method(config)
    model = method.build_model(shape.vocabulary)
    centroids_KD = F.normalize(torch.randn(shape.num_clusters, shape.embed_dim), dim=1).to(device)
    built = build_engine(model, config.train, device)
    built.module.train()
    return Run(built, method, random_batches(shape, device, slices), centroids_KD, [])


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_step(run: Callable[[], None], steps: int, device: torch.device) -> float:
    """Mean over ``steps`` steps after three to warm up."""
    for _ in range(3):
        run()
    wait(device)
    before = time.perf_counter()
    for _ in range(steps):
        run()
    wait(device)
    return (time.perf_counter() - before) / steps


def flops_per_step(run: Run) -> int:
    """Floating-point operations of one forward and backward, as torch counts matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak_tflops(device: torch.device) -> int | None:
    """bf16 peak of the device; None where it is not listed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def choose_engine(device: torch.device) -> str:
    """``deepspeed`` where it is installed, else ``torch``; DeepSpeed's process group is made here."""
    if importlib.util.find_spec("deepspeed") is None:
        return "torch"
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return "deepspeed"
