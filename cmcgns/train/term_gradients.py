"""How the terms of the loss pull at the encoders: the norm of each term's gradient and the cosines between them."""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from cmcgns import distributed

SHARED = ("image_encoder.", "text_encoder.")
"""Name prefixes of the parameters that all terms share."""


def term_gradients(module: nn.Module, weighted: Mapping[str, Tensor]) -> dict[str, float]:
    """``gradient_norm_TERM`` of each weighted term and ``gradient_cosine_TERM_TERM`` of each pair, over both encoders and one
    microbatch of all ranks. Does not touch the gradients of the step. Collective."""
    shared = [
        parameter
        for name, parameter in module.named_parameters()
        if name.startswith(SHARED) and parameter.requires_grad
    ]
    # rank by rank the same order: a term's backward pass gathers
    gradients = {name: _gradient(term, shared) for name, term in weighted.items() if term.requires_grad}
    short = {name: name.removeprefix("loss_") for name in gradients}
    norms = {name: gradient.norm() for name, gradient in gradients.items()}
    found = {f"gradient_norm_{short[name]}": float(norm) for name, norm in norms.items()}
    for one, other in combinations(gradients, 2):
        cosine = gradients[one] @ gradients[other] / (norms[one] * norms[other]).clamp(min=1e-30)
        found[f"gradient_cosine_{short[one]}_{short[other]}"] = float(cosine)
    return found


def _gradient(term: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """The gradient of a term with respect to all parameters as one vector, averaged over ranks as the step does."""
    parts = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    flat = [
        torch.zeros_like(parameter).flatten() if part is None else part.flatten()
        for part, parameter in zip(parts, parameters, strict=True)
    ]
    return distributed.all_reduce(torch.cat(flat)) / distributed.world_size()
