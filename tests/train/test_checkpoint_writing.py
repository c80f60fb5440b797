"""When a run writes checkpoints, beside the loop, and which one it keeps as the best."""

import errno
import json
import math
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
