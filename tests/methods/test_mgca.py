"""MGCA against the published functions, a loop over studies and words, and its rules about padding, attention and prototypes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.data.batch import ImageReportBatch
from cmcgns.errors import UserError
from cmcgns.methods.base import load_method
from cmcgns.methods.codes import Prototypes, codes_of_all_ranks, own_rows, sinkhorn, swapped_loss
from cmcgns.methods.contrastive import contrastive_loss, directed_losses
from cmcgns.methods.mgca import MgcaOutputs, Settings, attended, clipped_weights, token_alignment_loss
from cmcgns.methods.within_study import equal_weights, within_study_losses
from cmcgns.models.attention import unit
from cmcgns.models.retrieval import recall
from cmcgns.models.text import whole_words
from cmcgns.train.engine import build_engine
from tests.golden import golden
from tests.ranks import run_on_ranks
from tests.small import losses_of, random_batch, small_config, small_model
from tests.train.test_trainer import config_of as run_config
from tests.train.test_trainer import start

EXACT = {"rtol": 0.0, "atol": 1e-12}
NUMBERS = golden("mgca")
REAL_BT = ~NUMBERS["in.word_is_padding_BT"]


def word_weights() -> Tensor:
    """Weights by attention, which [SEP] and padding have none of."""
    attention_BT = NUMBERS["in.word_attention_BT"]
    return clipped_weights(attention_BT, attention_BT > 0)


def patch_weights(kind: str) -> Tensor:
    if kind == "resnet":
        return torch.full((6, 10), 0.1, dtype=torch.float64)
    attention_BP = NUMBERS["in.vit_attention_BHLL"][:, :, 0, 1:].mean(1)
    return clipped_weights(attention_BP, torch.ones_like(attention_BP, dtype=torch.bool))


def outputs_of(kind: str, raw: list[Tensor], mask_BT: Tensor, weight_BT: Tensor) -> MgcaOutputs:
    patches_BPD, words_BTD = (unit(each) for each in raw)
    return MgcaOutputs(
        image_BD=unit(NUMBERS["in.image_BD"]), report_BD=unit(NUMBERS["in.report_BD"]),
        sentences_BSD=torch.zeros(6, 1, 16), patches_BPD=patches_BPD, words_BTD=words_BTD, word_mask_BT=mask_BT,
        word_weight_BT=weight_BT, patch_weight_BP=patch_weights(kind), sentence_of_word_BT=mask_BT.long() - 1,
        prototypes_KD=None,
    )  # fmt: skip


def raw_parts() -> list[Tensor]:
    return [NUMBERS[f"in.{name}"].clone().requires_grad_() for name in ("patches_BPD", "words_BTD")]


OWN = {"resnet": Settings(), "vit": Settings(attended_patches="raw")}


@pytest.mark.parametrize("kind", ["resnet", "vit", "resnet_as_published"])
def test_the_global_loss_is_twice_ours_and_the_published_one(kind: str) -> None:
    raw = [NUMBERS[f"in.{name}"].clone().requires_grad_() for name in ("image_BD", "report_BD")]
    units, scale = [unit(rows) for rows in raw], torch.full((1,), 1 / 0.07, dtype=torch.float64)
    films, reports = directed_losses(units[0], units[1], None, scale)
    torch.testing.assert_close(films + reports, NUMBERS[f"{kind}.loss_ita"], **EXACT)
    torch.testing.assert_close(films + reports, 2 * contrastive_loss(*units, torch.arange(6), scale), **EXACT)
    for found, name in zip(torch.autograd.grad(films + reports, raw), ("image_BD", "report_BD"), strict=True):
        torch.testing.assert_close(found, NUMBERS[f"{kind}.grad_ita.{name}"], **EXACT)


@pytest.mark.parametrize("kind", OWN)
def test_words_and_patches_give_the_published_numbers_if_padding_is_a_negative(kind: str) -> None:
    raw, weight_BT = raw_parts(), word_weights()
    patches_BPD, words_BTD = (unit(each) for each in raw)
    seen_BTD, read_BPD = unit(attended(words_BTD, patches_BPD, 10.0)), attended(patches_BPD, words_BTD, 10.0, REAL_BT)
    read_BPD = unit(read_BPD) if kind == "resnet" else read_BPD
    for name, found in (
        ("attended_words_BTD", seen_BTD), ("attended_patches_BPD", read_BPD),
        ("word_weights_BT", weight_BT), ("patch_weights_BP", patch_weights(kind)),
    ):  # fmt: skip
        torch.testing.assert_close(found, NUMBERS[f"{kind}.{name}"], **EXACT)
    words = within_study_losses(words_BTD, seen_BTD, weight_BT, 10.0)  # the defect: no mask
    patches = within_study_losses(patches_BPD, read_BPD, patch_weights(kind), 10.0)
    for name, pair in (("words", words), ("patches", patches)):
        for number, found in enumerate(pair, start=1):
            torch.testing.assert_close(found, NUMBERS[f"{kind}.loss_{name}_{number}"], **EXACT)
    total = torch.stack([*words, *patches]).sum() / 2
    gradients = torch.autograd.grad(total, raw)
    for name in (kind, "resnet_as_published") if kind == "resnet" else (kind,):
        torch.testing.assert_close(total, NUMBERS[f"{name}.loss_cta"], **EXACT)
        for found, part in zip(gradients, ("patches_BPD", "words_BTD"), strict=True):
            torch.testing.assert_close(found, NUMBERS[f"{name}.grad_cta.{part}"], **EXACT)


@pytest.mark.parametrize("weights", ["ours", "ours_uniform"])
def test_without_padding_as_negatives_the_loss_is_smaller(weights: str) -> None:
    weight_BT = word_weights() if weights == "ours" else equal_weights(REAL_BT, torch.float64)
    outputs = outputs_of("resnet", raw_parts(), REAL_BT, weight_BT)
    found, _ = token_alignment_loss(outputs, Settings())
    torch.testing.assert_close(found, NUMBERS[f"{weights}.loss_cta"], **EXACT)
    assert found < NUMBERS["resnet.loss_cta"] - 0.2
    seen_BTD = unit(attended(outputs.words_BTD, outputs.patches_BPD, 10.0))
    words = within_study_losses(outputs.words_BTD, seen_BTD, weight_BT, 10.0, REAL_BT)
    for number, each in enumerate(words, start=1):
        torch.testing.assert_close(each, NUMBERS[f"{weights}.loss_words_{number}"], **EXACT)


def slow_token_loss(patches: Tensor, words: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The loss of words and patches in a loop over studies and parts, at temperature 0.1."""
    total = []
    for patch_PD, word_tD, weight_t in zip(patches, words, weights, strict=True):
        seen = [F.normalize((patch_PD @ word / 0.1).softmax(0) @ patch_PD, dim=0) for word in word_tD]
        read = [F.normalize((word_tD @ patch / 0.1).softmax(0) @ word_tD, dim=0) for patch in patch_PD]
        for own, found, weight in (
            (word_tD, seen, weight_t),
            (patch_PD, read, torch.full((len(patch_PD),), 0.1, dtype=torch.float64)),
        ):
            for each, share in enumerate(weight):
                forth = torch.stack([own[each] @ other for other in found]) / 0.1
                back = torch.stack([other @ found[each] for other in own]) / 0.1
                nll = forth.logsumexp(0) + back.logsumexp(0) - 2 * own[each] @ found[each] / 0.1
                total.append(share * nll / 2)
    return torch.stack(total).sum() / len(patches)


