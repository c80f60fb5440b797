"""Checkpoints, and the export that plain transformers can load. Safetensors and JSON, no pickles.

Each rank writes its own part of the state (``shards``) and the hashes of its files; a run resumes only from a checkpoint whose
files all have theirs.
"""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from cmcgns import distributed, storage
from cmcgns.cluster.heartbeat import COPYING, mark
from cmcgns.errors import TrainingStoppedError
from cmcgns.run_folder import EXPORT_HASHES
from cmcgns.storage.integrity import hash_file, write_hashes
from cmcgns.train.resume import CHECKPOINT_FORMAT, FIRST_SHARDED, hashes_of
from cmcgns.train.shards import Parts, State, join, read_shard, split, write_one_by_one, write_shard


@dataclass
class Progress:
    """Progress of a run: everything in a checkpoint that is not a tensor."""

    step: int = 0
    """Optimizer steps done, over all stages."""
    stage: int = 1
    epoch: int = 0
    position: int = 0
    """Studies used in ``epoch``'s order, bad ones included."""
    studies_seen: int = 0
    ranks: int = 1
    best: dict[str, float] = field(default_factory=dict)
    """Step and metrics of the best validation in stage 1; with three stages of this or the last one before the final one."""
    best_of_stage: dict[str, float] = field(default_factory=dict)
    """Stage, step and metrics of the best validation in the last stage that had one."""
    collapsed_steps: int = 0
    """Consecutive steps with collapsed features."""
    format: int = CHECKPOINT_FORMAT


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds besides progress and random state, by name of the file."""

    shards: dict[str, State]
    """This rank's parts that must not change any more."""
    sizes: dict[str, int]
    """Elements of the whole tensors behind all parts."""
    whole: dict[str, State] = field(default_factory=dict)
    """What rank 0 alone writes; it must not change any more either."""
    live: dict[str, Parts] = field(default_factory=dict)
    """This rank's parts of what the next step changes, in ``file_order``: they are copied first, before training goes on."""


COPIED_BYTES = 512 * 2**20
"""The most that a rank has copied and not written yet, besides one tensor that waits for room. Without a bound the ranks of one
host would take the size of the whole state, 12 bytes per parameter."""


class Copies:
    """Tensors on their way from the training loop to the thread that writes them, in order."""

    def __init__(self, limit: int) -> None:
        """``limit``: bytes that may be on the way."""
        self._limit, self._held = limit, 0
        self._ready: deque[Tensor] = deque()
        self._changed = threading.Condition()
        self._ended = self._dropped = False

    def put(self, tensor: Tensor) -> None:
        """Hand over ``tensor`` once there is room for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._dropped or not self._held or self._held + tensor.nbytes <= self._limit)
            if not self._dropped:
                self._ready.append(tensor)
                self._held += tensor.nbytes
                self._changed.notify_all()

    def end(self) -> None:
        """No more tensors will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def drop(self) -> None:
        """Nobody takes tensors any more: what comes is dropped."""
        with self._changed:
            self._dropped = True
            self._ready.clear()
            self._changed.notify_all()

    def take(self, number: int) -> Iterator[Tensor]:
        """The next ``number`` tensors; each one counts until the next one is asked for."""
        for _ in range(number):
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._ended)
                if not self._ready:
                    raise RuntimeError("the state was not copied to its end")
                tensor = self._ready.popleft()
            yield tensor
            with self._changed:
                self._held -= tensor.nbytes
                self._changed.notify_all()


class CheckpointWriter:
    """Writes this rank's part of checkpoints in a thread beside the training loop, one after the other."""

    def __init__(self, keep: Callable[[Path, int], None], limit: int = COPIED_BYTES) -> None:
        """``keep`` is called in the thread with the folder and the step, once the files are there. ``limit``: most bytes that are
        copied and not written yet."""
        self._keep, self._limit = keep, limit
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    def start(self, progress: Progress, contents: Contents) -> None:
        """Copy what is live and begin to write it; the checkpoint before must have ended. Waits for the disk if more is live than
        ``limit``. Collective."""
        copies = Copies(self._limit)
        writing = self._thread.submit(self._write, deepcopy(progress), contents, random_state(), copies)
        try:
            for part in (part for parts in contents.live.values() for part in parts.values()):
                mark(COPYING)
                copies.put(part.copy())
        finally:
            copies.end()
        self._last = writing

    def check(self) -> None:
        """Raise the error of a checkpoint that has failed in the meantime."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the end of the checkpoint that is being written, and raise its error."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _write(self, progress: Progress, contents: Contents, random: State, copies: Copies) -> None:
        try:
            with storage.scratch_folder() as scratch:
                folder = scratch / "checkpoint"
                folder.mkdir()
                save_checkpoint(folder, progress, contents, random, copies)
                self._keep(folder, progress.step)
        finally:
            copies.drop()  # after an error the loop, where other ranks wait, must not wait for room


def save_checkpoint(
    folder: Path, progress: Progress, contents: Contents, random: State, copies: Copies | None = None
) -> None:
    """Write this rank's files and their hashes. ``copies`` brings the tensors of what is live, which others can do without."""
    rank, writers = distributed.rank(), {}
    if copies is not None:
        for name, parts in contents.live.items():
            writers[f"{name}_{rank}"] = partial(write_one_by_one, parts=parts, tensors=copies.take(len(parts)))
    shards = contents.shards | {"random": random}
    held = {f"{name}_{rank}": parts for name, parts in shards.items()} | (contents.whole if rank == 0 else {})
    for name, tensors in sorted(held.items(), key=lambda item: -_size(item[1])):  # little is left to hash at the end
        writers[name] = partial(write_shard, parts=tensors)
    if rank == 0:
        (folder / "progress.json").write_text(json.dumps(asdict(progress), indent=1))
    with ThreadPoolExecutor(1) as beside:  # hash one file while the next one is written
        hashes = {"progress.json": beside.submit(hash_file, folder / "progress.json")} if rank == 0 else {}
        for name, write in writers.items():
            path = folder / f"{name}.safetensors"
            write(path, sizes=contents.sizes)
            hashes[path.name] = beside.submit(hash_file, path)
        found = {name: each.result() for name, each in hashes.items()}
    (folder / hashes_of(rank)).write_text(json.dumps(found, indent=1))


