"""LoVT against the published classes, loops over cells and parts, and its rules about padding and equal sentences."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmcgns.data.batch import ImageReportBatch
from cmcgns.errors import UserError
from cmcgns.methods.base import load_method
from cmcgns.methods.contrastive import contrastive_loss, directed_losses
from cmcgns.methods.lovt import method as lovt_method
from cmcgns.methods.lovt import model as lovt_model
from cmcgns.methods.lovt.method import Settings, entropy, grid_positives, patch_losses, sentence_losses
from cmcgns.methods.lovt.model import Head, LovtOutputs, SymmetricAttention, WeightedPool, scattered, shares
from cmcgns.methods.within_study import equal_weights, same_sentences, within_study_losses
from cmcgns.models.attention import unit
from cmcgns.models.text import sentence_maxima
from tests.golden import golden
from tests.small import losses_of, random_batch, small_config, small_model

EXACT = {"rtol": 0.0, "atol": 1e-10}
NUMBERS = golden("lovt")
ROUNDED_PP = F.normalize(NUMBERS["positives.raw_3x3"].double(), p=1, dim=1)
"""Positives from the published distances, which are float32."""
MASK_BS = NUMBERS["in.sentence_mask"]
ROW_N = MASK_BS.flatten().nonzero()[:, 0]
FEATURES = ("patches", "sentences", "image", "report")


def published_attention(norm: str = "none") -> SymmetricAttention:
    attention = SymmetricAttention(16, norm).double()  # type: ignore[arg-type]
    for ours, theirs in (("key", "key"), ("value", "value"), ("output", "output")):
        for part in ("weight", "bias"):
            getattr(getattr(attention, ours), part).data = NUMBERS[f"w.attention.{theirs}_projection.{part}"].clone()
    return attention


def outputs_of(raw: dict[str, Tensor], attention: SymmetricAttention, **more: Tensor) -> LovtOutputs:
    read = attention(raw["patches"], raw["sentences"], MASK_BS, ROW_N)
    made = LovtOutputs(
        image_BD=unit(raw["image"]), report_BD=unit(raw["report"]), patches_BPD=unit(raw["patches"]),
        sentences_BSD=unit(raw["sentences"]), text_to_image_BPD=read.text_to_image_BPD,
        image_to_text_BSD=read.image_to_text_BSD, patch_weight_BP=NUMBERS["in.patch_weights"],
        sentence_weight_BS=NUMBERS["in.sentence_weights"], sentence_patch_weight_BSP=read.sentence_patch_weight_BSP,
    )  # fmt: skip
    return made._replace(**more)


def raw_features() -> dict[str, Tensor]:
    return {name: NUMBERS[f"in.{name}"].clone().requires_grad_() for name in FEATURES}


def batch_of_golden(config: Any) -> ImageReportBatch:
    """A batch with the golden sentences and four different reports."""
    return random_batch(config, slice(0, 4))._replace(
        sentence_mask_BS=MASK_BS, sentence_row_n=ROW_N, sentence_hash_n=NUMBERS["in.sentence_hash"],
        report_hash_B=torch.arange(4), rank_sentences=(13,),
    )  # fmt: skip


@pytest.fixture(name="rounded_positives")
def fixture_rounded_positives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method's losses with the published, rounded positives."""
    monkeypatch.setattr(lovt_method, "grid_positives", lambda *_: ROUNDED_PP)