def test_the_loss_of_words_and_patches_and_its_gradients_are_those_of_a_loop() -> None:
    both, weight_BT = [raw_parts(), raw_parts()], equal_weights(REAL_BT, torch.float64)
    found, _ = token_alignment_loss(outputs_of("resnet", both[0], REAL_BT, weight_BT), Settings())
    patches_BPD, words_BTD = (unit(each) for each in both[1])
    words = [words_BTD[b, REAL_BT[b]] for b in range(6)]
    expected = slow_token_loss(patches_BPD, words, [weight_BT[b, REAL_BT[b]] for b in range(6)])
    torch.testing.assert_close(found, expected, **EXACT)
    for ours, theirs in zip(torch.autograd.grad(found, both[0]), torch.autograd.grad(expected, both[1]), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_padding_never_matters() -> None:
    weight_BT = equal_weights(REAL_BT, torch.float64)
    patches_BPD, words_BTD = (each.detach() for each in raw_parts())
    expected, _ = token_alignment_loss(outputs_of("resnet", [patches_BPD, words_BTD], REAL_BT, weight_BT), Settings())
    rubbish_BTD = torch.where(REAL_BT.unsqueeze(-1), words_BTD, torch.randn_like(words_BTD))
    longer = F.pad(rubbish_BTD, (0, 0, 0, 4), value=0.3), F.pad(REAL_BT, (0, 4)), F.pad(weight_BT, (0, 4))
    for words, mask, weight in ((rubbish_BTD, REAL_BT, weight_BT), longer):
        found, _ = token_alignment_loss(outputs_of("resnet", [patches_BPD, words], mask, weight), Settings())
        torch.testing.assert_close(found, expected, **EXACT)


def scores_of(raw: list[Tensor], prototypes_KD: Tensor) -> list[Tensor]:
    return [unit(each) @ prototypes_KD.T for each in raw]


@pytest.mark.parametrize("kind", ["resnet", "vit", "resnet_as_published"])
def test_codes_and_the_loss_of_prototypes_are_the_published_ones(kind: str) -> None:
    """The release rounds its codes to float32; `resnet` and `vit` are without that."""
    raw = [NUMBERS[f"in.{name}"].clone().requires_grad_() for name in ("image_BD", "report_BD")]
    module = Prototypes(12, 16).double()
    module.weight.data = unit(NUMBERS["in.prototypes_KD"])
    score_2BK = torch.stack([unit(each) for each in raw]) @ module().T
    codes = codes_of_all_ranks(score_2BK, None, 0.05, 3)
    if kind == "resnet_as_published":
        codes = codes.float().double()
    for code_BK, name, score_BK in zip(codes, ("image", "report"), score_2BK, strict=True):
        torch.testing.assert_close((score_BK / 0.05).exp().T, NUMBERS[f"{kind}.kernel_{name}_KB"], rtol=1e-12, atol=0)
        torch.testing.assert_close(code_BK, NUMBERS[f"{kind}.codes_{name}_BK"].double(), **EXACT)
    loss = swapped_loss(score_2BK, codes, 0.2)
    torch.testing.assert_close(loss, NUMBERS[f"{kind}.loss_cpa"], **EXACT)
    *found, prototypes_KD = torch.autograd.grad(loss, [*raw, module.weight])
    for each, name in zip(found, ("image_BD", "report_BD"), strict=True):
        torch.testing.assert_close(each, NUMBERS[f"{kind}.grad_cpa.{name}"], **EXACT)
    # ours is the part along the sphere: rows have length 1 inside the module, not before it
    published_KD, rows_KD = NUMBERS[f"{kind}.grad_cpa.prototypes_KD"], module.weight.detach()
    tangent_KD = published_KD - (published_KD * rows_KD).sum(1, keepdim=True) * rows_KD
    torch.testing.assert_close(prototypes_KD, tangent_KD, **EXACT)
    assert (loss - NUMBERS["resnet.loss_cpa"]).abs() < 1e-8


@torch.no_grad()
def test_recall_in_the_batch_is_the_published_accuracy() -> None:
    scores = recall(unit(NUMBERS["in.image_BD"]), unit(NUMBERS["in.report_BD"]), torch.arange(6))
    for kind in ("resnet", "vit", "resnet_as_published"):
        for depth in (1, 5):
            found = 50 * (scores[f"i2t_recall_at_{depth}"] + scores[f"t2i_recall_at_{depth}"])
            assert found == pytest.approx(float(NUMBERS[f"{kind}.acc{depth}"]), rel=1e-12)


def test_codes_of_halves_alone_are_others_and_more_rounds_balance_better() -> None:
    films_BK, _ = scores_of([NUMBERS["in.image_BD"], NUMBERS["in.report_BD"]], unit(NUMBERS["in.prototypes_KD"]))
    torch.testing.assert_close(sinkhorn(films_BK, 0.05, 3), NUMBERS["sinkhorn.whole_BK"], **EXACT)
    halves_BK = torch.cat([sinkhorn(half_BK, 0.05, 3) for half_BK in films_BK.split(3)])
    torch.testing.assert_close(halves_BK, NUMBERS["sinkhorn.two_halves_alone_BK"], **EXACT)
    assert (halves_BK - NUMBERS["sinkhorn.whole_BK"]).abs().max() > 0.3
    balanced_BK = sinkhorn(films_BK, 0.05, 2000)
    torch.testing.assert_close(balanced_BK, NUMBERS["sinkhorn.many_iterations_BK"], rtol=0, atol=1e-10)
    torch.testing.assert_close(balanced_BK.sum(0), torch.full((12,), 0.5, dtype=torch.float64), rtol=0, atol=1e-10)


def own_codes() -> Tensor:
    size = 6 // distributed.world_size()
    films_BK = scores_of([NUMBERS["in.image_BD"]], unit(NUMBERS["in.prototypes_KD"]))[0]
    mine_BK = films_BK.split(size)[distributed.rank()]
    return own_rows(codes_of_all_ranks(mine_BK.unsqueeze(0), None, 0.05, 3), size)[0]


@pytest.mark.distributed
def test_two_ranks_have_the_codes_of_one_whole_batch() -> None:
    torch.testing.assert_close(torch.cat(run_on_ranks(2, own_codes)), NUMBERS["sinkhorn.whole_BK"], **EXACT)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.7, 0.5)])