def _size(tensors: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def load_progress(uri: str) -> Progress:
    """Progress stored in the checkpoint ``uri``."""
    return Progress(**json.loads(storage.read_bytes(storage.join(uri, "progress.json"))))


def load_part(uri: str, name: str) -> State:
    """What rank 0 has written whole to the checkpoint ``uri``; empty if the checkpoint does not have it."""
    file = storage.join(uri, f"{name}.safetensors")
    return load(storage.read_bytes(file)) if storage.exists(file) else {}


def load_shard(uri: str, name: str, progress: Progress) -> State:
    """This rank's part, whatever the number of ranks that have written the checkpoint ``uri``; empty if it does not have it."""
    return read_shard(uri, name, progress.ranks if progress.format >= FIRST_SHARDED else 0)


def random_state() -> State:
    """State of this rank's random generators, which dropout uses."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_random_state(uri: str, progress: Progress, seed: int) -> bool:
    """Restore this rank's random generators. If the number of ranks has changed, seed them again and return False."""
    state = load_part(uri, f"random_{distributed.rank()}")
    if progress.ranks != distributed.world_size() or not state:
        seed_everything(seed + progress.step)
        return False
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    return True


def seed_everything(seed: int) -> None:
    """Seed torch for dropout, differently on each rank."""
    torch.manual_seed(seed * 100_003 + distributed.rank())


def heads(weights: State, training_only: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """All weights outside the two backbones: projections, pools, attention, predictor, decoder, temperature; and without those
    that only training needs."""
    others = ("image_encoder.backbone.", "text_encoder.backbone.", *training_only)
    return {name: value.contiguous() for name, value in weights.items() if not name.startswith(others)}


EXPORT_FORMAT = 2
"""2 since exports have hashes."""


def export_model(
    folder: Path, model: Any, weights: State, tokenizer: Any, preprocess: dict[str, Any], centroids: State
) -> None:
    """Write encoders and tokenizer as Hugging Face folders, plus the files that only this package reads.

    ``model`` is a whole model with the run's settings, also on the meta device; it takes over ``weights``.
    """
    model.load_state_dict(weights, assign=True)
    backbone = model.image_encoder.backbone
    if hasattr(backbone, "save_pretrained"):
        backbone.save_pretrained(folder / "image_encoder")
    else:  # a user's module; only this package can load it
        (folder / "image_encoder").mkdir()
        own = {key: value.contiguous() for key, value in backbone.state_dict().items()}
        save_file(own, folder / "image_encoder" / "model.safetensors")
    model.text_encoder.backbone.save_pretrained(folder / "text_encoder")
    tokenizer.save(folder / "tokenizer")
    save_file(heads(weights, model.training_only), folder / "heads.safetensors")
    if centroids:
        save_file({key: value.contiguous() for key, value in centroids.items()}, folder / "centroids.safetensors")
    (folder / "preprocess.json").write_text(json.dumps(preprocess, indent=1) + "\n")
    write_hashes(folder, EXPORT_HASHES)


def load_weights(model: torch.nn.Module, parts: State) -> None:
    """Give ``model``, whole on every rank, the weights of which each rank passes its part. Collective."""
    own = model.state_dict()
    unlike = sorted(own.keys() ^ parts.keys()) or [
        name for name, value in own.items() if parts[name].numel() != split(value).numel()
    ]
    if any(count for (count,) in distributed.exchange([len(unlike)])):
        raise TrainingStoppedError(
            f"the checkpoint is of another model than this version builds from the same settings{': ' if unlike else ''}"
            f"{', '.join(unlike[:3])}. Resume the run with the version of cmcgns that has written it"
        )
    for name, value in own.items():
        value.copy_(join(parts[name], value.shape))


def unprefixed(prefix: str, state: State) -> State:
    """The part of ``state`` whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
