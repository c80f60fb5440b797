"""The loop of both stages in one process: blocks and clustering in memory, plain torch, no Ray."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cmcgns.config import Config
from cmcgns.data.batch import Batcher, ImageReportBatch
from cmcgns.data.record import Block
from cmcgns.errors import TrainingStoppedError
from cmcgns.methods.base import load_method
from cmcgns.methods.cm_cgns.model import RECONSTRUCTION_PARTS, CmCgnsModel
from cmcgns.train.checkpoint import seed_everything
from cmcgns.train.metrics import RunLog
from cmcgns.train.resume import CHECKPOINT_FORMAT
from cmcgns.train.schedule import build_schedule
from cmcgns.train.shards import copied
from cmcgns.train.steps import Stretch
from cmcgns.train.trainer import Parts, Trainer
from tests.small import banks_of, small_config, small_model
from tests.train.memory import MemoryBlocks

CPU = torch.device("cpu")
STUDIES = 200
LOSSES = ("loss", "loss_global", "loss_local_image", "loss_local_report", "loss_reconstruction")


def config_of(**train: object) -> Config:
    """24 + 6 steps of 32 studies in two microbatches; about 96 sentences a step, so the bank is full enough at 12."""
    return small_config(
        **{
            "num_workers": 1, "microbatch_size": 16, "global_batch_size": 32, "engine": "torch", "zero_stage": 0,
            "stage1_steps": 24, "stage2_steps": 6, "warmup_steps": 2, "learning_rate": 1e-3, "log_every": 5,
            "model__dropout": 0.1, "clustering__momentum": 0.01, "validate_every": 20, "checkpoint_every": 7, **train,
        }
    )  # fmt: skip


@dataclass
class Run:
    """A trainer, the folder of its rows, and its checkpoints by step."""

    folder: Path
    trainer: Trainer

    def rows(self, split: str = "train") -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["split"] == split]


class Shown:
    def update(self, row: dict[str, Any]) -> None:
        assert "step" in row


def start(
    config: Config, folder: Path, checkpoint: int | None = None, source: Path | None = None,
    batcher: type[Batcher] = Batcher, stop: Callable[[], bool] = lambda: False,
) -> Run:  # fmt: skip
    """A trainer with new parts, from the start or from ``checkpoint`` of the run in ``source``."""
    folder.mkdir(exist_ok=True)
    if source is not None:
        shutil.copy(source / "metrics.jsonl", folder / "metrics.jsonl")

    def model() -> CmCgnsModel:
        return small_model(config, config.train.seed)

    def keep(filled: Path, step: int) -> None:
        shutil.copytree(filled, folder / f"checkpoint_{step}", dirs_exist_ok=True)

    parts = Parts(
        build_model=model,
        blocks=MemoryBlocks(config, STUDIES, validation=40),
        batcher=batcher(config, 0, CPU, load_method(config).views),
        banks=banks_of(config),
        method=load_method(config),
        schedule=build_schedule(config.train, STUDIES),
        device=CPU,
        log=RunLog(str(folder), folder, checkpoint or 0),
        display=Shown(),
        keep=keep,
        stop_requested=stop,
    )
    place = None if checkpoint is None else (source or folder) / f"checkpoint_{checkpoint}"
    return Run(folder, Trainer(config, parts, place and str(place)))


@pytest.fixture(scope="module", name="finished")
def fixture_finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = start(config_of(), tmp_path_factory.mktemp("run"))
    assert run.trainer.train()
    return run


def test_both_stages_run_and_every_step_is_written_once(finished: Run) -> None:
    rows = finished.rows()
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert [row["stage"] for row in rows] == [1] * 24 + [2] * 6
    assert all("loss_reconstruction" in row for row in rows[24:])
    assert not any("loss_reconstruction" in row for row in rows[:24])
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[23]["loss_global"] < rows[0]["loss_global"]
    assert finished.trainer.progress.studies_seen == 30 * 32
    assert [row["epoch"] for row in rows] == [(step - 1) // 6 for step in range(1, 31)]  # 200 // 32 = 6 steps


def test_validation_comes_when_due_and_at_the_end_of_each_stage(finished: Run) -> None:
    rows = finished.rows("val")
    assert [(row["step"], row["stage"]) for row in rows] == [(20, 1), (24, 1), (30, 2)]
    assert all(row["studies"] == row["distinct_reports"] == 40 for row in rows)
    assert "loss_reconstruction" in rows[-1]
    assert (finished.folder / "reconstruction.png").exists()
    assert finished.trainer.last_validation is not None


def test_clustering_starts_once_and_its_versions_follow_the_refreshes(finished: Run) -> None:
    versions = [row["centroids_version"] for row in finished.rows()]
    # 1024 sentences are in the bank at step 12; centroids requested at one refresh are adopted at the next
    assert versions[:24] == [0] * 15 + [1] * 4 + [2] * 4 + [3]
    assert finished.trainer.parts.banks.first.centroids.started_at == 16
    restored = [row["rows_restored"] for row in finished.rows()]
    assert not any(restored[:16])
    assert any(restored[16:])  # early sentences share a cluster, so their false negatives stay in


def test_losses_add_up(finished: Run) -> None:
    for row in finished.rows():
        assert row["loss"] == pytest.approx(sum(row.get(name, 0.0) for name in LOSSES[1:]), rel=1e-5)


@pytest.mark.parametrize(
    "checkpoint", [7, 14, 24, 28]
)  # before clustering, a refresh in flight, between stages, stage 2
def test_a_resumed_run_matches_the_uninterrupted_one(checkpoint: int, finished: Run, tmp_path: Path) -> None:
    resumed = start(config_of(), tmp_path / "resumed", checkpoint, finished.folder)
    assert resumed.trainer.train()
    assert len(resumed.rows()) == 30
    for ours, theirs in zip(resumed.rows() + resumed.rows("val"), finished.rows() + finished.rows("val"), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["centroids_version"] == theirs["centroids_version"]
        assert ours.get("studies_digest") == theirs.get("studies_digest")
        for name in (*LOSSES, "mean_cosine", "negatives_per_sentence", "i2t_recall_at_1"):
            if name in theirs:
                # the same arithmetic in the same order, dropout included
                assert ours[name] == pytest.approx(theirs[name], rel=1e-6), (ours["step"], name)
    guides = resumed.trainer.parts.banks.first, finished.trainer.parts.banks.first
    assert guides[0].centroids.digest() == guides[1].centroids.digest()


@pytest.mark.parametrize("checkpoint", [21, 24])
def test_a_checkpoint_of_format_2_resumes_to_the_same_losses(checkpoint: int, finished: Run, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(finished.folder, old)
    place = old / f"checkpoint_{checkpoint}"
    names = finished.trainer.engine.module.state_dict()

    def shaped(name: str, value: Tensor) -> Tensor:
        return value.view(names[name].shape if name in names else value.shape)

    for part in ("weights", "optimizer", "best"):
        parts = load_file(place / f"{part}_0.safetensors")
        (place / f"{part}_0.safetensors").unlink()
        whole = {key: shaped(key.partition(".")[2] if key.startswith("exp_avg") else key, parts[key]) for key in parts}
        if part == "best":
            centroids = load_file(place / "best_centroids.safetensors")
            (place / "best_centroids.safetensors").unlink()
            whole |= {f"centroids.{key}": value for key, value in centroids.items()}
        save_file(whole, place / f"{part}.safetensors")
    progress = json.loads((place / "progress.json").read_text())
    (place / "progress.json").write_text(json.dumps(progress | {"format": 2}))
    resumed = start(config_of(checkpoint_every=3), tmp_path / "resumed", checkpoint, old)
    assert resumed.trainer.train()
    for ours, theirs in zip(resumed.rows(), finished.rows(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6), ours["step"]
    again = json.loads((tmp_path / "resumed" / "checkpoint_27" / "progress.json").read_text())
    assert again["format"] == CHECKPOINT_FORMAT


def test_two_runs_give_the_same_bits_with_deterministic_algorithms(finished: Run, tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        again = start(config_of(), tmp_path / "again")
        assert again.trainer.train()
    finally:
        torch.use_deterministic_algorithms(False)
    times = ("studies_per_s", "data_wait_s", "pool_wait_s", "step_s")
    for ours, theirs in zip(again.rows() + again.rows("val"), finished.rows() + finished.rows("val"), strict=True):
        assert {**ours, **dict.fromkeys(times)} == {**theirs, **dict.fromkeys(times)}


def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint_to_go_on_from(finished: Run, tmp_path: Path) -> None:
    asked = iter([False, True, True])  # the step after the one in which it is asked is the last
    stopped = start(config_of(), tmp_path / "stopped", stop=lambda: next(asked))
    assert not stopped.trainer.train()
    assert stopped.trainer.progress.step == 3
    resumed = start(config_of(stage1_steps=24), tmp_path / "resumed", 3, stopped.folder)
    assert [row["step"] for row in resumed.rows()] == [1, 2, 3]
    resumed.trainer.train_step(4, resumed.trainer.reader.next_step())
    resumed.trainer.write_metrics()
    assert resumed.rows()[3]["loss"] == pytest.approx(finished.rows()[3]["loss"], rel=1e-6)


def test_stage_2_starts_from_the_best_weights_and_centroids_with_an_empty_bank(finished: Run, tmp_path: Path) -> None:
    run = start(config_of(), tmp_path / "run", 24, finished.folder)
    trainer, guide = run.trainer, run.trainer.parts.banks.first
    best = {key: value.clone() for key, value in trainer.best.items()}
    centroids = trainer.best_centroids["rows_KD"].clone()
    assert trainer.progress.best["step"] in (8, 16, 24)
    with torch.no_grad():
        for parameter in trainer.engine.module.parameters():
            parameter.add_(1.0)
    trainer.start_stage(2)
    for name, value in trainer.engine.weights().items():
        assert torch.equal(value, best[name].view(value.shape)), name
    assert torch.equal(guide.centroids.rows_KD, centroids)
    assert (guide.pushed, trainer.progress.stage) == (0, 2)
    assert int(trainer.engine.optimizer_state()["optimizer_steps"].copy()) == 0
    assert all(parameter.requires_grad for parameter in trainer.engine.module.parameters())


def test_the_best_validation_is_the_highest_recall_then_the_lower_loss_then_the_later(finished: Run) -> None:
    rows = [row for row in finished.rows("val") if row["stage"] == 1]

    def merit(row: dict[str, Any]) -> tuple[float, float, int]:
        return row["i2t_recall_at_1"] + row["t2i_recall_at_1"], -row["loss_global"], row["step"]

    assert finished.trainer.progress.best["step"] == max(rows, key=merit)["step"]


class Diary(Batcher):
    """Writes down when a batch for training is made."""

    entries: list[str]

    def __call__(self, block: Block, rank_sentences: tuple[int, ...], training: bool) -> ImageReportBatch:
        if training:
            self.entries.append("read")
        return super().__call__(block, rank_sentences, training)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_next_steps_films_are_read_before_this_step_moves_the_weights_and_none_after_the_last(
    stopped: bool, tmp_path: Path
) -> None:
    """So that a GPU, which is busy until then, does not wait for them."""
    Diary.entries = entries = []
    steps = 2 if stopped else 4
    run = start(
        config_of(stage1_steps=3, stage2_steps=1, warmup_steps=0), tmp_path, batcher=Diary, stop=lambda: stopped
    )
    move = run.trainer.engine.step  # of stage 1

    def step(learning_rate: float) -> None:
        entries.append("step")
        move(learning_rate)

    run.trainer.engine.step = step  # type: ignore[method-assign]
    assert run.trainer.train() is not stopped
    assert entries.count("read") == 2 * steps
    assert entries[:6] == (["read"] * 4 + ["step"] * 2 if stopped else ["read"] * 4 + ["step"] + ["read"])


class SpoiledImage(Batcher):
    """Puts a NaN into one pixel of the third step's second microbatch."""

    calls = 0

    def __call__(self, block: Block, rank_sentences: tuple[int, ...], training: bool) -> ImageReportBatch:
        batch = super().__call__(block, rank_sentences, training)
        type(self).calls += 1
        if self.calls == 6:
            batch.image_B1HW[0, 0, 0, 0] = float("nan")
        return batch


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path: Path) -> None:
    run = start(config_of(model__dropout=0.0), tmp_path / "run", batcher=SpoiledImage)
    twin = start(config_of(model__dropout=0.0), tmp_path / "twin")
    with pytest.raises(
        TrainingStoppedError,
        match=r"step 3: loss_global, .* is not finite, in the studies 64 to 95 of epoch 0's order "
        r"\(studies_digest [0-9a-f]{16}\); the weights are those of step 2",
    ):
        run.trainer.train()
    for step in (1, 2):
        twin.trainer.train_step(step, twin.trainer.reader.next_step())
    for name, value in twin.trainer.engine.weights().items():
        assert torch.equal(value, run.trainer.engine.weights()[name]), name