@pytest.mark.usefixtures("rounded_positives")
def test_attention_losses_and_gradients_are_the_published_ones() -> None:
    config = small_config(method__name="lovt", objective__same_text="negatives")
    raw, attention = raw_features(), published_attention()
    outputs = outputs_of(raw, attention)
    score_BPS = attention.scores(raw["patches"], raw["sentences"])
    torch.testing.assert_close(score_BPS, NUMBERS["mid.scores"], **EXACT)
    torch.testing.assert_close(shares(score_BPS, MASK_BS), NUMBERS["mid.text_to_image_weights"], **EXACT)
    for name, found in (
        ("text_to_image", outputs.text_to_image_BPD),
        ("image_to_text_weights", outputs.sentence_patch_weight_BSP),
    ):
        torch.testing.assert_close(found, NUMBERS[f"mid.{name}"], **EXACT)
    torch.testing.assert_close(outputs.image_to_text_BSD[MASK_BS], NUMBERS["mid.image_to_text"][MASK_BS], **EXACT)
    for found, name in zip(patch_losses(outputs, ROUNDED_PP, Settings()), ("l2att", "att2l"), strict=True):
        torch.testing.assert_close(found, NUMBERS[f"loss.local_a_{name}_loss"], **EXACT)
    for found, name in zip(sentence_losses(outputs, MASK_BS, None, Settings()), ("l2att", "att2l"), strict=True):
        torch.testing.assert_close(found, NUMBERS[f"loss.local_b_{name}_loss"], **EXACT)
    scale = torch.full((1,), 10.0, dtype=torch.float64)
    both = directed_losses(outputs.image_BD, outputs.report_BD, None, scale)
    for found, name in zip(both, ("a2b", "b2a"), strict=True):
        torch.testing.assert_close(found, NUMBERS[f"loss.global_{name}_loss"], **EXACT)
        torch.testing.assert_close(found, NUMBERS[f"batchnorm.global_{name}_loss"], **EXACT)  # no norm takes part
    total = losses_of(config, outputs, batch_of_golden(config), None).total
    torch.testing.assert_close(total, NUMBERS["loss.total"], **EXACT)
    total.backward()
    for name in FEATURES:
        torch.testing.assert_close(raw[name].grad, NUMBERS[f"grad.{name}"], **EXACT)
    for name, parameter in attention.named_parameters():
        theirs = name.replace(".", "_projection.")
        torch.testing.assert_close(parameter.grad, NUMBERS[f"grad.w.attention.{theirs}"], **EXACT)


def test_the_published_distances_are_rounded_and_change_the_loss_by_less_than_a_hundred_millionth() -> None:
    config = small_config(method__name="lovt", objective__same_text="negatives")
    outputs = outputs_of(raw_features(), published_attention())
    ours = losses_of(config, outputs, batch_of_golden(config), None).total
    assert 0 < (ours - NUMBERS["loss.total"]).abs() < 1e-8


