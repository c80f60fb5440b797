"""Studies of each step: the same on any number of ranks, and after a restart in the middle."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cmcgns import distributed
from cmcgns.config import Config
from cmcgns.data.batch import Batcher, ImageReportBatch, SideStream, mask_positions
from cmcgns.data.record import Block
from cmcgns.train import steps
from cmcgns.train.steps import Cursor, PrefetchTimer, StepReader, Stretch, validation_batches
from tests.ranks import run_on_ranks
from tests.small import random_batch, small_config
from tests.train.memory import MemoryBlocks, order_of, studies_of

STUDIES, GLOBAL_BATCH, BAD = 64, 12, (5, 11, 40)
CPU = torch.device("cpu")


def config_of(ranks: int, accumulation: int = 1) -> Config:
    size = GLOBAL_BATCH // ranks // accumulation
    return small_config(num_workers=ranks, microbatch_size=size, global_batch_size=GLOBAL_BATCH)


class RecordingBatcher(Batcher):
    """Records the studies of every block that becomes a batch."""

    seen: list[list[int]]

    def __call__(self, block: Block, rank_sentences: tuple[int, ...], training: bool) -> ImageReportBatch:
        batch = super().__call__(block, rank_sentences, training)
        assert rank_sentences[distributed.rank()] == len(batch.sentence_row_n)
        self.seen[-1] += studies_of(block.draw_keys, epoch=0)
        return batch


def read(ranks: int, accumulation: int, steps: int, place: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    config = config_of(ranks, accumulation)
    batcher = RecordingBatcher(config, 0, CPU)
    source = MemoryBlocks(config, STUDIES, bad=BAD)
    reader = StepReader(source, batcher, Cursor(*place), accumulation, lambda: False)
    batcher.seen, places, digests = [], [], []
    for _ in range(steps):
        batcher.seen.append([])
        step = reader.next_step()
        assert len(step.microbatches) == accumulation
        places.append((step.cursor.epoch, step.cursor.position))
        digests.append(step.studies_digest)
    return {"seen": batcher.seen, "places": places, "digests": digests}


def expected_sets(epoch: int) -> list[set[int]]:
    """The global batches of an epoch: its order without bad studies, split, without the incomplete last one."""
    good = [int(study) for study in order_of(0, epoch, STUDIES) if study not in BAD]
    return [set(good[start : start + GLOBAL_BATCH]) for start in range(0, len(good) - GLOBAL_BATCH + 1, GLOBAL_BATCH)]


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 3), (3, 2)])
def test_every_step_sees_the_same_studies_on_any_number_of_ranks(ranks: int, accumulation: int) -> None:
    alone, together = read(1, 1, 8), run_on_ranks(ranks, read, ranks, accumulation, 8)
    for step, studies in enumerate(alone["seen"]):
        pieces = [rank["seen"][step] for rank in together]
        assert sorted(study for piece in pieces for study in piece) == sorted(studies)
        assert all(len(piece) == GLOBAL_BATCH // ranks for piece in pieces)
    for rank in together:
        assert rank["digests"] == alone["digests"]
        assert rank["places"] == alone["places"]


def test_an_epoch_shows_each_good_study_once_and_drops_its_incomplete_end() -> None:
    found = read(1, 1, 10)
    assert [set(studies) for studies in found["seen"][:5]] == expected_sets(0)
    assert [set(studies) for studies in found["seen"][5:]] == expected_sets(1)
    assert all(len(studies) == GLOBAL_BATCH for studies in found["seen"])
    assert not set(BAD) & {study for studies in found["seen"] for study in studies}
    assert [place[0] for place in found["places"]] == [0] * 5 + [1] * 5


@pytest.mark.distributed
def test_a_restart_from_any_place_gives_the_rest_also_on_other_ranks() -> None:
    whole = read(1, 1, 8)
    for done in (1, 4, 5, 6):
        rest = read(1, 1, 8 - done, whole["places"][done - 1])
        assert rest == {key: values[done:] for key, values in whole.items()}
    for rank in run_on_ranks(2, read, 2, 1, 5, whole["places"][2]):
        assert rank["digests"] == whole["digests"][3:]


def test_the_next_epoch_is_prepared_before_this_one_ends() -> None:
    config = config_of(1)
    source = MemoryBlocks(config, STUDIES)
    reader = StepReader(source, Batcher(config, 0, CPU), Cursor(), 1, lambda: False)
    reader.next_step()
    assert set(source.prepared) == {Stretch(1, 0, STUDIES)}


def digests(bad: tuple[int, ...], at_once: int | None, steps: int = 14) -> tuple[list[str], MemoryBlocks]:
    """The studies of each step over three epochs, read by stretches of ``at_once``."""
    config = config_of(1)
    source = MemoryBlocks(config, STUDIES, bad=bad, at_once=at_once)
    reader = StepReader(source, Batcher(config, 0, CPU), Cursor(), 1, lambda: False)
    return [reader.next_step().studies_digest for _ in range(steps)], source


@pytest.mark.parametrize("at_once", [1, 12, 20, 24, 36])
@pytest.mark.parametrize("bad", [(), BAD, tuple(range(0, 64, 3)), tuple(range(20, 50))])
def test_an_epoch_read_by_stretches_gives_the_steps_of_one_read_at_once(bad: tuple[int, ...], at_once: int) -> None:
    whole, _ = digests(bad, None)
    found, source = digests(bad, at_once)
    assert found == whole
    assert len(source.prepared) <= len(source.opened)  # not one for each bad row
    assert max(end - start for _, start, end in source.opened) <= 2 * max(at_once, GLOBAL_BATCH) + len(bad)


def test_each_stretch_is_prepared_before_it_is_opened() -> None:
    _, source = digests((), 24)
    assert source.opened[:4] == [Stretch(0, 0, 24), Stretch(0, 24, 48), Stretch(0, 48, 64), Stretch(1, 0, 24)]
    assert set(source.opened[1:]) <= set(source.prepared)


def test_after_bad_rows_a_stretch_begins_with_the_batch_that_they_left_incomplete() -> None:
    order = order_of(0, 0, STUDIES).tolist()
    _, source = digests((order[3], order[20]), 24)
    # the first batch of 12 ends at 13, and 10 good studies are left before 24
    assert source.opened[:2] == [Stretch(0, 0, 24), Stretch(0, 13, 49)]
    assert source.opened[1] in source.prepared


def test_a_corpus_smaller_than_a_global_batch_is_an_error_and_not_an_endless_loop() -> None:
    config = config_of(1)
    reader = StepReader(MemoryBlocks(config, 11), Batcher(config, 0, CPU), Cursor(), 1, lambda: False)
    with pytest.raises(RuntimeError, match="less than one global batch"):
        reader.next_step()


def wishes(
    stop_at: tuple[int, int], due_at: tuple[int, int], ahead: bool = False, steps: int = 6
) -> list[tuple[bool, bool]]:
    """Stop and checkpoint in each step; each rank asks from its own step on, for a checkpoint until it gets one."""
    config, rank = config_of(2), distributed.rank()
    step = {"now": 0, "saved": 0}
    reader = StepReader(
        MemoryBlocks(config, STUDIES), Batcher(config, 0, CPU), Cursor(), 1,
        lambda: step["now"] >= stop_at[rank], lambda: step["now"] - step["saved"] >= due_at[rank],
    )  # fmt: skip
    seen = []
    for step["now"] in range(steps):
        data = reader.next_step()
        seen.append((data.stop_requested, data.checkpoint_due))
        step["saved"] = step["now"] if data.checkpoint_due else step["saved"]
        if ahead:
            reader.read_ahead()
    return seen


@pytest.mark.distributed
@pytest.mark.parametrize("stop_at", [(2, 4), (4, 2), (3, 3)])
@pytest.mark.parametrize("ahead", [False, True])
def test_ranks_that_are_told_to_stop_at_different_moments_stop_at_the_same_step(
    stop_at: tuple[int, int], ahead: bool
) -> None:
    found = run_on_ranks(2, wishes, stop_at, (99, 99), ahead)
    assert found[0] == found[1] == [(step > min(stop_at), False) for step in range(6)]


@pytest.mark.distributed
def test_a_checkpoint_is_due_on_all_ranks_by_the_clock_of_rank_0_and_only_once() -> None:
    found = run_on_ranks(2, wishes, (99, 99), (2, 1))
    # asked for in step 2, written after step 3; again two steps later
    assert found[0] == found[1] == [(False, step == 3) for step in range(6)]


@pytest.mark.parametrize("at_once", [STUDIES, 2 * GLOBAL_BATCH])
def test_a_step_read_ahead_is_the_one_that_would_come_next(at_once: int) -> None:
    """Over the ends of stretches and epochs, and read ahead twice."""
    config = config_of(1)

    def steps(ahead: int) -> tuple[list[Any], list[Stretch], list[Stretch]]:
        source = MemoryBlocks(config, STUDIES, bad=BAD, at_once=at_once)
        reader = StepReader(source, Batcher(config, 0, CPU), Cursor(), 1, lambda: False)
        found = []
        for _ in range(12):
            step = reader.next_step()
            found.append((step.cursor, step.studies_digest, step.microbatches[0].image_B1HW.sum()))
            for _ in range(ahead):
                reader.read_ahead()
        return found, source.opened[:4], source.prepared[:3]

    assert steps(0) == steps(1) == steps(2)


class FakeStream:
    """Stands for a CUDA stream, whose order of work it writes down."""

    def __init__(self, device: Any = None) -> None:
        self.device, self.seen = device, []

    def wait_stream(self, other: "FakeStream") -> None:
        self.seen.append(other)


def test_what_a_side_stream_copies_is_waited_for_and_not_overwritten_while_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = FakeStream()
    entered, held = [], []
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(entered.append(stream)))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda part, stream: held.append((id(part), stream)))
    side = SideStream(torch.device("cuda", 0))
    batch = random_batch(config_of(1), slice(0, 4))
    with side:
        assert now.seen == []
    assert side.taken(batch) is batch
    assert now.seen == entered
    assert held == [(id(part), now) for part in batch if isinstance(part, torch.Tensor)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_batch_that_a_slow_side_stream_makes_is_whole_where_it_is_used() -> None:
    config, device = config_of(1), torch.device("cuda", 0)
    block = next(MemoryBlocks(config, STUDIES).whole())
    expected = Batcher(config, 0, CPU)(block, (len(np.concatenate(block.sentence_hashes)),), training=True)
    side, batcher = SideStream(device), Batcher(config, 0, device)
    for _ in range(3):  # the third in the memory of the first
        with side:
            torch.cuda._sleep(10**8)
            made = batcher(block, expected.rank_sentences, training=True)
        assert torch.equal((side.taken(made).image_B1HW * 1).cpu(), expected.image_B1HW)


def late_step() -> list[str]:
    """The studies of three steps; each rank reads one of them before the other one may begin to."""
    config, rank = config_of(2), distributed.rank()
    reader = StepReader(MemoryBlocks(config, STUDIES, bad=BAD), Batcher(config, 0, CPU), Cursor(), 1, lambda: False)
    others = dist.new_group(backend="gloo")  # its barrier does not change the order of the steps' own collectives
    digests = [reader.next_step().studies_digest]
    for first in (0, 1):
        if rank == first:
            digests.append(reader.next_step().studies_digest)
        dist.barrier(others)
        if rank != first:
            digests.append(reader.next_step().studies_digest)
        dist.barrier(others)
    return digests


@pytest.mark.distributed
def test_a_rank_reads_its_step_while_another_one_has_not_begun_to() -> None:
    """If it waited for the other one, neither would go on."""
    first, second = run_on_ranks(2, late_step)
    assert first == second == read(1, 1, 3)["digests"]


@pytest.mark.distributed
def test_a_block_that_was_dealt_to_another_rank_is_an_error() -> None:
    assert run_on_ranks(2, misdealt) == ["a block that was dealt to another rank, or to 2 ranks"] * 2


def misdealt() -> str:
    config, rank = config_of(2), distributed.rank()
    source = MemoryBlocks(config, STUDIES)
    facts_W5 = next(source.whole()).facts_W5[::-1]
    source.open = lambda stretch: (  # type: ignore[method-assign]
        replace(block, dealt_W5=facts_W5) for block in MemoryBlocks(config, STUDIES).open(stretch)
    )
    with pytest.raises(RuntimeError, match=f"rank {rank} of 2 has") as error:
        StepReader(source, Batcher(config, 0, CPU), Cursor(), 1, lambda: False).next_step()
    return str(error.value).partition("has ")[2]


def crops(ranks: int) -> dict[int, tuple[float, list[bool]]]:
    """Each study's pixels and mask, by study."""
    config = config_of(ranks)
    source = MemoryBlocks(config, STUDIES)
    step = StepReader(source, Batcher(config, 0, CPU), Cursor(), 1, lambda: False).next_step()
    keys = next(MemoryBlocks(config, STUDIES).whole()).draw_keys
    [batch] = step.microbatches
    return {
        int(key): (float(image.double().sum()), mask.tolist())
        for key, image, mask in zip(keys, batch.image_B1HW, mask_positions(batch.draw_key_B, 16, 0.5), strict=True)
    }


