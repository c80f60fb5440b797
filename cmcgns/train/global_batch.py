"""Losses over all microbatches of a step at once, with the memory of one: gradient caching (Gao et al. 2021, arXiv 2101.06983).

Every microbatch is embedded without gradients; the losses of the joined outputs give the gradient of each output; then each
microbatch is embedded again and its outputs pass these gradients on. The result is that of one large microbatch, except for what
a model computes over a microbatch inside its forward, such as batch normalisation.

The shape in the name of an output says how outputs are joined: B and n are the studies and sentences of a microbatch; S and T
are padded. An output without a shape, or without B and n in it, is the same for all microbatches, such as a temperature.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.base import Losses, in_full_precision

SHAPE = re.compile(r"_([A-Z0-9n]+)$")
JOINED, PADDED = "Bn", "ST"
"""Letters of a shape along which microbatches are joined, and to whose largest size they are padded."""


class CachedStep(NamedTuple):
    """The losses of all microbatches of a step, and what the second pass needs."""

    losses: Losses
    batch: ImageReportBatch
    """All microbatches as one."""
    backward: Callable[[], None]
    """Backward through the losses, then forward and backward of each microbatch. Collective."""


def cached_step(
    forward: Callable[[ImageReportBatch], Any],
    backward: Callable[[Tensor, bool], None],
    losses: Callable[[Any, ImageReportBatch], Losses],
    module: nn.Module,
    microbatches: Sequence[ImageReportBatch],
) -> CachedStep:
    """The losses of all ``microbatches`` at once. Collective.

    ``backward`` takes a loss and whether it is the last of the step; it averages gradients over the calls of a step.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    random, cached = [], []
    with torch.no_grad():
        for batch in microbatches:
            random.append(RandomState(batch.token_BT.device))
            cached.append(as_leaves(in_full_precision(forward(batch))))
    whole = join_batches(microbatches)
    found = losses(join_outputs(cached, whole.studies), whole)

    def run_backward() -> None:
        found.total.backward()
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
        for i, batch in enumerate(microbatches):
            random[i].restore()
            outputs = in_full_precision(forward(batch))
            products = [
                (part * leaf.grad).sum()
                for part, leaf in zip(outputs, cached[i], strict=True)
                if isinstance(part, Tensor) and part.requires_grad and leaf.grad is not None
            ]
            # the engine divides by the number of microbatches
            backward(torch.stack(products).sum() * len(microbatches), i == len(microbatches) - 1)

    return CachedStep(found, whole, run_backward)


class RandomState:
    """The state of torch's random numbers, of the CPU and of ``device``, when this was made."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cpu = device, torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Draw the same numbers again."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


def as_leaves(outputs: Any) -> Any:
    """``outputs`` without their graph; floating-point parts collect gradients."""
    parts = (
        part.detach().requires_grad_(part.is_floating_point()) if isinstance(part, Tensor) else part for part in outputs
    )
    return type(outputs)(*parts)


def join_outputs(outputs: Sequence[Any], studies: int) -> Any:
    """Outputs of microbatches as those of one with ``studies``; gradients flow back to each."""
    kind = type(outputs[0])
    return kind(*(joined(name, [getattr(each, name) for each in outputs], studies) for name in kind._fields))


def join_batches(batches: Sequence[ImageReportBatch]) -> ImageReportBatch:
    """Microbatches as one, which is not sliced by length."""
    studies, size_S = sum(batch.studies for batch in batches), max(b.sentence_mask_BS.shape[1] for b in batches)
    rows, before = [], 0
    for batch in batches:
        own_S = batch.sentence_mask_BS.shape[1]
        study_n = batch.sentence_row_n.div(own_S, rounding_mode="floor") + before
        rows.append(study_n * size_S + batch.sentence_row_n.remainder(own_S))
        before += batch.studies
    unsliced = [batch._replace(by_length_B=None, slice_tokens=(), rank_sentences=()) for batch in batches]
    whole: ImageReportBatch = join_outputs(unsliced, studies)
    counts = tuple(sum(ranks) for ranks in zip(*(batch.rank_sentences for batch in batches), strict=True))
    return whole._replace(sentence_row_n=torch.cat(rows), rank_sentences=counts)


def joined(name: str, parts: Sequence[Any], studies: int) -> Any:
    """One part of the microbatches' outputs, joined as the shape in its name says."""
    first = parts[0]
    if not isinstance(first, Tensor):
        return first
    found = SHAPE.search(name)
    letters = found[1] if found else ""
    place = next((letters.index(letter) for letter in JOINED if letter in letters), None)
    if place is None:
        if not letters and first.dim() and 1 < first.shape[0] == studies // len(parts):
            raise ValueError(f"output {name} needs its shape in its name, such as {name}_BD, to join microbatches")
        return first
    if len(letters) != first.dim():
        raise ValueError(f"output {name} has {first.dim()} dimensions, {tuple(first.shape)}, and not those in its name")
    sizes = [max(part.shape[axis] for part in parts) for axis in range(first.dim())]
    fill = -1 if name.startswith("sentence_of_") else 0  # of a token or word in no sentence
    padded = []
    for part in parts:
        missing = [sizes[axis] - part.shape[axis] if letters[axis] in PADDED else 0 for axis in range(first.dim())]
        widths = [width for size in reversed(missing) for width in (0, size)]
        padded.append(F.pad(part, widths, value=fill) if any(missing) else part)
    return torch.cat(padded, dim=place)