def test_each_part_has_the_published_loss_before_weights() -> None:
    """The loss whose weights single out one part of each study is the mean of that part's."""
    outputs = outputs_of(raw_features(), published_attention())
    for p in range(9):
        one_BP = F.one_hot(torch.full((4,), p), 9).double()
        for found, name in zip(
            patch_losses(outputs._replace(patch_weight_BP=one_BP), ROUNDED_PP, Settings()),
            ("l2att", "att2l"),
            strict=True,
        ):
            torch.testing.assert_close(found, NUMBERS[f"ref.nll_local_a_{name}"][:, p].mean(), **EXACT)
    for s in range(5):
        one_BS = F.one_hot(torch.full((4,), s), 5).double() * MASK_BS
        for found, name in zip(
            sentence_losses(outputs._replace(sentence_weight_BS=one_BS), MASK_BS, None, Settings()),
            ("l2att", "att2l"), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(found, NUMBERS[f"ref.nll_local_b_{name}"][:, s].mean(), **EXACT)


@pytest.mark.usefixtures("rounded_positives")
def test_ablations_without_weights_and_without_distances_give_their_published_numbers() -> None:
    config = small_config(method__name="lovt", objective__same_text="negatives")
    outputs = outputs_of(raw_features(), published_attention())
    everything = torch.ones(4, 9, dtype=torch.bool)
    equal = outputs._replace(
        patch_weight_BP=equal_weights(everything, torch.float64),
        sentence_weight_BS=equal_weights(MASK_BS, torch.float64),
    )
    local = (
        patch_losses(equal, ROUNDED_PP, Settings()),
        sentence_losses(equal, MASK_BS, None, Settings()),
    )
    for part, losses in zip("ab", local, strict=True):
        for found, name in zip(losses, ("l2att", "att2l"), strict=True):
            torch.testing.assert_close(found, NUMBERS[f"unweighted.local_{part}_{name}_loss"], **EXACT)
    total = losses_of(config, equal, batch_of_golden(config), None).total
    torch.testing.assert_close(total, NUMBERS["unweighted.total"], **EXACT)
    flat = patch_losses(outputs, grid_positives(9, 0.5, 1e15), Settings())
    for found, name in zip(flat, ("l2att", "att2l"), strict=True):
        torch.testing.assert_close(found, NUMBERS[f"unsmoothed.local_a_{name}_loss"], **EXACT)


@pytest.mark.usefixtures("rounded_positives")
def test_batch_norm_counts_real_sentences_only_where_the_published_one_counts_padding() -> None:
    outputs = outputs_of(raw_features(), published_attention("batch"))
    torch.testing.assert_close(outputs.text_to_image_BPD, NUMBERS["batchnorm.text_to_image"], **EXACT)
    found_nD = outputs.image_to_text_BSD[MASK_BS]
    expected_nD = NUMBERS["ref.batchnorm_real_rows_image_to_text"][MASK_BS]
    torch.testing.assert_close(found_nD, expected_nD, **EXACT)
    for found, name in zip(patch_losses(outputs, ROUNDED_PP, Settings()), ("l2att", "att2l"), strict=True):
        torch.testing.assert_close(found, NUMBERS[f"batchnorm.local_a_{name}_loss"], **EXACT)
    losses = sentence_losses(outputs, MASK_BS, None, Settings())
    for found, name in zip(losses, ("l2att", "att2l"), strict=True):
        torch.testing.assert_close(found, NUMBERS[f"ref.batchnorm_real_rows_local_b_{name}_loss"], **EXACT)
        assert (found - NUMBERS[f"batchnorm.local_b_{name}_loss"]).abs() > 5e-3
    config = small_config(method__name="lovt", objective__same_text="negatives")
    total = losses_of(config, outputs, batch_of_golden(config), None).total
    torch.testing.assert_close(total, NUMBERS["ref.batchnorm_real_rows_total"], **EXACT)


@pytest.mark.parametrize(("more", "published"), [(0, "batchnorm."), (3, "defect.batchnorm_more_padding_")])
@pytest.mark.usefixtures("rounded_positives")
def test_the_published_batch_norm_counts_padding_which_changes_its_losses(more: int, published: str) -> None:
    """Its total is 7.867, and 7.868 with three more padded sentences; ours is the same with any padding."""
    config = small_config(method__name="lovt", objective__same_text="negatives")
    outputs = outputs_of(raw_features(), published_attention("batch"))
    attention = published_attention()
    weight_BSP = F.pad(NUMBERS["mid.image_to_text_weights"], (0, 0, 0, more))
    rows_BSD = attention.output(weight_BSP @ attention.value(NUMBERS["in.patches"]))
    seen_BSD = nn.BatchNorm1d(16).double()(rows_BSD.flatten(0, 1)).view_as(rows_BSD)[:, :5]
    if not more:
        torch.testing.assert_close(seen_BSD, NUMBERS["batchnorm.image_to_text"], **EXACT)
    outputs = outputs._replace(image_to_text_BSD=seen_BSD)
    for found, name in zip(sentence_losses(outputs, MASK_BS, None, Settings()), ("l2att", "att2l"), strict=True):
        if f"{published}local_b_{name}_loss" in NUMBERS:
            torch.testing.assert_close(found, NUMBERS[f"{published}local_b_{name}_loss"], **EXACT)
    losses = losses_of(config, outputs, batch_of_golden(config), None)
    torch.testing.assert_close(losses.total, NUMBERS[f"{published}total"], **EXACT)
    assert (losses.total - NUMBERS["ref.batchnorm_real_rows_total"]).abs() > 1e-3


def published_pool() -> WeightedPool:
    pool = WeightedPool(16).double()
    for part in ("weight", "bias"):
        for layer, value in zip(
            (pool.q_proj, pool.k_proj, pool.v_proj), NUMBERS[f"w.pool.attention.in_proj_{part}"].chunk(3), strict=True
        ):
            getattr(layer, part).data = value
        getattr(pool.out_proj, part).data = NUMBERS[f"w.pool.attention.out_proj.{part}"]
    return pool


@torch.no_grad()
def test_pools_are_the_published_ones_but_for_the_mean_over_padding() -> None:
    pool, sentences_BSC = published_pool(), NUMBERS["in.pool_sentences"]
    image_BC, weight_BP = pool(NUMBERS["in.pool_patches"])
    torch.testing.assert_close(image_BC, NUMBERS["pool.image"], **EXACT)
    torch.testing.assert_close(weight_BP, NUMBERS["pool.patch_weights"], **EXACT)
    for rows_BSC, mask_BS in (
        (sentences_BSC, MASK_BS),
        (F.pad(sentences_BSC, (0, 0, 0, 3), value=9.0), F.pad(MASK_BS, (0, 3))),
    ):
        report_BC, weight_BS = pool(rows_BSC, mask_BS)
        torch.testing.assert_close(report_BC, NUMBERS["ref.pool_report_masked_mean"], **EXACT)
        torch.testing.assert_close(weight_BS[:, :5], NUMBERS["ref.pool_sentence_weights_masked_mean"], **EXACT)
        assert not weight_BS[~mask_BS].any()


@torch.no_grad()
def test_the_published_pool_asks_with_a_mean_over_padding_so_that_reports_depend_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lovt_model, "masked_mean", lambda parts_BLC, _: parts_BLC.mean(1))
    pool, sentences_BSC = published_pool(), NUMBERS["in.pool_sentences"]
    report_BC, weight_BS = pool(sentences_BSC, MASK_BS)
    torch.testing.assert_close(report_BC, NUMBERS["pool.report_published"], **EXACT)
    torch.testing.assert_close(weight_BS, NUMBERS["pool.sentence_weights_published"], **EXACT)
    longer_BC, _ = pool(F.pad(sentences_BSC, (0, 0, 0, 3)), F.pad(MASK_BS, (0, 3)))
    torch.testing.assert_close(longer_BC, NUMBERS["defect.pool_report_more_padding"], **EXACT)
    assert (longer_BC - report_BC).abs().max() > 1e-3
    full = MASK_BS.all(1)
    torch.testing.assert_close(report_BC[full], NUMBERS["ref.pool_report_masked_mean"][full], **EXACT)