@pytest.mark.distributed
def test_a_studys_crop_and_mask_do_not_depend_on_its_rank() -> None:
    first, second = run_on_ranks(2, crops, 2)
    assert first | second == crops(1)


def validation_rows() -> list[tuple[int, bool, int]]:
    config = small_config(num_workers=2, microbatch_size=4, global_batch_size=8)
    source = MemoryBlocks(config, 0, validation=14)  # blocks of 4, 4, 4, 2 on two ranks; 10 on three
    batches = validation_batches(source, Batcher(config, 0, CPU), 4)
    return [(real, whole, len(batch.token_BT)) for batch, real, whole in batches]


@pytest.mark.distributed
def test_validation_shows_every_study_once_and_fills_up_with_rows_that_do_not_count() -> None:
    for ranks in (2, 3):
        found = run_on_ranks(ranks, validation_rows)
        assert sum(real for rank in found for real, _, _ in rank) == 14
        assert len({len(rank) for rank in found}) == 1  # forwards are collective
        assert all(size == 4 for rank in found for _, _, size in rank)
        assert [whole for _, whole, _ in found[0]] == [True, False]


def test_validation_crops_the_middle() -> None:
    config = small_config(num_workers=1, microbatch_size=4, global_batch_size=8)
    source = MemoryBlocks(config, 0, validation=4)
    [(batch, real, whole)] = validation_batches(source, Batcher(config, 0, CPU), 4)
    stored_BRR = next(source.open_validation()).images_BRR
    expected = torch.from_numpy(stored_BRR[:, 4:36, 4:36].astype(np.float32)) / 127.5 - 1
    assert (real, whole) == (4, True)
    torch.testing.assert_close(batch.image_B1HW[:, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("speed", "left"), [(1000, 8000), (10, 640)])
def test_the_next_epoch_begins_so_long_before_it_is_needed(
    speed: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 s at the speed of this epoch, without its slow start and its first buffered studies, and at least ``least`` studies."""
    clock = [0.0]
    monkeypatch.setattr(steps.time, "monotonic", lambda: clock[0])
    timer, position = PrefetchTimer(100_000, least=640), 0
    clock[0] += 30  # until the first block
    for _ in range(5):  # already buffered
        position += 100
        assert not timer.is_due(position)
        clock[0] += 0.01
    while not timer.is_due(position):
        position += 10
        clock[0] += 10 / speed
    assert 100_000 - position == pytest.approx(left, rel=0.02)


def test_an_epoch_that_is_over_at_once_goes_by_the_speed_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, timer = [0.0], PrefetchTimer(1_000, least=10)
    monkeypatch.setattr(steps.time, "monotonic", lambda: clock[0])
    begun_at = []
    for _ in range(2):
        timer.start(1_000)
        for position in range(1, 1_001):
            clock[0] += 0.001  # a second in all
            if timer.is_due(position):
                begun_at.append(position)
                break
        while position < 1_000:
            position += 1
            clock[0] += 0.001
            timer.is_due(position)
    assert begun_at == [990, 1]
