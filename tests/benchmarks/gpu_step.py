"""A step of the full models on one GPU in bf16, beside fp32: `make accept-gpu`.

Needs torch and transformers alone: without DeepSpeed the plain engine runs, and the table says so. Stage 2 with
all four losses and centroids in force. B studies, T tokens, S sentences, P patches.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.bare_settings import Config

# isort: split
from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.base import Method, load_method
from cmcgns.train.engine import Engine, build_engine
from tests.benchmarks.measure import Line, where

MOST_DIFFERENCE = 2e-2
"""Largest relative difference between the losses of bf16 and of fp32."""
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


def settings(shape: Shape, precision: str, engine: str, device: torch.device) -> Config:
    """One rank, no accumulation, no dropout: two precisions then differ by rounding alone."""
    return Config.model_validate(
        {
            "data": {"image_size": shape.image_size, "resize": shape.image_size, "max_tokens": shape.tokens},
            "model": {
                "image_encoder": shape.image_encoder, "text_encoder": shape.text_encoder,
                "embed_dim": shape.embed_dim, "dropout": 0.0,
            },
            "objective": {"num_clusters": shape.num_clusters},
            "train": {
                "num_workers": 1, "microbatch_size": shape.studies, "global_batch_size": shape.studies,
                "engine": engine, "zero_stage": 1 if engine == "deepspeed" else 0, "precision": precision,
                "use_gpu": device.type == "cuda", "stage1_steps": 1, "stage2_steps": 1, "warmup_steps": 0,
            },
        }
    )  # fmt: skip


def random_batches(shape: Shape, device: torch.device) -> list[ImageReportBatch]:
    """Batches of whole reports: every sentence as long as the others."""
    generator = torch.Generator().manual_seed(0)
    studies, tokens, sentences = shape.studies, shape.tokens, shape.sentences
    owner_T = (torch.arange(tokens) - 1) * sentences // (tokens - 2)
    owner_T[0] = owner_T[-1] = -1

    def batch() -> ImageReportBatch:
        draw = lambda high, *size: torch.randint(5, high, size, generator=generator)
        return ImageReportBatch(
            image_B1HW=torch.rand(studies, 1, shape.image_size, shape.image_size, generator=generator) * 2 - 1,
            token_BT=draw(shape.vocabulary, studies, tokens),
            token_mask_BT=torch.ones(studies, tokens, dtype=torch.bool),
            sentence_of_token_BT=owner_T.expand(studies, -1),
            sentence_mask_BS=torch.ones(studies, sentences, dtype=torch.bool),
            sentence_row_n=torch.arange(studies * sentences),
            sentence_hash_n=draw(2**40, studies * sentences),
            report_hash_B=draw(2**40, studies),
            draw_key_B=draw(2**40, studies),
            rank_sentences=(studies * sentences,),
        ).to(device)

    return [batch() for _ in range(BATCHES)]


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


def build_run(shape: Shape, precision: str, engine: str, device: torch.device) -> Run:
    """The same weights and batches for every precision."""
    torch.manual_seed(0)
    config = settings(shape, precision, engine, device)
    method = load_method(config)
    model = method.build_model(shape.vocabulary)
    centroids_KD = F.normalize(torch.randn(shape.num_clusters, shape.embed_dim), dim=1).to(device)
    built = build_engine(model, config.train, device)
    built.module.train()
    return Run(built, method, random_batches(shape, device), centroids_KD, [])


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


def measure(shape: Shape, engine: str, device: torch.device, steps: int) -> list[Line]:
    """The lines of one pair of encoders."""
    losses: dict[str, list[float]] = {}
    lines = [
        Line(f"{shape.image_encoder} + {shape.text_encoder}, {shape.studies} studies, {shape.tokens} tokens", engine)
    ]
    for precision in ("fp32", "bf16"):
        run = build_run(shape, precision, engine, device)
        for _ in range(shape.loss_steps):
            run()
        losses[precision] = torch.stack(run.losses).tolist()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step_s = seconds_per_step(run, steps, device)
        lines.append(Line(f"  {precision}", f"{shape.studies / step_s:.1f} studies/s"))
        if precision == "bf16":
            tflops, peak = flops_per_step(run) / step_s / 1e12, peak_tflops(device)
            share = f"{tflops / peak:.1%} of {peak}" if peak else "peak of this device is not listed"
            lines.append(Line("  bf16 MFU", f"{tflops:.3g} TFLOP/s, {share}"))
        if device.type == "cuda":
            lines.append(Line("    peak memory", f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"))
        del run
    apart = max(abs(bf16 - fp32) / abs(fp32) for bf16, fp32 in zip(losses["bf16"], losses["fp32"], strict=True))
    name = f"  losses of {shape.loss_steps} steps, bf16 from fp32"
    lines.append(Line(name, f"{apart:.1e} relative", f"<= {MOST_DIFFERENCE:g}", apart <= MOST_DIFFERENCE))
    return lines


def choose_engine(device: torch.device) -> str:
    """``deepspeed`` where it is installed, else ``torch``; DeepSpeed's process group is made here."""
    if importlib.util.find_spec("deepspeed") is None:
        return "torch"
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return "deepspeed"


def main() -> int:
    """Print the table; 1 where bf16 leaves fp32, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny encoders, for a look without a GPU")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; a look without one: --device=cpu --small", file=sys.stderr)
        return 2
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device("cpu")
    # fp32 means fp32: TF32 would hide what bf16 costs
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    engine = choose_engine(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}; {where()}")
    print("engine: DeepSpeed ZeRO-1" if engine == "deepspeed" else "engine: plain torch, as DeepSpeed is not installed")
    table = [line for shape in (SMALL if given.small else FULL) for line in measure(shape, engine, device, given.steps)]
    print(*table, sep="\n")
    return int(any(line.good is False for line in table))


if __name__ == "__main__":
    sys.exit(main())