def published_head(which: str) -> Head:
    head = Head(16, 32, 16, "batch").double()
    for ours, theirs in ((head.first, "projection_before"), (head.norm, "norm"), (head.second, "projection_after")):
        for part in ("weight", "bias"):
            getattr(ours, part).data = NUMBERS[f"w.{which}_head.{theirs}.{part}"].reshape(getattr(ours, part).shape)
    return head


@torch.no_grad()
def test_heads_are_the_published_ones_over_real_rows() -> None:
    local, whole = published_head("local"), published_head("global")
    torch.testing.assert_close(local(NUMBERS["in.pool_patches"]), NUMBERS["head.patches"], **EXACT)
    torch.testing.assert_close(whole(NUMBERS["pool.image"]), NUMBERS["head.image"], **EXACT)
    sentences_BSC = NUMBERS["in.pool_sentences"]
    found_nD = local(sentences_BSC[MASK_BS])
    torch.testing.assert_close(found_nD, NUMBERS["ref.head_sentences_real_rows_only"], **EXACT)
    # the published statistics count padded rows
    published_BSD, more_BSD = local(sentences_BSC), local(F.pad(sentences_BSC, (0, 0, 0, 3)))[:, :5]
    torch.testing.assert_close(published_BSD, NUMBERS["head.sentences_published"], **EXACT)
    torch.testing.assert_close(more_BSD, NUMBERS["defect.head_sentences_more_padding"], **EXACT)
    assert (more_BSD[MASK_BS] - published_BSD[MASK_BS]).abs().max() > 1e-3
    assert torch.equal(scattered(found_nD, ROW_N, MASK_BS.shape)[MASK_BS], found_nD)


