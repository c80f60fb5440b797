"""What a step should take on 8, 64 and 512 GPUs, on paper: `python -m tests.benchmarks.scaling`.

ResNet-50 with a BERT-base, ZeRO-1 or 2 in bf16, 64 studies a GPU, no accumulation: weak scaling. Operations are counted by torch,
parameters on the model; what is assumed stands in ``Machine`` and in the constants, what was measured says so.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cmcgns.data.batch import GPU_SLICES
from tests.benchmarks.gpu_step import FULL, Shape, build_run, flops_per_step
from tests.methods.fake_device import tensors

COUNTED, SLICED = 2, 16
"""Studies of the batch whose operations are counted (they grow with the studies, but for the losses), and of the batch whose
launches are (enough for two passes over reports)."""
STUDIES, SENTENCES, WIDTH, BYTES, HALF = 64, 6, 768, 4, 2
"""Of a GPU's batch; of a study; numbers of a feature; bytes of a number. Features and gradients of the layers that autocast
computes in bf16 travel as bf16; gradients of features, film negatives' scores and weights as fp32."""
IN_HALF = (nn.Linear, nn.Conv2d)
LAUNCH_S = 5e-6
"""Assumed: time of an operator's launch. A step takes at least that of all of them."""
PATCHES = 49
"""Of a film, for film negatives: ResNet-50 at 224 pixels."""
UTILISATION, WIRE = 0.35, 0.8
"""Assumed: share of the arithmetic peak that encoders reach, and of a card's rate that collectives reach."""
BACKWARD = 2 / 3
"""Share of the arithmetic that is the backward pass, behind which gradients can be reduced."""
BANK, ITERATIONS, REFRESH, ACTORS = 262_144, 20, 100, 4
"""Of jobs/configs/mimic_cxr.yaml; the most iterations of a re-clustering."""
MEASURED_PASS_S, MEASURED_ROWS, MEASURED_WIDTH, MEASURED_THREADS = 0.291, 400_000, 256, 2
"""Measured (README): an iteration of the pool at K=128."""
MEASURED_DECODES, MEASURED_PREPARED = 72, 3814 / 2
"""Measured (README): films a second of a core, JPEGs of 2500 x 3000 and a prepared set."""
GIGA = 1e9


@dataclass(frozen=True)
class Machine:
    """A host of GPUs, by its maker's figures."""

    name: str
    gpus: int
    peak: float
    """bf16 operations a second of a GPU."""
    plain: float
    """fp32 operations a second of a GPU, for the losses."""
    network: float
    """Bytes a second of all of a host's cards."""


MACHINES = (
    Machine("g6.12xlarge, 4 x L4, 40 Gbit/s", 4, 121e12, 30e12, 40e9 / 8),
    Machine("8 x H100 or H200, 3,200 Gbit/s", 8, 989e12, 67e12, 3200e9 / 8),
)


@dataclass(frozen=True)
class Step:
    """Seconds and bytes of one step."""

    compute_s: float
    launches_s: float
    losses_s: float
    gather_s: float
    reduce_s: float
    """Gradients, reduced for all though each rank keeps but its own."""
    weights_s: float
    """Their new weights handed to everyone."""
    pushed: float
    """Bytes that go to the clustering pool."""

    def seconds(self, overlap: bool) -> float:
        backward = BACKWARD * self.compute_s
        hidden = min(backward, self.reduce_s) if overlap else 0.0
        work = max(self.compute_s + self.losses_s, self.launches_s)
        return work + self.gather_s + self.reduce_s - hidden + self.weights_s


@dataclass(frozen=True)
class Counts:
    """What is counted on the model."""

    operations: float
    """Of a study in stage 2, forwards and backwards."""
    parameters: int
    in_half: int
    """Those whose gradients travel as bf16."""
    launches: int
    """Operators of a step that write memory."""


