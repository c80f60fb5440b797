"""One step of every method on a fake accelerator: shapes and devices only, no numbers, no accelerator.

`python -m tests.methods.fake_device --ranks 1 8 512 -- NAME ...` prints a JSON line for each method and number of ranks: how many
operators forward, losses and backward take, the bytes that they allocate, and what the host read back. It runs in a process of
its own, because a process can give the fake device its name only once.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from cmcgns import distributed
from cmcgns.config import Config
from cmcgns.data.batch import ImageReportBatch, augmented_crop, crop, mask_positions
from cmcgns.data.views import ViewSettings, random_views
from cmcgns.evaluate.heads import DenseHead
from cmcgns.methods import gloria, siglip
from cmcgns.methods.cm_cgns import films as film_negatives
from tests.methods.test_ranks import CONFIGS, centroids, config_of
from tests.small import losses_of, random_batch, small_model

DEVICE = "fakegpu"
STUDIES = 4
"""On each rank."""
STAGES = {"prior": 2}
"""Instead of the last one: in its third stage PRIOR solves an assignment problem on the host."""
HOST_READS = ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique")
"""Operators whose result the host has to wait for."""


class Operators(TorchDispatchMode):
    """Counts operators, bytes of new tensors, and what the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.bytes = 0
        self.host_reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self.number += 1
        given = {id(each.untyped_storage()) for each in tensors([args, kwargs])}
        for each in tensors(made):
            if each.device.type == DEVICE and id(each.untyped_storage()) not in given:
                self.bytes += each.numel() * each.element_size()
        name = func.overloadpacket.__name__
        to_host = any(each.device.type == DEVICE for each in tensors([args])) and any(
            each.device.type == "cpu" for each in tensors(made)
        )
        if name.startswith(HOST_READS) or to_host:
            self.host_reads[name] += 1
        return made

    def counts(self) -> dict[str, Any]:
        return {"operators": self.number, "bytes": self.bytes, "host_reads": dict(self.host_reads)}


def tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for each in values:
            yield from tensors(each)


@contextmanager
def ranks(number: int) -> Iterator[None]:
    """A process group whose other ranks do not exist: collectives return tensors of the right shape."""
    if number == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
    # through host memory, where nothing is fake: every rank says what this one says
    same = lambda values: [list(values)] * number
    try:
        with patch.object(distributed, "exchange", same):
            yield
    finally:
        dist.destroy_process_group()


def on_device(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """``module`` with its parameters and buffers on the fake device; shared ones stay shared."""
    found = dict[int, Tensor]()
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, value in own.items():
                if value is None:
                    continue
                if id(value) not in found:
                    moved = moved_to_device(value.detach(), mode)
                    is_parameter = isinstance(value, nn.Parameter)
                    found[id(value)] = nn.Parameter(moved, value.requires_grad) if is_parameter else moved
                own[name] = found[id(value)]
    return module


@contextmanager
def without_recomputation() -> Iterator[None]:
    """torch's checkpointing aborts the process in a backward pass on a backend that is written in Python."""
    with ExitStack() as patches:
        for module in (film_negatives, gloria, siglip):
            patches.enter_context(
                patch.object(module, "checkpoint", lambda function, *args, **options: function(*args))
            )
        yield


def moved_to_device(value: Tensor, mode: FakeTensorMode) -> Tensor:
    fake = mode.from_tensor(value)
    with mode:
        return fake.to(DEVICE)


def step(config: Config, number: int, stage: int) -> dict[str, Any]:
    """Operators, bytes and host reads of one microbatch on rank 0 of ``number``."""
    own = [slice(STUDIES * rank, STUDIES * (rank + 1)) for rank in range(number)]
    distributed.places_of_rows.cache_clear()
    mode = FakeTensorMode()
    model = on_device(small_model(config), mode).train()
    batch: ImageReportBatch = random_batch(config, own[0], ranks=own)
    batch = batch._replace(
        **{name: moved_to_device(value, mode) for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    )
    centroids_KD = moved_to_device(centroids(), mode)
    with mode, Operators() as forward:
        outputs = model(batch, stage)
    with mode, Operators() as compared:
        losses = losses_of(config, outputs, batch, centroids_KD, stage)
    with mode, Operators() as backward:
        losses.total.backward()
    assert {each.grad.device.type for each in model.parameters() if each.grad is not None} == {DEVICE}
    parts = {"forward": forward, "losses": compared, "backward": backward}
    return {name: part.counts() for name, part in parts.items()}


def films() -> dict[str, Any]:
    """Crops, augmentation, views and masks of a batch of stored films."""
    config = config_of("vit", data__augment_rotation=5.0, data__augment_scale=0.1, data__augment_brightness=0.2)
    mode = FakeTensorMode()
    stored_B1RR = moved_to_device(torch.zeros(STUDIES, 1, 40, 40, dtype=torch.uint8), mode)
    key_B = moved_to_device(torch.arange(STUDIES), mode)
    with mode, Operators() as made:
        augmented_crop(stored_B1RR, config.data, key_B)
        crop(stored_B1RR, 32, key_B)
        random_views(stored_B1RR, 32, key_B, 2, ViewSettings())
        mask_positions(key_B, 16, 0.5)
    return made.counts()


def dense_head() -> dict[str, Any]:
    """The head of segmentation and detection, forward and backward."""
    mode = FakeTensorMode()
    head = on_device(DenseHead((8, 16), (16, 8), 64, 2, 3), mode)
    levels = [moved_to_device(torch.zeros(2, channels, size, size), mode) for channels, size in ((8, 16), (16, 8))]
    with mode, Operators() as made:
        head(levels).sum().backward()
    return made.counts()


OTHERS = {"crops, views and masks": films, "dense head": dense_head}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=[*CONFIGS, *OTHERS])
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 8])
    args = parser.parse_args()
    _setup_privateuseone_for_python_backend(DEVICE)
    for name in args.names:
        if name in OTHERS:
            print(json.dumps({"name": name, "ranks": 1, "parts": {"all": OTHERS[name]()}}), flush=True)
            continue
        config = config_of(name)
        stage = STAGES.get(config.method.name, config.objective.stages)
        for number in args.ranks:
            with ranks(number), without_recomputation():
                print(json.dumps({"name": name, "ranks": number, "parts": step(config, number, stage)}), flush=True)


if __name__ == "__main__":
    main()