def test_maxima_are_the_published_ones() -> None:
    owner_BT = NUMBERS["in.max_pool_token_mask"].long() - 1
    found_B1D = sentence_maxima(NUMBERS["in.max_pool_tokens"], owner_BT, 1)
    torch.testing.assert_close(found_B1D[:, 0], NUMBERS["pool.max"], **EXACT)


def test_equal_sentences_of_a_report_leave_each_others_rows() -> None:
    outputs = outputs_of(raw_features(), published_attention())
    same_BSS = same_sentences(NUMBERS["in.sentence_hash"], ROW_N, MASK_BS)
    assert same_BSS.nonzero().tolist() == [[1, 0, 2], [1, 2, 0]]
    for found, name in zip(sentence_losses(outputs, MASK_BS, same_BSS, Settings()), ("l2att", "att2l"), strict=True):
        torch.testing.assert_close(found, NUMBERS[f"ref.local_b_{name}_same_text"], **EXACT)


def test_negatives_of_two_ranks_alone_give_the_published_smaller_loss() -> None:
    image_BD, report_BD = unit(NUMBERS["in.image"]), unit(NUMBERS["in.report"])
    scale = torch.full((1,), 10.0, dtype=torch.float64)
    halves = [directed_losses(image_BD[half], report_BD[half], None, scale) for half in (slice(0, 2), slice(2, 4))]
    for direction, name in enumerate(("a2b", "b2a")):
        alone = torch.stack([half[direction] for half in halves]).mean()
        torch.testing.assert_close(alone, NUMBERS[f"defect.global_{name}_two_ranks_published"], **EXACT)
        assert alone < NUMBERS[f"loss.global_{name}_loss"] - 0.6
    both = contrastive_loss(image_BD, report_BD, None, scale, 0.75)
    expected = 0.75 * NUMBERS["loss.global_a2b_loss"] + 0.25 * NUMBERS["loss.global_b2a_loss"]
    torch.testing.assert_close(both, expected, **EXACT)


