"""GLoRIA against the published functions, and loops over films, texts and words."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns.data.batch import ImageReportBatch
from cmcgns.errors import UserError
from cmcgns.methods import gloria
from cmcgns.methods.base import load_method
from cmcgns.methods.contrastive import contrastive_loss, directed_losses
from cmcgns.methods.gloria import Settings, local_losses, region_weights, text_scores, word_cosines
from tests.golden import golden
from tests.small import losses_of, random_batch, small_config, small_model

GOLDEN = {"rtol": 0.0, "atol": 1e-10}
VARIANTS = {"local": Settings(), "local_mean": Settings(words="mean"), "local_unit": Settings()}


def features(variant: str) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Regions (B, R, D), words (B, T, D), the features as published, of which they are views, and the mask of words."""
    numbers = golden("gloria")
    raw = [numbers["in.regions_BDHW"], numbers["in.words_BDT"]]
    if variant == "local_unit":
        raw = [F.normalize(each, dim=1) for each in raw]
    regions_BDHW, words_BDT = (each.requires_grad_() for each in raw)
    mask_BT = torch.arange(9) < numbers["in.word_counts_B"].unsqueeze(1)
    return regions_BDHW.flatten(2).mT, words_BDT.mT, [regions_BDHW, words_BDT], mask_BT


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_local_losses_and_their_gradients_are_the_published_ones(variant: str) -> None:
    numbers, own = golden("gloria"), VARIANTS[variant]
    regions_BRD, words_BTD, raw, mask_BT = features(variant)
    films, texts = local_losses(regions_BRD, words_BTD, mask_BT, torch.arange(5), own)
    torch.testing.assert_close(films, numbers[f"{variant}.loss_image_to_text"], **GOLDEN)
    torch.testing.assert_close(texts, numbers[f"{variant}.loss_text_to_image"], **GOLDEN)
    gradients = torch.autograd.grad(films + texts, raw)
    torch.testing.assert_close(gradients[0], numbers[f"{variant}.grad_regions_BDHW"], **GOLDEN)
    torch.testing.assert_close(gradients[1], numbers[f"{variant}.grad_words_BDT"], **GOLDEN)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_scores_and_attention_are_the_published_ones(variant: str) -> None:
    numbers, own = golden("gloria"), VARIANTS[variant]
    regions_BRD, words_BTD, _, mask_BT = features(variant)
    score_BB = text_scores(regions_BRD, words_BTD, mask_BT, own)
    torch.testing.assert_close(score_BB, numbers[f"{variant}.similarity_BB"], **GOLDEN)
    product_BBTR = torch.einsum("ctd,brd->bctr", words_BTD, regions_BRD)
    weight_BBTR = region_weights(product_BBTR, mask_BT, own.region_scale) * mask_BT.unsqueeze(-1)
    torch.testing.assert_close(weight_BBTR, numbers[f"{variant}.attention_BBTP"], **GOLDEN)
    attended_BBTD = torch.einsum("bctr,brd->bctd", weight_BBTR, regions_BRD)
    torch.testing.assert_close(attended_BBTD, numbers[f"{variant}.attended_BBTD"], **GOLDEN)
    gram_BRR = regions_BRD @ regions_BRD.mT
    cosine_BBT = word_cosines(product_BBTR, weight_BBTR, gram_BRR, words_BTD) * mask_BT
    torch.testing.assert_close(cosine_BBT, numbers[f"{variant}.cosine_BBT"], **GOLDEN)


def test_the_global_loss_is_twice_ours_at_scale_10_and_the_published_one() -> None:
    numbers = golden("gloria")
    raw = [numbers["in.image_BD"].requires_grad_(), numbers["in.report_BD"].requires_grad_()]
    units, scale = [F.normalize(rows, dim=1) for rows in raw], torch.full((1,), 10.0, dtype=torch.float64)
    films, texts = directed_losses(units[0], units[1], None, scale)
    torch.testing.assert_close(films, numbers["global.loss_image_to_text"], **GOLDEN)
    torch.testing.assert_close(texts, numbers["global.loss_text_to_image"], **GOLDEN)
    ours = contrastive_loss(units[0], units[1], torch.arange(5), scale)
    torch.testing.assert_close(films + texts, 2 * ours, **GOLDEN)
    for found, name in zip(torch.autograd.grad(films + texts, raw), ("image_BD", "report_BD"), strict=True):
        torch.testing.assert_close(found, numbers[f"global.grad_{name}"], **GOLDEN)


