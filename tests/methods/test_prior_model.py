"""PRIOR's noise, assignment, decoder and stages."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmcgns.data.batch import NOISE_STREAM, ImageReportBatch, keyed_gumbel, sentence_keys
from cmcgns.errors import UserError
from cmcgns.methods.base import load_method
from cmcgns.methods.prior.matching import matches
from cmcgns.methods.prior.model import BANK, DECODERS, SentenceDecoder, rearranged, rows_of
from cmcgns.train.engine import build_engine
from tests.small import losses_of, random_batch, small_config, small_model
from tests.train.test_trainer import config_of as run_config
from tests.train.test_trainer import start

EXACT = {"rtol": 0.0, "atol": 1e-10}
SMALL = {
    "method__name": "prior", "objective__num_prototypes": 12, "objective__generated_sentences": 4,
    "objective__decoder_layers": 2,
}  # fmt: skip


def model_and_batch(**more: Any) -> tuple[Any, Any, ImageReportBatch]:
    config = small_config(**SMALL, **more)
    return load_method(config), small_model(config).double(), random_batch(config, slice(0, 17))


def test_noise_follows_study_and_sentence_alone() -> None:
    batch = random_batch(small_config(), slice(0, 12))
    size = batch.sentence_mask_BS.shape[1]
    noise_nK = keyed_gumbel(sentence_keys(batch.draw_key_B, batch.sentence_row_n, size), 7, NOISE_STREAM)
    part = random_batch(small_config(), slice(5, 9))  # another batch, another width
    part_nK = keyed_gumbel(
        sentence_keys(part.draw_key_B, part.sentence_row_n, part.sentence_mask_BS.shape[1]), 7, NOISE_STREAM
    )
    first = int(batch.sentence_mask_BS[:5].sum())
    assert torch.equal(noise_nK[first : first + len(part_nK)], part_nK)
    assert len(noise_nK.flatten().unique()) == noise_nK.numel()
    other_nK = keyed_gumbel(sentence_keys(batch.draw_key_B, batch.sentence_row_n, size), 7, NOISE_STREAM + 1)
    assert not torch.equal(noise_nK, other_nK)


def test_noise_has_the_moments_of_gumbels_distribution() -> None:
    noise = keyed_gumbel(torch.arange(1000), 1000, NOISE_STREAM)
    assert bool(noise.isfinite().all())
    assert float(noise.mean()) == pytest.approx(0.5772, abs=5e-3)
    assert float(noise.var()) == pytest.approx(1.645, abs=2e-2)


def test_rows_that_are_the_targets_in_any_order_are_found() -> None:
    """The release's order finds them for the ten orders that are their own inverse only."""
    target_QD = torch.randn(4, 8, dtype=torch.float64)
    ours, theirs = 0, 0
    for order in itertools.permutations(range(4)):
        generated_BQD, target_BQD = target_QD[list(order)].unsqueeze(0), target_QD.unsqueeze(0)
        match_BQ = matches(generated_BQD, target_BQD)
        ours += torch.equal(rearranged(generated_BQD, match_BQ), target_BQD)
        theirs += torch.equal(rearranged(generated_BQD, match_BQ.argsort(1)), target_BQD)
    assert (ours, theirs) == (24, 10)


def test_the_assignment_is_the_cheapest_of_all() -> None:
    source = torch.Generator().manual_seed(0)
    generated_BQD, target_BQD = (torch.randn(6, 5, 3, generator=source, dtype=torch.float64) for _ in range(2))
    match_BQ = matches(generated_BQD, target_BQD)
    cost = lambda study, order: float((generated_BQD[study, order] - target_BQD[study]).abs().sum())
    for study in range(6):
        best = min(cost(study, list(order)) for order in itertools.permutations(range(5)))
        assert cost(study, match_BQ[study]) == pytest.approx(best, abs=1e-12)