def test_weights_give_the_published_totals_if_padding_is_a_negative(kind: str, weights: tuple[float, ...]) -> None:
    """Words beyond a report's end are words here, as in the release, but what patches attend to has none of them."""
    names = ("global_weight", "token_weight", "prototype_weight")
    config = small_config(
        method__name="mgca", objective__num_prototypes=12, objective__attended_patches=OWN[kind].attended_patches,
        **{f"objective__{name}": weight for name, weight in zip(names, weights, strict=True)},
    )  # fmt: skip
    outputs = outputs_of(kind, raw_parts(), REAL_BT, word_weights())
    outputs = outputs._replace(prototypes_KD=unit(NUMBERS["in.prototypes_KD"]))
    batch = random_batch(config, slice(0, 6))._replace(report_hash_B=torch.arange(6))
    losses = losses_of(config, outputs, batch, None)
    # the only difference: the release's word losses have padding in their denominators
    words_BTD = outputs.words_BTD
    seen_BTD = unit(attended(words_BTD, outputs.patches_BPD, 10.0))
    both = [within_study_losses(words_BTD, seen_BTD, word_weights(), 10.0, mask) for mask in (None, REAL_BT)]
    padding = (torch.stack(both[0]) - torch.stack(both[1])).sum() / 2
    name = "loss_total_111" if weights == (1.0, 1.0, 1.0) else "loss_total_1_07_05"
    torch.testing.assert_close(losses.total + weights[1] * padding, NUMBERS[f"{kind}.{name}"], **EXACT)
    assert padding > 0.2
    if kind == "resnet":  # with codes rounded to float32
        as_published = NUMBERS[f"resnet_as_published.{name}"]
        rounding = weights[2] * (NUMBERS["resnet_as_published.loss_cpa"] - NUMBERS["resnet.loss_cpa"])
        torch.testing.assert_close(losses.total + weights[1] * padding + rounding, as_published, **EXACT)