@pytest.mark.parametrize("side", [3, 7, 8, 14])
def test_positives_are_those_of_a_loop_over_cells(side: int) -> None:
    found_PP = grid_positives(side**2, 0.5, 1.0)
    raw_PP = torch.zeros_like(found_PP)
    cells = [(row, column) for row in range(side) for column in range(side)]
    for k, (row, column) in enumerate(cells):
        for j, (other_row, other_column) in enumerate(cells):
            square = (row - other_row) ** 2 + (column - other_column) ** 2
            if 2 * square <= side**2:
                raw_PP[k, j] = math.exp(-math.sqrt(square / (2 * side**2)))
    torch.testing.assert_close(found_PP, raw_PP / raw_PP.sum(1, keepdim=True), rtol=0, atol=1e-15)
    assert torch.equal(raw_PP > 0, (raw_PP > 0).T)
    torch.testing.assert_close(found_PP.sum(1), torch.ones(side**2, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("side", [3, 7, 8, 14])
def test_the_published_positives_are_those_of_rounded_distances(side: int) -> None:
    """In float32, by torch's fast distances: of 14 x 14, eight pairs exactly at the radius fall outside of it or inside."""
    cells_P2 = torch.cartesian_prod(torch.arange(side), torch.arange(side)) / torch.tensor(2.0 * side**2).sqrt()
    distance_PP = torch.cdist(cells_P2, cells_P2)
    raw_PP = (-distance_PP).exp() * (distance_PP <= 0.5)
    torch.testing.assert_close(raw_PP, NUMBERS[f"positives.raw_{side}x{side}"], rtol=0, atol=0)
    share_PP = raw_PP / raw_PP.sum(1, keepdim=True)
    torch.testing.assert_close(share_PP, NUMBERS[f"positives.normalised_{side}x{side}"], rtol=0, atol=0)
    ours_PP = grid_positives(side**2, 0.5, 1.0)
    assert int(((ours_PP > 0) != (raw_PP > 0)).sum()) == (8 if side == 14 else 0)
    assert (ours_PP / ours_PP.diagonal().unsqueeze(1) - raw_PP)[(ours_PP > 0) == (raw_PP > 0)].abs().max() < 3e-4


def test_the_loss_of_patches_lies_between_its_floor_and_that_of_equal_vectors() -> None:
    target_PP, weight_1P = grid_positives(49, 0.5, 1.0), torch.full((1, 49), 1 / 49, dtype=torch.float64)
    floor = (weight_1P @ entropy(target_PP)).mean()
    assert float(floor) == pytest.approx(3.525, abs=5e-4)
    same_1PD = F.normalize(torch.ones(1, 49, 8, dtype=torch.float64), dim=-1)
    for found in within_study_losses(same_1PD, same_1PD, weight_1P, 3.0, target_LL=target_PP):
        assert float(found) == pytest.approx(math.log(49), abs=1e-12)
    identity_1PP = torch.eye(49, dtype=torch.float64).unsqueeze(0)
    reached, _ = within_study_losses(
        identity_1PP, target_PP.clamp(min=1e-300).log().mT.unsqueeze(0), weight_1P, 1.0, target_LL=target_PP
    )
    torch.testing.assert_close(reached, floor, **EXACT)
    random_1PD = F.normalize(torch.randn(1, 49, 8, dtype=torch.float64), dim=-1)
    assert all(
        found > floor for found in within_study_losses(random_1PD, same_1PD, weight_1P, 3.0, target_LL=target_PP)
    )


def test_mirrored_films_and_reordered_sentences_give_the_same_losses() -> None:
    raw, attention, target_PP = raw_features(), published_attention(), grid_positives(9, 0.5, 1.0)
    outputs = outputs_of(raw, attention)
    mirror_P = torch.arange(9).view(3, 3).flip(1).flatten()
    raw["patches"] = raw["patches"][:, mirror_P]
    mirrored = outputs_of(raw, attention, patch_weight_BP=NUMBERS["in.patch_weights"][:, mirror_P])
    torch.testing.assert_close(mirrored.text_to_image_BPD, outputs.text_to_image_BPD[:, mirror_P], **EXACT)
    for pair in (
        [patch_losses(each, target_PP, Settings()) for each in (outputs, mirrored)],
        [sentence_losses(each, MASK_BS, None, Settings()) for each in (outputs, mirrored)],
    ):
        torch.testing.assert_close(pair[0], pair[1], **EXACT)
    order_S = torch.tensor([2, 0, 1, 3, 4])  # of the first report, which has three sentences
    one = [
        outputs._replace(
            **{
                name: getattr(outputs, name)[:1, order]
                for name in ("sentences_BSD", "image_to_text_BSD", "sentence_weight_BS")
            }
        )
        for order in (torch.arange(5), order_S)
    ]
    losses = [sentence_losses(each, MASK_BS[:1], None, Settings()) for each in one]
    torch.testing.assert_close(losses[0], losses[1], **EXACT)


def test_reports_of_one_or_of_equal_sentences_teach_nothing() -> None:
    mask_BS, weight_BS = torch.tensor([[True, False, False]]), torch.tensor([[1.0, 0.0, 0.0]]).double()
    own_BSD, seen_BSD = (F.normalize(torch.randn(1, 3, 8).double(), dim=-1).requires_grad_() for _ in range(2))
    for found in within_study_losses(own_BSD, seen_BSD, weight_BS, 3.0, mask_BS):
        assert abs(float(found.detach())) < 1e-12
        assert all(
            not grad.abs().max() > 1e-12 for grad in torch.autograd.grad(found, [own_BSD, seen_BSD], retain_graph=True)
        )
    equal_BSD, everything = own_BSD[:, :1].expand(-1, 3, -1), torch.ones(1, 3, dtype=torch.bool)
    same_BSS, third = ~torch.eye(3, dtype=torch.bool).unsqueeze(0), torch.full((1, 3), 1 / 3).double()
    for left_out, expected in ((same_BSS, 0.0), (None, math.log(3))):
        for found in within_study_losses(equal_BSD, equal_BSD, third, 3.0, everything, left_out_BLL=left_out):
            assert float(found.detach()) == pytest.approx(expected, abs=1e-6)


def model_and_batch(**more: Any) -> tuple[Any, Any, ImageReportBatch]:
    config = small_config(method__name="lovt", **{"objective__hidden": 64, **more})
    return load_method(config), small_model(config).double(), random_batch(config, slice(0, 17))


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_padded_sentences_never_matter(norm: str) -> None:
    config = small_config(method__name="lovt", objective__hidden=64, objective__norm=norm)
    _, model, batch = model_and_batch(objective__norm=norm)
    longer_BS = F.pad(batch.sentence_mask_BS, (0, 3))
    padded = batch._replace(sentence_mask_BS=longer_BS, sentence_row_n=longer_BS.flatten().nonzero()[:, 0])
    totals = []
    for each in (batch, padded):
        outputs = model.train()(each)
        totals.append(losses_of(config, outputs, each, None).total)
        assert not outputs.image_to_text_BSD[~each.sentence_mask_BS].any()
        assert not outputs.sentences_BSD[~each.sentence_mask_BS].any()
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=1e-12)


def test_weights_sum_to_one_and_pass_no_gradient() -> None:
    method, model, batch = model_and_batch(objective__global_weight=0.0)
    outputs = model(batch)
    for weight, mask in (
        (outputs.patch_weight_BP, torch.ones_like(outputs.patch_weight_BP, dtype=torch.bool)),
        (outputs.sentence_weight_BS, batch.sentence_mask_BS),
    ):
        assert not weight.requires_grad
        assert not weight[~mask].any()
        torch.testing.assert_close(weight.sum(1), torch.ones(17, dtype=torch.float64), **EXACT)
    method.losses(outputs, batch, {}, 1, 1).total.backward()
    for name, parameter in model.named_parameters():
        if ".pool." in name and parameter.grad is not None:
            assert not parameter.grad.any(), name
    assert model.patch_projection.first.weight.grad.any()
    attention = method.attention(model, outputs)
    torch.testing.assert_close(attention.weight_BSP.sum(-1), batch.sentence_mask_BS.double(), **EXACT)


@torch.no_grad()
def test_reports_read_alone_are_those_of_the_batch() -> None:
    """Prompts are read by the text encoder without a batch."""
    _, model, batch = model_and_batch()
    outputs, encoder = model.eval()(batch), model.text_encoder
    sentences_BSD, report_BD = encoder(
        batch.token_BT, batch.token_mask_BT, batch.sentence_of_token_BT, batch.sentence_mask_BS
    )
    torch.testing.assert_close(sentences_BSD, outputs.sentences_BSD, **EXACT)
    torch.testing.assert_close(report_BD, outputs.report_BD, **EXACT)
    torch.testing.assert_close(model.embed_images(batch.image_B1HW.double())[1], outputs.image_BD, **EXACT)


def test_settings_that_cannot_work_are_refused() -> None:
    for more, message in (
        (
            {"objective__norm": "batch", "microbatch_size": 1, "global_batch_size": 2},
            "objective.norm batch needs train.microbatch_size of at least 2",
        ),
        ({"objective__frozen_text_layers": 3}, "frozen_text_layers 3: .*bert-tiny has 2 layers"),
    ):
        with pytest.raises(UserError, match=message):
            load_method(small_config(method__name="lovt", **more)).build_model(100)