@torch.no_grad()
def test_every_generated_row_sees_every_other_and_positions_go_with_queries() -> None:
    decoder = SentenceDecoder(4, 16, 2, 8, 0.0).double()
    for parameter in decoder.layers.parameters():
        parameter.mul_(5.0)
    patches_BPD = torch.randn(3, 9, 16, dtype=torch.float64)
    before_BQD, move_D = decoder(patches_BPD), torch.randn(16, dtype=torch.float64)
    for row in range(4):
        decoder.query_QD[row] += move_D
        moved_BQ = (decoder(patches_BPD) - before_BQD).abs().amax(-1)
        decoder.query_QD[row] -= move_D
        assert (moved_BQ > 1e-9).all(), row
    order = torch.tensor([2, 0, 3, 1])
    for part in (decoder.query_QD, decoder.position_QD):
        part.copy_(part[order].clone())
    torch.testing.assert_close(decoder(patches_BPD), before_BQD[:, order], **EXACT)


def test_each_stage_trains_its_parts_and_leaves_the_others_bit_equal() -> None:
    config = small_config(**SMALL, engine="torch", zero_stage=0)
    method, batch = load_method(config), random_batch(config, slice(0, 6))
    weights = None
    for stage, still in ((1, (*BANK, *DECODERS)), (2, DECODERS), (3, ())):
        model = small_model(config)
        if weights is not None:
            model.load_state_dict(weights)
        engine = build_engine(model, config.train, torch.device("cpu"), method.frozen(stage))
        before = engine.weights()
        engine.backward(method.losses(engine(batch, stage), batch, {}, stage, 1).total, last=True)
        engine.step(1e-3)
        weights = engine.weights()
        for name, value in weights.items():
            if name == "text_encoder.bank.used":
                assert float(value) == float(stage > 1)
            elif not name.endswith(("key.bias", "k_proj.bias")):
                assert torch.equal(value, before[name]) == name.startswith(still or "\0"), (stage, name)


@torch.no_grad()
def test_after_stage_1_evaluation_reads_through_the_bank_without_noise() -> None:
    _, model, batch = model_and_batch()
    model.eval()
    assert torch.equal(model(batch).report_BD, model(batch, 1).report_BD)
    model.train()(batch, 2)
    model.eval()
    outputs, again = model(batch), model(batch, 2)
    assert torch.equal(outputs.report_BD, again.report_BD)
    assert outputs.generated_BQD is None
    tokens = batch.token_BT, batch.token_mask_BT, batch.sentence_of_token_BT, batch.sentence_mask_BS
    sentences_BSD, report_BD = model.text_encoder(*tokens)
    torch.testing.assert_close(report_BD, outputs.report_BD, **EXACT)
    torch.testing.assert_close(sentences_BSD, outputs.sentences_BSD, **EXACT)
    read_BSD, bank = model.text_encoder.read(batch), model.text_encoder.bank
    for study in range(17):
        for s in range(int(batch.sentence_mask_BS[study].sum())):
            share_K = (read_BSD[study, s] @ bank.weight.T / 0.9).softmax(0)
            torch.testing.assert_close(outputs.sentences_BSD[study, s], share_K @ bank.weight, **EXACT)
    assert not torch.equal(model(batch).report_BD, model(batch, 1).report_BD)


def first_choices(model: Any, batch: ImageReportBatch, unit_length: bool) -> float:
    """Share of sentences whose first choice survives the noise."""
    read_nD = rows_of(model.text_encoder.read(batch), batch.sentence_row_n)
    if unit_length:
        read_nD = torch.nn.functional.normalize(read_nD, dim=1)
    picked = model.text_encoder.bank(read_nD, model._noise(batch, 0))
    return float((picked.logits_nK.argmax(1) == picked.noisy_nK.argmax(1)).double().mean())