def test_films_and_reports_are_interchangeable_for_the_loss_of_prototypes() -> None:
    config = small_config(method__name="mgca", objective__num_prototypes=12)
    outputs = outputs_of("resnet", raw_parts(), REAL_BT, word_weights())
    batch, losses = random_batch(config, slice(0, 6)), []
    both = outputs.image_BD, outputs.report_BD
    for image_BD, report_BD in (both, both[::-1]):
        swapped = outputs._replace(
            image_BD=image_BD, report_BD=report_BD, prototypes_KD=unit(NUMBERS["in.prototypes_KD"])
        )
        losses.append(losses_of(config, swapped, batch, None).weighted["loss_prototypes"])
    torch.testing.assert_close(*losses, **EXACT)


def model_and_batch(**more: Any) -> tuple[Any, Any, ImageReportBatch]:
    config = small_config(method__name="mgca", **{"objective__num_prototypes": 6, **more})
    return load_method(config), small_model(config).double().eval(), random_batch(config, slice(0, 17))


@torch.no_grad()
def test_words_and_patches_get_their_own_attention() -> None:
    """The release gives each word the attention that the next one gets."""
    weights = {"objective__word_weights": "attention", "objective__patch_weights": "attention"}
    _, model, batch = model_and_batch(**weights)
    outputs = model(batch)
    films = model.image_encoder.backbone(
        pixel_values=batch.image_B1HW.double().expand(-1, 3, -1, -1), output_attentions=True
    )
    for study in range(17):
        length = int(batch.token_mask_BT[study].sum())
        found = model.text_encoder.backbone(
            input_ids=batch.token_BT[study : study + 1, :length], output_attentions=True
        )
        for attention_H, weight in (
            (found.attentions[-1][0, :, 0, 1:-1], outputs.word_weight_BT[study, 1 : length - 1]),
            (films.attentions[-1][study, :, 0, 1:], outputs.patch_weight_BP[study]),
        ):
            mean = attention_H.mean(0)
            clipped = mean.clamp(torch.quantile(mean, 0.1), torch.quantile(mean, 0.9))
            torch.testing.assert_close(weight, clipped / clipped.sum(), rtol=0, atol=1e-10)
        assert not outputs.word_weight_BT[study, length - 1 :].any()
        assert int(outputs.word_mask_BT[study].sum()) == length - 2  # neither [CLS] nor [SEP]
    _, with_separator, _ = model_and_batch(objective__separator=True)
    assert torch.equal(with_separator(batch).word_mask_BT.sum(1), outputs.word_mask_BT.sum(1) + 1)


