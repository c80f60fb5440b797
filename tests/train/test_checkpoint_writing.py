"""When a run writes checkpoints, beside the loop, and which one it keeps as the best."""

import errno
import json
import math
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cmcgns.train.checkpoint import CheckpointWriter, Contents, Progress
from cmcgns.train.shards import Part
from tests.train.test_trainer import config_of, start


def test_training_goes_on_while_a_checkpoint_is_written_which_holds_the_state_of_its_step(tmp_path: Path) -> None:
    run = start(config_of(checkpoint_every=2), tmp_path / "run")
    writer, may_write = run.trainer.writer, threading.Event()
    writer._thread.submit(may_write.wait)  # a slow disk
    for _ in range(2):
        run.trainer.next_step()
    random = torch.get_rng_state()
    weights = run.trainer.engine.weights()
    run.trainer.next_step()
    assert not (tmp_path / "run" / "checkpoint_2").exists()
    may_write.set()
    writer.wait()
    saved = tmp_path / "run" / "checkpoint_2"
    assert json.loads((saved / "progress.json").read_text())["step"] == 2
    stored = load_file(saved / "weights_0.safetensors")
    assert set(stored) == set(weights)
    assert all(torch.equal(value, weights[name].flatten()) for name, value in stored.items() if value.dim())
    assert torch.equal(load_file(saved / "random_0.safetensors")["cpu"], random)
    assert not all(torch.equal(value, weights[name]) for name, value in run.trainer.engine.weights().items())


def test_a_checkpoint_is_also_written_when_its_minutes_are_over(tmp_path: Path) -> None:
    run = start(config_of(checkpoint_every=5, checkpoint_minutes=10.0), tmp_path / "run")
    for step in range(1, 7):
        if step == 2:
            run.trainer.saved_at -= 600  # ten minutes have passed since the start; every rank knows one step later
        run.trainer.next_step()
    run.trainer.writer.wait()
    assert sorted(path.name for path in run.folder.glob("checkpoint_*")) == ["checkpoint_3", "checkpoint_5"]


def test_the_best_checkpoint_is_kept_once_it_is_written_and_before_the_next_one_is(tmp_path: Path) -> None:
    run = start(config_of(checkpoint_every=5, validate_every=4, keep_best=True), tmp_path / "run")
    stored, kept = [], []
    keep = run.trainer.parts.keep

    def watched(folder: Path, step: int) -> None:
        keep(folder, step)
        stored.append(step)

    run.trainer.parts.keep = watched
    run.trainer.parts.keep_best = lambda step: kept.append((step, stored[-1]))
    assert run.trainer.train()
    expected, best = [], {}
    for row in run.rows("val"):
        merit = (row["i2t_recall_at_1"] + row["t2i_recall_at_1"], -row["loss_global"])
        if merit >= best.get(row["stage"], (0.0, -math.inf)):
            best[row["stage"]] = merit
            expected.append(row["step"])
    assert kept == [(step, step) for step in expected]
    assert set(expected) <= set(stored)
    assert {5, 10, 15, 20, 24, 25, 30} <= set(stored)


def test_a_checkpoint_that_cannot_be_stored_ends_the_run_at_the_next_step(tmp_path: Path) -> None:
    run = start(config_of(checkpoint_every=2, stage1_steps=500), tmp_path / "run")

    def keep(filled: Path, step: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run.trainer.parts.keep = keep
    with pytest.raises(OSError, match="No space left"):
        run.trainer.train()
    assert run.trainer.progress.step < 20


MIB = 2**20


def live(tensors: int, made: list[int]) -> Contents:
    """Tensors of a MiB each; ``made`` tells which ones were copied."""

    def part(number: int) -> Part:
        return Part(
            (MIB // 4,), torch.float32, lambda: (made.append(number), torch.full((MIB // 4,), float(number)))[1]
        )

    return Contents({}, {}, live={"weights": {f"w{number}": part(number) for number in range(tensors)}})


def test_no_more_than_the_limit_is_copied_before_the_disk_has_taken_it(tmp_path: Path) -> None:
    may_write, made = threading.Event(), []
    kept: dict[str, torch.Tensor] = {}
    writer = CheckpointWriter(lambda folder, step: kept.update(load_file(folder / "weights_0.safetensors")), 3 * MIB)
    writer._thread.submit(may_write.wait)  # a slow disk
    loop = threading.Thread(target=writer.start, args=(Progress(), live(20, made)))
    loop.start()
    while len(made) < 4:
        time.sleep(0.01)
    time.sleep(0.3)
    assert made == list(range(4))  # three that wait for the disk, and one that waits for room
    may_write.set()
    loop.join()
    writer.wait()
    assert {name: set(tensor.tolist()) for name, tensor in kept.items()} == {f"w{i}": {float(i)} for i in range(20)}


def test_the_loop_does_not_wait_for_a_disk_that_takes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    made: list[int] = []
    writer = CheckpointWriter(lambda folder, step: None, MIB)
    writer.start(Progress(), live(20, made))
    assert len(made) == 20  # other ranks may wait for this one in a copy
    with pytest.raises(FileNotFoundError):
        writer.wait()