@torch.no_grad()
def test_the_first_choice_of_most_sentences_survives_the_noise_as_those_of_length_1_would_not() -> None:
    config = small_config(method__name="prior", model__embed_dim=128, objective__num_prototypes=64)
    model, batch = small_model(config).double(), random_batch(config, slice(0, 40))
    raw, unit_length = (first_choices(model, batch, each) for each in (False, True))
    assert raw > 0.5
    assert unit_length < 0.2


@torch.no_grad()
def test_a_sentence_attends_as_the_cross_attention_says() -> None:
    method, model, batch = model_and_batch()
    outputs = model.eval()(batch, 2)
    attention = method.attention(model, outputs)
    image, text = model.cross_attention.image, model.cross_attention.text
    for study in range(17):
        for s in range(int(batch.sentence_mask_BS[study].sum())):
            query_D = text["query"](outputs.sentences_BSD[study, s])
            weight_P = (image["key"](outputs.patches_BPD[study]) @ query_D / 32**0.5).sigmoid()
            torch.testing.assert_close(attention.weight_BSP[study, s], weight_P, **EXACT)
            attended_D = weight_P @ image["value"](outputs.patches_BPD[study])
            torch.testing.assert_close(attention.attended_BSD[study, s], attended_D, **EXACT)


def test_sentences_beyond_q_take_no_part_in_stage_3() -> None:
    config = small_config(**SMALL)
    model, batch = small_model(config).double(), random_batch(config, slice(0, 17))
    long_B = batch.sentence_mask_BS.sum(1) == 5
    assert long_B.any()
    totals: list[Tensor] = []
    for change in (0.0, 3.0):
        read = model.text_encoder.read(batch)
        read[:, 4] += change * batch.sentence_mask_BS[:, 4:5]
        model.text_encoder.read = lambda _, read=read: read
        outputs = model(batch, 3)
        assert not outputs.kept_BS[:, 4].any()
        totals.append(losses_of(config, outputs, batch, None, stage=3).total)
        del model.text_encoder.read
    torch.testing.assert_close(totals[0], totals[1], **EXACT)


def test_three_stages_start_from_the_best_weights_of_the_one_before_and_a_run_resumes_in_any(tmp_path: Path) -> None:
    config = run_config(
        **SMALL, microbatch_size=8, global_batch_size=16, stage1_steps=4, stage2_steps=4, stage3_steps=4,
        checkpoint_every=2, validate_every=2, warmup_steps=1, stage3_learning_rate=5e-4,
    )  # fmt: skip
    whole = start(config, tmp_path / "whole")
    assert whole.trainer.train()
    rows = whole.rows()
    assert [row["stage"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    assert [row["learning_rate"] for row in rows][1::4] == [1e-3, 1e-3, 5e-4]
    assert [("loss_prototypes" in row, "loss_generation" in row) for row in rows[3::4]] == [
        (False, False), (True, False), (True, True),
    ]  # fmt: skip
    assert whole.trainer.progress.best["step"] in (6, 8)  # of stage 2
    for step in (2, 6, 10):
        resumed = start(config, tmp_path / f"resumed_{step}", step, tmp_path / "whole")
        assert resumed.trainer.train()
        for ours, theirs in zip(resumed.rows(), rows, strict=True):
            assert (ours["step"], ours["loss"]) == (theirs["step"], theirs["loss"])


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match=r"objective.decoder_heads 5 does not divide model.embed_dim 32"):
        load_method(small_config(**SMALL, objective__decoder_heads=5)).build_model(100)
    with pytest.raises(ValueError, match=r"objective.num_prototypes 3 is less than objective.generated_sentences 4"):
        small_config(**{**SMALL, "objective__num_prototypes": 3})
    with pytest.raises(
        ValueError, match=r"give exactly one of train.stage3_steps and train.stage3_epochs, not neither"
    ):
        small_config(**SMALL, stage3_steps=None)
    with pytest.raises(ValueError, match=r"method cm-cgns has two stages, so train.stage3_steps 2 does not apply"):
        small_config(stage3_steps=2)