@torch.no_grad()
def test_a_whole_word_gets_the_attention_of_its_pieces() -> None:
    """`[CLS] small pleural eff ##usion [SEP]` with attention = position: weights 1, 2, 3 + 4; the release has 2, 3, 4 + 5."""
    continues = torch.tensor([[False, False, False, False, True, False, False, False]])
    owner = torch.tensor([[-1, 0, 0, 0, 0, -1, -1, -1]])
    summed, owner_of_word = whole_words(torch.arange(8.0).view(1, 8, 1), continues, owner)
    assert owner_of_word.tolist() == [[-1, 0, 0, 0, -1, -1, -1, -1]]
    assert summed[0, :5, 0].tolist() == [0, 1, 2, 3 + 4, 5]
    config = small_config(
        method__name="mgca", objective__num_prototypes=6, objective__whole_words=True, objective__word_weights="attention",
        objective__separator=True,
    )  # fmt: skip
    model, batch = small_model(config).double().eval(), random_batch(config, slice(0, 17))
    pieces = small_model(
        config.model_copy(update={"objective": config.objective.model_copy(update={"whole_words": False})})
    )
    _, attention_BT = pieces.double().eval()._read_reports(batch)
    outputs = model(batch)
    assert batch.continues_BT is not None
    for study in range(17):
        length = int(batch.token_mask_BT[study].sum())
        starts = [place for place in range(1, length) if not batch.continues_BT[study, place]]
        sums = torch.stack([attention_BT[study, a:b].sum() for a, b in pairwise(starts)])
        clipped = sums.clamp(torch.quantile(sums, 0.1), torch.quantile(sums, 0.9))
        found = outputs.word_weight_BT[study]
        torch.testing.assert_close(found[1 : len(starts)], clipped / clipped.sum(), rtol=0, atol=1e-10)
        assert not found[len(starts) :].any()
        assert int(outputs.word_mask_BT[study].sum()) == len(starts)  # with [SEP]