def test_collapsed_features_are_named_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(
        microbatch_size=2, global_batch_size=2, stage1_steps=101, stage2_steps=0, learning_rate=1e-12, log_every=50,
        validate_every=None, checkpoint_every=1000,
    )  # fmt: skip
    run = start(config, tmp_path / "run")
    with torch.no_grad():
        module = run.trainer.engine.module
        module.get_parameter("patch_projection.weight").zero_()  # every patch is the bias
        module.get_parameter("patch_projection.bias").fill_(1.0)  # normalising 0 has an infinite gradient
    with caplog.at_level(logging.WARNING, logger="cmcgns"):
        for step in range(1, 102):
            run.trainer.train_step(step, run.trainer.reader.next_step())
            if step in (50, 99):
                run.trainer.write_metrics()
                assert not caplog.records
        run.trainer.write_metrics()
    [record] = caplog.records
    assert "features have collapsed: patches_std has been under 0.05 for 100 steps" in record.getMessage()


def test_validation_moves_neither_weights_nor_statistics_nor_centroids_nor_dropout(
    finished: Run, tmp_path: Path
) -> None:
    config = config_of(model__image_encoder="resnet-tiny", data__image_size=64, data__resize=72)
    run = start(config, tmp_path / "run")
    trainer = run.trainer
    guide = trainer.parts.banks.first
    trainer.train_step(1, trainer.reader.next_step())
    guide.centroids.adopt(torch.nn.functional.normalize(torch.randn(6, 32), dim=1), 1, 1)
    before, random, pushed = trainer.engine.weights(), torch.get_rng_state(), guide.pushed
    digest, optimizer = guide.centroids.digest(), copied(trainer.engine.optimizer_state())
    trainer.validate()
    first = trainer.last_validation
    guide.centroids.move()  # nothing was observed either
    trainer.validate()
    assert first is not None
    assert trainer.last_validation is not None
    assert first.scores == trainer.last_validation.scores  # the same crops and masks each time
    assert trainer.engine.module.training
    assert digest == guide.centroids.digest()
    assert guide.pushed == pushed
    assert torch.equal(random, torch.get_rng_state())
    for name, value in (trainer.engine.weights() | copied(trainer.engine.optimizer_state())).items():
        assert torch.equal(value, (before | optimizer)[name]), name