def test_both_losses_with_weight_1_give_the_published_total() -> None:
    numbers, config = golden("gloria"), small_config(method__name="gloria")
    regions_BRD, words_BTD, _, mask_BT = features("local")
    outputs = gloria.GloriaOutputs(
        image_BD=F.normalize(numbers["in.image_BD"], dim=1), report_BD=F.normalize(numbers["in.report_BD"], dim=1),
        sentences_BSD=torch.zeros(5, 1, 16), regions_BRD=regions_BRD, words_BTD=words_BTD, word_mask_BT=mask_BT,
        sentence_of_word_BT=mask_BT.long() - 1, text_hash_B=torch.arange(5),
    )  # fmt: skip
    batch = random_batch(config, slice(0, 5))
    torch.testing.assert_close(losses_of(config, outputs, batch, None).total, numbers["total.loss"], **GOLDEN)
    halved = small_config(method__name="gloria", objective__local_weight=0.5)
    difference = numbers["total.loss"] - losses_of(halved, outputs, batch, None).total
    local = numbers["local.loss_image_to_text"] + numbers["local.loss_text_to_image"]
    torch.testing.assert_close(difference, local / 2, **GOLDEN)


def test_padded_words_never_matter() -> None:
    regions_BRD, words_BTD, _, mask_BT = features("local")
    expected = local_losses(regions_BRD, words_BTD, mask_BT, None, Settings())
    rubbish_BTD = torch.where(mask_BT.unsqueeze(-1), words_BTD, 50 * torch.randn_like(words_BTD))
    found = local_losses(regions_BRD, rubbish_BTD, mask_BT, None, Settings())
    assert all(map(torch.equal, found, expected))
    longer = local_losses(
        regions_BRD, F.pad(words_BTD, (0, 0, 0, 7), value=3.0), F.pad(mask_BT, (0, 7)), None, Settings()
    )
    for ours, theirs in zip(longer, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_length_of_a_text_biases_films_only() -> None:
    regions_BRD, words_BTD, _, mask_BT = features("local")
    summed, mean = (text_scores(regions_BRD, words_BTD, mask_BT, Settings(words=kind)) for kind in ("sum", "mean"))
    torch.testing.assert_close(summed - mean, 10 * mask_BT.sum(1).log().double().expand(5, 5), rtol=0, atol=1e-5)
    both = [local_losses(regions_BRD, words_BTD, mask_BT, None, Settings(words=kind)) for kind in ("sum", "mean")]
    torch.testing.assert_close(both[0][1], both[1][1], rtol=0, atol=1e-10)
    assert (both[0][0] - both[1][0]).abs() > 1


@pytest.mark.parametrize("chunk", [1, 12 * 5 * 9 * 2, 12 * 5 * 9 * 3])
def test_chunks_of_texts_give_the_whole(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for limit in (gloria.CHUNK_WEIGHTS, chunk):
        monkeypatch.setattr(gloria, "CHUNK_WEIGHTS", limit)
        regions_BRD, words_BTD, raw, mask_BT = features("local")
        total = sum(local_losses(regions_BRD, words_BTD, mask_BT, torch.tensor([1, 2, 1, 3, 4]), Settings()))
        found.append([total, *torch.autograd.grad(total, raw)])
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, **GOLDEN)


def test_equal_texts_are_no_negatives_of_each_other() -> None:
    regions_BRD, words_BTD, _, mask_BT = features("local")
    score_BB = text_scores(regions_BRD, words_BTD, mask_BT, Settings())
    films, texts = local_losses(regions_BRD, words_BTD, mask_BT, torch.tensor([1, 2, 1, 3, 4]), Settings())
    score_BB[0, 2] = score_BB[2, 0] = -torch.inf
    torch.testing.assert_close(films, F.cross_entropy(score_BB, torch.arange(5)), **GOLDEN)
    torch.testing.assert_close(texts, F.cross_entropy(score_BB.T, torch.arange(5)), **GOLDEN)


def model_and_batch(**more: Any) -> tuple[Any, Any, ImageReportBatch]:
    config = small_config(method__name="gloria", **more)
    return load_method(config), small_model(config).double().eval(), random_batch(config, slice(0, 17))


@torch.no_grad()
def test_words_are_cls_and_the_tokens_of_sentences_and_layers_are_summed() -> None:
    _, model, batch = model_and_batch(objective__word_layers=2)
    outputs = model(batch)
    for study in range(17):
        length = int(batch.token_mask_BT[study].sum())
        found = model.text_encoder.backbone(
            input_ids=batch.token_BT[study : study + 1, :length], output_hidden_states=True
        ).hidden_states
        expected_TD = model.text_encoder.projection(found[-1][0] + found[-2][0])
        torch.testing.assert_close(outputs.words_BTD[study, :length], expected_TD, **GOLDEN)
        torch.testing.assert_close(outputs.report_BD[study], F.normalize(expected_TD.mean(0), dim=0), **GOLDEN)
        assert outputs.word_mask_BT[study].sum() == length - 1  # without [SEP]
        assert not outputs.word_mask_BT[study, length - 1 :].any()


@pytest.mark.parametrize("name", ["gloria", "mgca"])
@torch.no_grad()
def test_the_pieces_of_a_word_are_summed_to_one_word(name: str) -> None:
    config = small_config(method__name=name, objective__whole_words=True)
    model, batch = small_model(config).double().eval(), random_batch(config, slice(0, 17))
    outputs, encoder = model(batch), model.text_encoder
    assert batch.continues_BT is not None
    assert batch.continues_BT.sum() > 30
    for study in range(17):
        length = int(batch.token_mask_BT[study].sum())
        hidden_TC = encoder.backbone(input_ids=batch.token_BT[study : study + 1, :length]).last_hidden_state[0]
        sums, sentences = list[Tensor](), list[int]()
        for place in range(length):
            if batch.continues_BT[study, place]:
                sums[-1] = sums[-1] + hidden_TC[place]
            else:
                sums.append(hidden_TC[place])
                sentences.append(int(batch.sentence_of_token_BT[study, place]))
        expected_tD = encoder.projection(torch.stack(sums))
        if name == "mgca":
            expected_tD = F.normalize(expected_tD, dim=1)
        torch.testing.assert_close(outputs.words_BTD[study, : len(sums)], expected_tD, **GOLDEN)
        assert outputs.sentence_of_word_BT[study].tolist()[: len(sums)] == sentences
        real = [place for place, owner in enumerate(sentences) if owner >= 0 or (name == "gloria" and place == 0)]
        assert outputs.word_mask_BT[study].nonzero()[:, 0].tolist() == real  # [SEP] and padding are no words


@torch.no_grad()
def test_a_sentence_attends_as_its_words_do_on_average() -> None:
    method, model, batch = model_and_batch()
    outputs = model(batch)
    attention = method.attention(model, outputs)
    for study in range(17):
        real_T = outputs.word_mask_BT[study]
        product_TR = outputs.words_BTD[study, real_T] @ outputs.regions_BRD[study].T
        weight_TR = (4.0 * product_TR.softmax(0)).softmax(1)
        owner_T = batch.sentence_of_token_BT[study, real_T]
        for s in range(int(batch.sentence_mask_BS[study].sum())):
            expected_R = weight_TR[owner_T == s].mean(0)
            torch.testing.assert_close(attention.weight_BSP[study, s], expected_R, **GOLDEN)
            expected_D = expected_R @ outputs.regions_BRD[study]
            torch.testing.assert_close(attention.attended_BSD[study, s], expected_D, **GOLDEN)


@torch.no_grad()
def test_regions_before_the_last_stage_are_four_times_as_many_and_in_raster_order() -> None:
    resnet = {"model__image_encoder": "resnet-tiny", "data__image_size": 64, "data__resize": 72}
    _, model, batch = model_and_batch(objective__regions="before_last", **resnet)
    outputs = model(batch)
    stages = model.image_encoder.backbone(
        pixel_values=batch.image_B1HW.double().expand(-1, 3, -1, -1), output_hidden_states=True
    ).hidden_states
    assert stages[-2].shape[2:] == (4, 4)
    assert outputs.regions_BRD.shape == (17, 16, 32)
    expected_D = model.region_projection(stages[-2][3, :, 1, 2])
    torch.testing.assert_close(outputs.regions_BRD[3, 1 * 4 + 2], expected_D, **GOLDEN)
    _, last, _ = model_and_batch(**resnet)
    last.load_state_dict({key: value for key, value in model.state_dict().items() if "region" not in key}, strict=False)
    torch.testing.assert_close(outputs.image_BD, last(batch).image_BD, **GOLDEN)


def test_what_an_encoder_does_not_have_is_refused() -> None:
    for key, value, message in (
        ("regions", "before_last", "objective.regions before_last: a ViTModel has no stages"),
        ("word_layers", 3, "objective.word_layers 3: model.text_encoder bert-tiny has 2 layers; give at most 2"),
    ):
        config = small_config(method__name="gloria", **{f"objective__{key}": value})
        with pytest.raises(UserError, match=message):
            load_method(config).build_model(100)