@torch.no_grad()
def test_a_sentence_attends_as_its_words_do_on_average() -> None:
    method, model, batch = model_and_batch()
    outputs = model(batch)
    attention = method.attention(model, outputs)
    for study in range(17):
        for s in range(int(batch.sentence_mask_BS[study].sum())):
            words_tD = outputs.words_BTD[study, batch.sentence_of_token_BT[study] == s]
            expected_P = (words_tD @ outputs.patches_BPD[study].T / 0.1).softmax(1).mean(0)
            torch.testing.assert_close(attention.weight_BSP[study, s], expected_P, rtol=0, atol=1e-10)
            expected_D = expected_P @ outputs.patches_BPD[study]
            torch.testing.assert_close(attention.attended_BSD[study, s], expected_D, rtol=0, atol=1e-10)


def test_prototypes_keep_their_direction_until_freeze_steps_and_then_turn() -> None:
    config = small_config(
        method__name="mgca", objective__num_prototypes=6, objective__freeze_steps=2, engine="torch", zero_stage=0,
        weight_decay=0.1,
    )  # fmt: skip
    batch, method = random_batch(config, slice(0, 6)), load_method(config)
    engine = build_engine(small_model(config), config.train, torch.device("cpu"), method.frozen(1))
    start_KD, others = unit(engine.weights()["prototypes.weight"]), engine.weights()["patch_projection.weight"]
    for step in (1, 2, 3):
        losses = method.losses(engine(batch, 1), batch, {}, 1, step)
        engine.backward(losses.total, last=True)
        engine.step(1e-2)
        turned = (unit(engine.weights()["prototypes.weight"]) - start_KD).abs().max()
        assert turned < 1e-6 if step <= 2 else turned > 1e-3
    assert not torch.equal(engine.weights()["patch_projection.weight"], others)


def test_centroids_of_the_pool_stand_in_for_prototypes_once_there_are_any() -> None:
    config = small_config(method__name="mgca", objective__num_prototypes=6, objective__prototype_source="pool")
    method, model, batch = load_method(config), small_model(config).double(), random_batch(config, slice(0, 8))
    assert [(bank.num_clusters, bank.rows_each, bank.per_sentence) for bank in method.banks] == [(6, 2, False)]
    assert not any(name.startswith("prototypes") for name, _ in model.named_parameters())
    outputs = model(batch)
    before = losses_of(config, outputs, batch, None)
    assert not float(before.weighted["loss_prototypes"].detach())
    assert before.bank_rows["studies"].shape == (16, 32)
    centroids_KD = F.normalize(torch.randn(6, 32, dtype=torch.float64), dim=1)
    found = losses_of(config, outputs, batch, centroids_KD).weighted["loss_prototypes"]
    scores = scores_of([outputs.image_BD, outputs.report_BD], centroids_KD)
    expected = swapped_loss(torch.stack(scores), torch.stack([sinkhorn(each, 0.05, 3) for each in scores]), 0.2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_run_clusters_films_and_reports_together(tmp_path: Path) -> None:
    config = run_config(
        method__name="mgca", objective__num_prototypes=6, objective__prototype_source="pool", stage2_steps=0,
        checkpoint_every=24,
    )  # fmt: skip
    run = start(config, tmp_path / "run")
    assert run.trainer.train()
    clustering = run.trainer.parts.banks.first
    assert clustering.pushed == 24 * 2 * 32
    started = clustering.centroids.started_at
    assert started == 20  # 1024 rows are in the pool at step 16, and centroids are adopted one interval later
    for row in run.rows():
        assert (row["loss_prototypes"] > 0) == (row["centroids_version"] > 0 and row["step"] > started)


def test_what_an_encoder_does_not_have_is_refused() -> None:
    resnet = {"model__image_encoder": "resnet-tiny", "data__image_size": 64, "data__resize": 72}
    for more, message in (
        ({"objective__text_layers": 3}, "objective.text_layers 3: model.text_encoder bert-tiny has 2 layers"),
        ({"objective__patch_weights": "attention", **resnet}, r"patch_weights attention: a ResNetModel has no \[CLS\]"),
    ):
        with pytest.raises(UserError, match=message):
            load_method(small_config(method__name="mgca", **more)).build_model(100)
    assert (
        small_model(
            small_config(method__name="mgca", objective__text_layers=1)
        ).text_encoder.backbone.config.num_hidden_layers
        == 1
    )