def step(machine: Machine, gpus: int, counts: Counts) -> Step:
    """A step of ``gpus``."""
    hosts = max(gpus // machine.gpus, 1)
    across, wire = (hosts - 1) / hosts, machine.network * WIRE
    rows = STUDIES * SENTENCES
    # images and reports of all studies and all attended sentences come to every host, their gradients go back
    features = gpus * (rows + 2 * STUDIES) * WIDTH * (HALF + BYTES) * across
    gradients = counts.in_half * HALF + (counts.parameters - counts.in_half) * BYTES
    return Step(
        compute_s=STUDIES * counts.operations / (machine.peak * UTILISATION),
        launches_s=counts.launches * LAUNCH_S,
        losses_s=3 * 2 * rows * gpus * rows * WIDTH / (machine.plain * UTILISATION),
        gather_s=features / wire,
        # an all-reduce, as measured: DeepSpeed's buckets hold several ranks' gradients, and each rank keeps its own
        reduce_s=2 * gradients * across / wire,
        weights_s=counts.parameters * BYTES * across / wire,
        pushed=gpus * rows * WIDTH * BYTES,
    )


@dataclass(frozen=True)
class FilmNegatives:
    """What film negatives add to a step."""

    losses_s: float
    sentences_bytes: float
    """Queries and sentences of all ranks come to each GPU, their gradients go back, and so do scores."""
    patches_bytes: float
    """If keys and values of the patches travelled instead."""
    wire: float

    @property
    def gather_s(self) -> float:
        return self.sentences_bytes / self.wire


def film_negatives(machine: Machine, gpus: int) -> FilmNegatives:
    """Per host, like the gathers of ``step``: its GPUs share what arrives."""
    hosts = max(gpus // machine.gpus, 1)
    across, rows = (hosts - 1) / hosts, STUDIES * SENTENCES
    scores = 2 * rows * gpus * STUDIES * BYTES * machine.gpus
    return FilmNegatives(
        losses_s=3 * 2 * 2 * rows * gpus * STUDIES * PATCHES * WIDTH / (machine.plain * UTILISATION),
        sentences_bytes=(gpus * rows * 2 * WIDTH * (HALF + BYTES) + scores) * across,
        patches_bytes=gpus * STUDIES * PATCHES * 2 * WIDTH * (HALF + BYTES) * across,
        wire=machine.network * WIRE,
    )


def clustering_s(threads: int) -> float:
    """Seconds of a whole re-clustering, beside the training, by the measured time of an iteration."""
    one = MEASURED_PASS_S * MEASURED_THREADS * (BANK / MEASURED_ROWS) * (WIDTH / MEASURED_WIDTH)
    return ITERATIONS * one / threads


class Launches(TorchDispatchMode):
    """Counts operators that write memory; those that give a view do not run on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {id(each.untyped_storage()) for each in tensors([args, kwargs or {}])}
        is_view = all(id(each.untyped_storage()) in given for each in tensors(made))
        self.number += not is_view or func._schema.is_mutable
        return made


def count_launches(shape: Shape, slices: int) -> int:
    """Launches of a step but for the optimizer's, which is fused; reports in as many ``slices``."""
    run = build_run(replace(shape, studies=SLICED), "bf16", "torch", torch.device("cpu"), slices)
    with Launches() as launched:
        run.forward_backward()
    return launched.number


def count(shape: Shape = FULL[0]) -> Counts:
    """Counts of the model of ``shape``."""
    run = build_run(replace(shape, studies=COUNTED), "fp32", "torch", torch.device("cpu"))
    layers = [layer for layer in run.engine.module.modules() if isinstance(layer, IN_HALF)]
    return Counts(
        flops_per_step(run) / COUNTED,
        sum(parameter.numel() for parameter in run.engine.module.parameters()),
        sum(parameter.numel() for layer in layers for parameter in layer.parameters(recurse=False)),
        count_launches(shape, GPU_SLICES),
    )


def main() -> None:
    """Print the tables of docs/scaling.md."""
    counts = count()
    a_pass = counts.launches - count_launches(FULL[0], GPU_SLICES - 1)
    print(
        f"{counts.operations / GIGA:.0f} GFLOP a study, {counts.parameters / 1e6:.0f} M parameters, {counts.in_half / 1e6:.0f} M "
        f"in bf16; {counts.launches} launches, {a_pass} of them for each pass over reports"
    )
    print(f"a re-clustering of {BANK} rows: {clustering_s(2 * ACTORS):.1f} s on {ACTORS} actors of 2 threads")
    names = ("GPUs", "encoders", "launches", "losses", "gather", "gradients", "weights", "step", "overlapped", "efficiency",
             "to the pool", "refresh every", "films/s", "cores raw", "cores prepared")  # fmt: skip
    for machine in MACHINES:
        print(f"\n{machine.name}\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
        alone = None
        for gpus in (8, 64, 512):
            found = step(machine, gpus, counts)
            plain, overlapped = found.seconds(False), found.seconds(True)
            alone = alone or max(found.compute_s + found.losses_s, found.launches_s)
            films = gpus * STUDIES / overlapped
            milliseconds = (
                found.compute_s, found.launches_s, found.losses_s, found.gather_s, found.reduce_s, found.weights_s, plain,
                overlapped,
            )  # fmt: skip
            cells = [
                f"{gpus}", *(f"{1000 * s:.0f}" for s in milliseconds), f"{alone / overlapped:.0%}",
                f"{found.pushed / 2**20:.0f} MiB", f"{REFRESH * overlapped:.0f} s", f"{films:,.0f}",
                f"{films / MEASURED_DECODES:,.0f}", f"{films / MEASURED_PREPARED:,.1f}",
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |")
        print(
            "\n| GPUs | film losses, ms | gather, ms | sentences, MiB | keys and values, MiB |\n|---|---|---|---|---|"
        )
        for gpus in (8, 64, 512):
            more = film_negatives(machine, gpus)
            print(
                f"| {gpus} | {1000 * more.losses_s:.0f} | {1000 * more.gather_s:.0f} | {more.sentences_bytes / 2**20:,.0f} | "
                f"{more.patches_bytes / 2**20:,.0f} |"
            )


if __name__ == "__main__":
    main()
