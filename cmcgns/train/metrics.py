"""Metrics of a run: one row per step in metrics.jsonl, and TensorBoard scalars and pictures.

Values stay on the device until they are written.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cmcgns import distributed, storage
from cmcgns.config import Config
from cmcgns.methods.base import Losses, Method
from cmcgns.train.loggers import Loggers, open_loggers


class StepMetrics:
    """Collects each step's values on the device, and converts them to rows when they are due."""

    def __init__(self, method: Method[Any]) -> None:
        self._method = method
        self._values: list[Tensor] = []
        self._facts: list[dict[str, Any]] = []

    def record(self, facts: dict[str, Any], microbatches: list[Losses], gradient_norm: Tensor) -> None:
        """Store one step: ``facts`` from the host, the mean over its microbatches, and the norm of its gradient."""
        columns = [torch.cat([losses.terms, losses.statistics]) for losses in microbatches]
        self._values.append(torch.cat([torch.stack(columns).mean(0), gradient_norm.float().view(1)]))
        self._facts.append(facts)

    def rows(self) -> list[dict[str, Any]]:
        """All steps since the last call as rows with global values. Collective; the only place that waits for the device.

        ``gradient_norm`` is None for a step that was skipped because its gradient was not finite.
        """
        if not self._values:
            return []
        values = (distributed.all_reduce(torch.stack(self._values)) / distributed.world_size()).tolist()
        rows = [
            facts
            | dict(zip((*self._method.terms(facts["stage"]), *self._method.statistics), row, strict=True))
            | {"gradient_norm": norm if math.isfinite(norm) else None}
            for facts, (*row, norm) in zip(self._facts, values, strict=True)
        ]
        self._values, self._facts = [], []
        return rows


class RunLog:
    """metrics.jsonl and tensorboard/ of a run folder (rank 0). On object storage both are uploaded at checkpoints."""

    def __init__(self, folder: str, scratch: Path, step: int, config: Config | None = None) -> None:
        """Continue after ``step``: later rows are deleted. ``config`` names further loggers."""
        self.folder, self.remote = folder, storage.is_s3(folder)
        self.local = scratch if self.remote else Path(folder)
        self.path = self.local / "metrics.jsonl"
        self._keep_until(step)
        self._file = self.path.open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(self.local / "tensorboard"), purge_step=step + 1)
        self.loggers = Loggers([] if config is None else open_loggers(config, folder, self.local))

    def _keep_until(self, step: int) -> None:
        uri = storage.join(self.folder, "metrics.jsonl")
        text = storage.read_bytes(uri).decode() if step and storage.exists(uri) else ""
        rows = [line for line in text.splitlines() if _step_of(line) <= step]
        storage.write_bytes(str(self.path), "".join(f"{line}\n" for line in rows).encode())

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows, and add their numbers to TensorBoard."""
        for row in rows:
            self._file.write(json.dumps(row) + "\n")
            for key, value in row.items():
                if isinstance(value, int | float) and key not in ("step", "stage", "epoch"):
                    self.tensorboard.add_scalar(f"{row['split']}/{key}", value, row["step"])
        self._file.flush()
        self.loggers.write(rows)

    def picture(self, name: str, image_CHW: Tensor, step: int) -> None:
        """Add a picture in [0, 1] to TensorBoard, and write it as PNG to the run folder."""
        from PIL import Image

        self.tensorboard.add_image(name, image_CHW, step)
        pixels_HW = (image_CHW[0] * 255).round().to(torch.uint8).cpu().numpy()
        Image.fromarray(pixels_HW).save(self.local / f"{name}.png")

    def sync(self) -> None:
        """Upload everything to object storage; a local folder needs no upload."""
        self._file.flush()
        self.tensorboard.flush()
        if self.remote:
            storage.upload_folder(self.local, self.folder)

    def close(self) -> None:
        """Upload the rest and close."""
        self.loggers.close()
        self.sync()
        self._file.close()
        self.tensorboard.close()


def _step_of(line: str) -> float:
    """The step of a row; infinity for a truncated row."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")


class Stopwatch:
    """Seconds between calls."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        before, self._last = self._last, time.perf_counter()
        return self._last - before


class TimedIterator:
    """Iterates over ``items`` and measures the seconds spent waiting for them."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        watch = Stopwatch()
        try:
            return next(self._items)
        finally:
            self.waited_s += watch.lap()
