"""Device and precision of forward passes, the same in training, evaluation and the library.

B films or texts, D embedding.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmcgns.models.attention import unit

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")


def device_of(use_gpu: bool) -> torch.device:
    """The GPU that Ray has reserved for this process, which then convolves in fp32 and not in TF32, or the CPU."""
    if use_gpu:
        torch.backends.cudnn.allow_tf32 = False  # features of GPUs and CPUs go into the same files
    return torch.device("cuda") if use_gpu else CPU


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast on ``device`` in ``precision``; nothing in fp32."""
    dtype = AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def unit_rows(rows_BD: Tensor, precision: str) -> NDArray[np.float32]:
    """Embeddings as float32 on the host, of length 1 whatever the ``precision`` in which they were computed."""
    wide_BD = rows_BD.float()
    return np.asarray((wide_BD if precision == "fp32" else unit(wide_BD)).cpu().numpy())