class HostReads(TorchDispatchMode):
    """Counts what would make a GPU wait: a value read on the host, or a shape that depends on values."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.found = known, []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")
        if name in {f"aten::{each}" for each in waits} and args[0].data_ptr() not in self.known:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_steady_step_reads_nothing_back_from_the_device(finished: Run, tmp_path: Path) -> None:
    run = start(config_of(), tmp_path / "run", 28, finished.folder)
    trainer = run.trainer
    assert trainer.parts.banks.first.centroids.started
    trainer.train_step(29, trainer.reader.next_step())
    data = trainer.reader.next_step()
    # Adam's step counts are on the host, also on a GPU
    counts = {slot["step"].data_ptr() for slot in trainer.engine.optimizer.state.values()}  # type: ignore[attr-defined]
    with HostReads(counts) as reads:
        trainer.train_step(30, data)
    assert reads.found == []
    with HostReads(counts) as reads:
        assert float(torch.ones(3).sum()) == 3.0  # check that the counter works
    assert reads.found == ["aten::_local_scalar_dense"]


@pytest.mark.parametrize("factor", [0.25, 0.0])
def test_in_stage_2_what_stage_1_has_trained_moves_by_its_factor_and_the_decoder_by_the_whole_rate(
    factor: float, tmp_path: Path
) -> None:
    config = config_of(
        stage1_steps=2, stage2_steps=1, warmup_steps=0, stage2_learned_rate=factor, weight_decay=0.0, model__dropout=0.0
    )
    trainer = start(config, tmp_path / "run").trainer
    for _ in range(2):
        trainer.next_step()
    before = trainer.engine.weights()
    trainer.next_step()
    moved = {name: float((value - before[name]).abs().max()) for name, value in trainer.engine.weights().items()}
    # Adam's first step moves a weight by the learning rate, whatever the size of its gradient
    full = config.train.learning_rate
    assert moved["decoder.exit.weight"] == pytest.approx(full, rel=0.01)
    assert moved["image_projection.weight"] == pytest.approx(full * factor, rel=0.01)
    assert moved["text_encoder.projection.weight"] == pytest.approx(full * factor, rel=0.01)
    learned = {name for name in before if not name.startswith(RECONSTRUCTION_PARTS)}
    if not factor:
        assert all(moved[name] == 0.0 for name in learned)
    saved = {name.split(".", 1)[1] for name in trainer.engine.optimizer_state() if "." in name}
    assert saved.isdisjoint(learned) == (factor == 0.0)


def test_stage_2_has_a_peak_of_its_own_where_given(tmp_path: Path) -> None:
    trainer = start(config_of(stage2_learning_rate=2e-5), tmp_path / "run").trainer
    schedule, train = trainer.parts.schedule, trainer.config.train
    rates = [trainer.learning_rate(step) for step in range(1, schedule.total + 1)]
    assert max(rates[: schedule.stage1]) == train.learning_rate != 2e-5
    assert max(rates[schedule.stage1 :]) == 2e-5


def test_augmented_films_are_the_same_after_a_resume_and_read_nothing_back(tmp_path: Path) -> None:
    strengths = {"rotation": 10.0, "scale": 0.1, "brightness": 0.3, "contrast": 0.3}
    config = config_of(checkpoint_every=2, **{f"data__augment_{name}": value for name, value in strengths.items()})
    whole = start(config, tmp_path / "whole")
    for _ in range(2):
        whole.trainer.next_step()
    whole.trainer.writer.wait()
    resumed = start(config, tmp_path / "resumed", 2, tmp_path / "whole")
    batches = [run.trainer.reader.next_step().microbatches for run in (whole, resumed)]
    for ours, theirs in zip(*batches, strict=True):
        assert torch.equal(ours.image_B1HW, theirs.image_B1HW)
    [block, *_] = whole.trainer.parts.blocks.open(Stretch(0, 0, STUDIES))
    with HostReads(set()) as reads:
        whole.trainer.parts.batcher(block, (1,), training=True)
    assert reads.found == []


def test_building_a_model_does_not_touch_the_ranks_own_dropout(finished: Run, tmp_path: Path) -> None:
    fresh = start(config_of(), tmp_path / "fresh")
    random = torch.get_rng_state()
    seed_everything(fresh.trainer.config.train.seed)  # keyed by rank
    assert torch.equal(random, torch.get_rng_state())
    run = start(config_of(), tmp_path / "run", 24, finished.folder)
    random = torch.get_rng_state()
    run.trainer.start_stage(2)
    assert torch.equal(random, torch.get_rng_state())
