"""Whole films against whole texts: drawn sentences, pooling, frozen layers, and SigLIP's loss against a loop."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns.data.batch import ImageReportBatch, with_one_sentence
from cmcgns.errors import UserError
from cmcgns.methods.base import load_method
from cmcgns.methods.siglip import sigmoid_loss
from cmcgns.train.engine import build_engine
from tests.small import losses_of, random_batch, small_config, small_model

EXACT = {"rtol": 0.0, "atol": 1e-10}


def sentence_of(batch: ImageReportBatch, study: int, sentence: int) -> list[int]:
    """Tokens of one sentence, with [CLS] and [SEP]."""
    length = int(batch.token_mask_BT[study].sum())
    owners, tokens = batch.sentence_of_token_BT[study, :length].tolist(), batch.token_BT[study, :length].tolist()
    return [token for token, owner in zip(tokens, owners, strict=True) if owner in (-1, sentence)]


def drawn_index(batch: ImageReportBatch, drawn: ImageReportBatch, study: int) -> int:
    """Which sentence of its report was drawn."""
    tokens = drawn.token_BT[study, : int(drawn.token_mask_BT[study].sum())].tolist()
    count = int(batch.sentence_mask_BS[study].sum())
    [index] = [s for s in range(count) if sentence_of(batch, study, s) == tokens]
    return index


def test_a_drawn_sentence_is_one_of_the_reports_and_brings_its_own_hash() -> None:
    batch = random_batch(small_config(), slice(0, 40))
    drawn = with_one_sentence(batch)
    starts = batch.sentence_mask_BS.sum(1).cumsum(0) - batch.sentence_mask_BS.sum(1)
    for study in range(40):
        index = drawn_index(batch, drawn, study)
        assert drawn.report_hash_B[study] == batch.sentence_hash_n[starts[study] + index]
        length = int(drawn.token_mask_BT[study].sum())
        assert drawn.token_mask_BT[study, :length].all()
        assert drawn.sentence_of_token_BT[study].tolist() == [
            0 if 0 < t < length - 1 else -1 for t in range(drawn.token_BT.shape[1])
        ]
    assert drawn.sentence_mask_BS.shape == (40, 1)


def test_a_drawn_sentence_follows_the_key_and_every_sentence_comes_up() -> None:
    batch = random_batch(small_config(), slice(0, 12))
    first = with_one_sentence(batch)
    later = with_one_sentence(random_batch(small_config(), slice(5, 12)))  # another batch, another width
    for study in range(7):
        length = int(later.token_mask_BT[study].sum())
        assert torch.equal(later.token_BT[study, :length], first.token_BT[study + 5, :length])
    seen: list[set[int]] = [set() for _ in range(12)]
    for epoch in range(60):
        drawn = with_one_sentence(batch._replace(draw_key_B=batch.draw_key_B * 1_000_003 + epoch))
        for study in range(12):
            seen[study].add(drawn_index(batch, drawn, study))
    assert [len(each) for each in seen] == batch.sentence_mask_BS.sum(1).tolist()


@torch.no_grad()
def test_a_drawn_sentence_is_read_as_if_it_stood_alone() -> None:
    """Neither the other sentences nor the place in the report change its embedding."""
    config = small_config(method__name="convirt", objective__caption="sentence")
    model, batch = small_model(config).double().eval(), random_batch(config, slice(0, 17))
    drawn = with_one_sentence(batch)
    _, report_BD = model.embed_reports(drawn)
    for study in range(17):
        length = int(drawn.token_mask_BT[study].sum())
        alone = [part[study : study + 1, :length] for part in (drawn.token_BT, drawn.token_mask_BT)]
        owner_1T = drawn.sentence_of_token_BT[study : study + 1, :length]
        _, expected_1D = model.text_encoder(*alone, owner_1T, torch.ones(1, 1, dtype=torch.bool))
        torch.testing.assert_close(report_BD[study], expected_1D[0], rtol=0, atol=1e-12)


def test_training_draws_sentences_and_validation_reads_whole_reports() -> None:
    config = small_config(method__name="convirt", objective__caption="sentence")
    model, batch = small_model(config), random_batch(config, slice(0, 8))
    trained, validated = model.train()(batch), model.eval()(batch)
    assert torch.equal(trained.text_hash_B, with_one_sentence(batch).report_hash_B)
    assert torch.equal(validated.text_hash_B, batch.report_hash_B)
    whole = small_model(small_config(method__name="convirt")).eval()(batch)
    assert torch.equal(validated.report_BD, whole.report_BD)


@pytest.mark.parametrize("pooling", ["max", "mean", "cls"])
@torch.no_grad()
def test_pooling_is_that_of_a_loop_over_tokens_without_padding(pooling: str) -> None:
    config = small_config(method__name="clip", objective__text_pooling=pooling, objective__heads="mlp")
    model, batch = small_model(config).double().eval(), random_batch(config, slice(0, 17))
    assert len(batch.slice_tokens) == 2
    encoder, outputs = model.text_encoder, model(batch)
    pool = {"max": lambda rows: rows.amax(0), "mean": lambda rows: rows.mean(0), "cls": lambda rows: rows[0]}[pooling]
    for study in range(17):
        length = int(batch.token_mask_BT[study].sum())
        hidden_TC = encoder.backbone(input_ids=batch.token_BT[study : study + 1, :length]).last_hidden_state[0]
        expected_D = F.normalize(encoder.projection(pool(hidden_TC)), dim=0)
        torch.testing.assert_close(outputs.report_BD[study], expected_D, **EXACT)
        for s, real in enumerate(batch.sentence_mask_BS[study]):
            rows = hidden_TC[batch.sentence_of_token_BT[study, :length] == s]
            pooled = rows.mean(0) if pooling == "cls" and real else pool(rows) if real else None
            expected_D = torch.zeros(32).double() if pooled is None else F.normalize(encoder.projection(pooled), dim=0)
            torch.testing.assert_close(outputs.sentences_BSD[study, s], expected_D, **EXACT)


@pytest.mark.parametrize("more", [{"method__name": "convirt"}, {"method__name": "lovt", "objective__hidden": 64}])
def test_frozen_layers_stay_bit_equal_and_out_of_the_optimizer(more: dict[str, Any]) -> None:
    config = small_config(objective__frozen_text_layers=1, engine="torch", zero_stage=0, **more)
    method, batch = load_method(config), random_batch(config, slice(0, 6))
    engine = build_engine(small_model(config), config.train, torch.device("cpu"), method.frozen(1))
    before = engine.weights()
    for _ in range(2):
        engine.backward(losses_of(config, engine(batch, 1), batch, None).total, last=True)
        engine.step(1e-3)
    frozen = tuple(f"text_encoder.backbone.{part}." for part in ("embeddings", "encoder.layer.0"))
    for name, value in engine.weights().items():
        # attention is invariant to a bias that is equal for all keys; the temperature is fixed
        if not name.endswith(("key.bias", "k_proj.bias", "log_scale")):
            assert torch.equal(value, before[name]) == name.startswith(frozen), name
    assert not any(name.removeprefix("exp_avg.").startswith(frozen) for name in engine.optimizer_state())


def test_more_frozen_layers_than_there_are_is_refused_with_their_number() -> None:
    config = small_config(method__name="convirt", objective__frozen_text_layers=3)
    with pytest.raises(UserError, match=r"frozen_text_layers 3: .*bert-tiny has 2 layers; give at most 2"):
        load_method(config).build_model(100)


def slow_sigmoid_loss(
    image: Tensor, report: Tensor, hashes: list[int], scale: float, bias: float, same_text: str
) -> Tensor:
    total = []
    for i in range(len(image)):
        for j in range(len(image)):
            same = i != j and hashes[i] == hashes[j]
            if same and same_text == "left_out":
                continue
            sign = 1 if i == j or (same and same_text == "positives") else -1
            total.append(-F.logsigmoid(sign * (scale * (image[i] @ report[j]) + bias)))
    return torch.stack(total).sum() / len(image)


@pytest.mark.parametrize("same_text", ["left_out", "negatives", "positives"])
def test_the_sigmoid_loss_and_its_gradients_are_those_of_a_loop_over_pairs(same_text: str) -> None:
    source = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(7, 8, generator=source, dtype=torch.float64), dim=1) for _ in range(2)]
    hashes = [3, 1, 3, 2, 5, 1, 3]
    both = [[part.clone().requires_grad_() for part in rows] for _ in range(2)]
    scale, bias = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (7.0, -4.0))
    found = sigmoid_loss(*both[0], torch.tensor(hashes), scale, bias, same_text)
    expected = slow_sigmoid_loss(*both[1], hashes, scale, bias, same_text)
    torch.testing.assert_close(found, expected, **EXACT)
    ours = torch.autograd.grad(found, [*both[0], scale, bias])
    for one, other in zip(ours, torch.autograd.grad(expected, [*both[1], scale, bias]), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_siglip_starts_from_the_published_scale_and_bias_and_learns_both() -> None:
    config = small_config(method__name="siglip")
    model, batch = small_model(config), random_batch(config, slice(0, 6))
    outputs = model(batch)
    assert float(outputs.scale.detach()) == pytest.approx(10.0)
    assert float(outputs.logit_bias.detach()) == -10.0
    losses_of(config, outputs, batch, None).total.backward()
    assert model.log_scale.grad.abs() > 0
    assert model.logit_bias.grad.abs() > 0
