"""NaN and infinity on one of two ranks: both end with one message or both skip the step, and no checkpoint holds them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cmcgns import distributed
from cmcgns.data.batch import Batcher, ImageReportBatch
from cmcgns.data.record import Block
from cmcgns.errors import TrainingStoppedError
from cmcgns.train.checkpoint import Progress
from cmcgns.train.finite import FiniteCheck
from cmcgns.train.shards import copied
from cmcgns.train.steps import Cursor, StepData
from tests.ranks import run_on_ranks
from tests.small import losses_of, random_batch, small_config
from tests.train.test_skipped_steps import ENGINES, engine_of
from tests.train.test_trainer import config_of, start

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")
ROWS = [slice(0, 4), slice(4, 8)]


def said_of_terms(number: float) -> str:
    """What a rank says of a second term that is ``number`` on rank 1 alone."""
    check = FiniteCheck(CPU)
    terms_AT = torch.ones(2, 3)
    terms_AT[1, 1] = number if distributed.rank() == 1 else 1.0
    check.start(("loss", "loss_global", "loss_local"), terms_AT)
    data = StepData([], Cursor(2, 48), "00000000000000ab", False, False)
    try:
        check.check(7, Progress(epoch=2, position=32), data)
    except TrainingStoppedError as error:
        return str(error)
    return ""


def test_each_rank_names_step_term_rank_and_studies_of_a_loss_that_is_not_finite() -> None:
    for number in (float("nan"), float("inf")):
        said = run_on_ranks(2, said_of_terms, number)
        assert said[0] == said[1]
        assert said[0].startswith(
            "step 7: loss_global is not finite on rank 1, in the studies 32 to 47 of epoch 2's order (studies_digest "
            "00000000000000ab); the weights are those of step 6"
        )
    assert run_on_ranks(2, said_of_terms, 1.0) == ["", ""]


class SpoiledOnRank1(Batcher):
    """Puts a NaN into one pixel of rank 1's film in the sixth step."""

    calls = 0

    def __call__(self, block: Block, rank_sentences: tuple[int, ...], training: bool) -> ImageReportBatch:
        batch = super().__call__(block, rank_sentences, training)
        self.calls += 1
        if self.calls == 6 and distributed.rank() == 1:
            batch.image_B1HW[0, 0, 0, 0] = float("nan")
        return batch


def run_spoiled(folder: str, settings: dict[str, object]) -> tuple[str, list[str], bool, int]:
    """What ended a run with a NaN in step 6 on rank 1; its checkpoints, whether they are finite, and the last row's step."""
    config = config_of(
        num_workers=2, validate_every=None, checkpoint_every=2, log_every=1, clustering__start_step=100, **settings
    )
    run = start(config, Path(folder) / f"rank{distributed.rank()}", batcher=SpoiledOnRank1)
    with pytest.raises(TrainingStoppedError) as caught:
        run.trainer.train()
    saved = sorted(run.folder.glob("checkpoint_*/*_*.safetensors"))
    finite = all(value.isfinite().all() for path in saved for value in load_file(path).values())
    return str(caught.value), sorted({path.parent.name for path in saved}), finite, run.rows()[-1]["step"]


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "torch", "zero_stage": 0, "precision": "bf16"},
        {"engine": "deepspeed", "zero_stage": 2},
        {"engine": "deepspeed", "zero_stage": 3, "precision": "bf16"},
    ],
    ids=lambda settings: f"{settings['engine']}-{settings['zero_stage']}-{settings.get('precision', 'fp32')}",
)
def test_a_film_that_gives_nan_on_one_rank_ends_both_and_is_in_no_checkpoint(
    settings: dict[str, object], tmp_path: Path
) -> None:
    ends = run_on_ranks(2, run_spoiled, str(tmp_path), settings)
    assert ends[0] == ends[1]
    said, checkpoints, finite, last = ends[0]
    assert "step 6: loss_global" in said
    assert "the weights are those of step 5" in said
    assert (checkpoints, finite, last) == (["checkpoint_2", "checkpoint_4"], True, 5)


def moved_by_steps(engine_name: str, precision: str) -> list[bool]:
    """Whether each of three steps has moved weights and averages; the gradient of the second one is infinite on rank 1."""
    config = small_config(
        num_workers=2, microbatch_size=4, global_batch_size=8, precision=precision, **ENGINES[engine_name]
    )
    engine = engine_of(config)
    states, moved = [engine.weights() | copied(engine.optimizer_state())], []
    for number in range(3):
        batch = random_batch(config, ROWS[distributed.rank()], number, ROWS)
        loss = losses_of(config, engine(batch, 2), batch, None, 2).total
        spoiled = number == 1 and distributed.rank() == 1
        engine.backward(loss * float("inf") if spoiled else loss, last=True)
        engine.step(1e-3)
        states.append(engine.weights() | copied(engine.optimizer_state()))
        before, after = states[-2:]
        moved.append(before.keys() != after.keys() or any(not torch.equal(before[name], after[name]) for name in after))
        assert all(value.isfinite().all() for value in after.values())
    return moved


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ENGINES)
def test_both_ranks_skip_a_step_whose_gradient_is_infinite_on_one(name: str, precision: str) -> None:
    assert run_on_ranks(2, moved_by_steps, name, precision) == [[True, False, True]] * 2
