"""Swapped prediction of codes against the published functions, its views, queue and k-means, and films without reports."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.methods.base import load_method
from cmcgns.methods.codes import codes_of_all_ranks, own_rows, sinkhorn, swapped_loss
from cmcgns.methods.images100m import CODED, Images100MOutputs, label_loss, statistics
from cmcgns.train.checkpoint import heads
from tests.golden import EXACT, golden
from tests.ranks import run_on_ranks
from tests.small import losses_of, random_batch, small_config, small_model
from tests.train.test_trainer import HostReads, config_of, start

ROUNDS = (1, 3, 10, 2000)


def unit_rows(raw_KD: Tensor) -> Tensor:
    return F.normalize(raw_KD, dim=-1)


def published(views: int, queue: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss and codes of the golden inputs, and the inputs with gradients."""
    numbers = golden("swav")
    raw = [
        numbers["in.embeddings_VBD"][:views].clone().requires_grad_(),
        numbers["in.prototypes_KD"].clone().requires_grad_(),
    ]
    rows_KD = unit_rows(raw[1])
    scores_VBK = raw[0] @ rows_KD.T
    queued_AQK = numbers["in.queue_2QD"] @ rows_KD.detach().T if queue else None
    codes_AGK = codes_of_all_ranks(scores_VBK[:CODED], queued_AQK, 0.05, 3)
    codes_ABK = own_rows(codes_AGK, scores_VBK.shape[1])
    return swapped_loss(scores_VBK, codes_ABK, 0.1), codes_ABK, raw


@pytest.mark.parametrize("rounds", ROUNDS)
def test_codes_equal_the_published_ones(rounds: int) -> None:
    numbers = golden("swav")
    found = sinkhorn(numbers["out.scores_VBK"][0], 0.05, rounds)
    torch.testing.assert_close(found, numbers[f"sinkhorn.{rounds}_iterations_BK"], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.sum(1), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-12)
    if rounds == 2000:
        torch.testing.assert_close(found.sum(0), torch.full((12,), 8 / 12, dtype=torch.float64), rtol=0, atol=1e-9)
    if rounds == 3:  # balance is only reached in the limit
        assert found.sum(0).max() / found.sum(0).min() > 2.5


@pytest.mark.parametrize(
    ("name", "views", "queue"), [("two_views", 2, False), ("multicrop", 4, False), ("queue", 2, True)]
)
def test_loss_codes_and_gradients_are_the_published_ones(name: str, views: int, queue: bool) -> None:
    numbers = golden("swav")
    loss, codes_ABK, raw = published(views, queue)
    torch.testing.assert_close(loss, numbers[f"{name}.loss"], **EXACT)
    torch.testing.assert_close(codes_ABK, numbers[f"{name}.codes_2BK"], **EXACT)
    of_views, of_prototypes = torch.autograd.grad(loss, raw)
    torch.testing.assert_close(of_views, numbers[f"{name}.grad_embeddings_VBD"], **EXACT)
    # the published code overwrites prototypes by their unit rows; ours are normalised in the forward, which drops the radial part
    theirs_KD, rows_KD = numbers[f"{name}.grad_prototypes_KD"], unit_rows(numbers["in.prototypes_KD"])
    tangent_KD = theirs_KD - (theirs_KD * rows_KD).sum(1, keepdim=True) * rows_KD
    torch.testing.assert_close(of_prototypes, tangent_KD, **EXACT)
    assert (theirs_KD - tangent_KD).abs().max() > 1e-3
    if not queue:
        torch.testing.assert_close(tangent_KD, numbers[f"{name}.grad_prototypes_tangent_KD"], **EXACT)


def test_codes_do_not_overflow_and_no_prototype_is_left_alone() -> None:
    scores_GK = torch.rand(40, 12, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    scores_GK[:, 5] -= 0.9
    found = sinkhorn(scores_GK.float(), 0.01, 3)
    plan = np.exp(scores_GK.numpy() / 0.01)  # float64 holds exp(200)
    plan /= plan.sum()
    for _ in range(3):
        plan /= plan.sum(0, keepdims=True) * 12
        plan /= plan.sum(1, keepdims=True) * 40
    torch.testing.assert_close(found.double(), torch.from_numpy(plan * 40), rtol=0, atol=1e-5)
    assert torch.isfinite(sinkhorn(100 * scores_GK.float(), 0.01, 3)).all()
    with np.errstate(all="ignore"):  # the published exponentials in float32
        assert not np.isfinite(np.exp(scores_GK.numpy().astype(np.float32) / np.float32(0.01))).all()


def test_swapping_the_views_changes_nothing_and_codes_follow_the_studies() -> None:
    numbers = golden("swav")
    scores_VBK = numbers["out.scores_VBK"][:2]
    codes_ABK = codes_of_all_ranks(scores_VBK, None, 0.05, 3)
    swapped = codes_of_all_ranks(scores_VBK.flip(0), None, 0.05, 3)
    torch.testing.assert_close(swapped.flip(0), codes_ABK, **EXACT)
    torch.testing.assert_close(
        swapped_loss(scores_VBK.flip(0), swapped, 0.1), swapped_loss(scores_VBK, codes_ABK, 0.1), **EXACT
    )
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(codes_of_all_ranks(scores_VBK[:, order], None, 0.05, 3), codes_ABK[:, order], **EXACT)


def test_the_swapped_loss_is_a_loop_over_pairs_of_views() -> None:
    scores_VBK = golden("swav")["out.scores_VBK"]
    codes_ABK = codes_of_all_ranks(scores_VBK[:2], None, 0.05, 3)
    total = 0.0
    for a in range(2):
        for v in range(4):
            for i in range(8):
                logits = [float(each) / 0.1 for each in scores_VBK[v, i]]
                log_sum = math.log(sum(math.exp(each) for each in logits))
                own = -sum(float(q) * (each - log_sum) for q, each in zip(codes_ABK[a, i], logits, strict=True))
                total += own / 8 / 3 / 2 if v != a else 0.0
    assert float(swapped_loss(scores_VBK, codes_ABK, 0.1)) == pytest.approx(total, rel=1e-12)


def on_a_rank() -> dict[str, Any]:
    """Loss, codes and gradient of this rank's part of the golden batch, and the queue after three microbatches of 8 films."""
    numbers, world = golden("swav"), distributed.world_size()
    own = slice(distributed.rank() * 8 // world, (distributed.rank() + 1) * 8 // world)
    raw = [
        numbers["in.embeddings_VBD"][:, own].clone().requires_grad_(),
        numbers["in.prototypes_KD"].clone().requires_grad_(),
    ]
    scores_VBK = raw[0] @ unit_rows(raw[1]).T
    codes_ABK = own_rows(codes_of_all_ranks(scores_VBK[:CODED], None, 0.05, 3), scores_VBK.shape[1])
    loss = swapped_loss(scores_VBK, codes_ABK, 0.1)
    of_views, of_prototypes = torch.autograd.grad(loss, raw)
    alone = sinkhorn(scores_VBK[0].detach(), 0.05, 3)
    config = small_config(method__name="images100m", objective__queue=16, objective__projector_norm="none")
    model = small_model(config).double().train()
    for seed in range(3):
        model(random_batch(config, slice(own.start, own.stop), seed))
    return {"queue": model.queue_AQE.numpy()} | {
        name: each.detach().numpy()
        for name, each in zip(
            ("loss", "codes", "views", "prototypes", "alone"),
            (loss, codes_ABK, of_views, of_prototypes, alone),
            strict=True,
        )
    }


@pytest.mark.distributed
def test_two_ranks_have_the_codes_and_the_gradient_of_one_batch() -> None:
    numbers, ranks = golden("swav"), run_on_ranks(2, on_a_rank)
    whole = on_a_rank()
    joined = {name: np.concatenate([rank[name] for rank in ranks], axis=1) for name in ("codes", "views")}
    np.testing.assert_array_equal(joined["codes"], whole["codes"])
    np.testing.assert_allclose(joined["codes"], numbers["two_ranks.codes_2BK"], rtol=0, atol=1e-9)
    np.testing.assert_allclose([rank["loss"] for rank in ranks], numbers["two_ranks.loss_each"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(joined["views"], numbers["two_ranks.grad_embeddings_VBD"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(joined["views"] / 2, whole["views"], rtol=0, atol=1e-12)
    mean = (ranks[0]["prototypes"] + ranks[1]["prototypes"]) / 2
    np.testing.assert_allclose(mean, whole["prototypes"], rtol=0, atol=1e-12)
    theirs_KD, rows_KD = numbers["two_ranks.grad_prototypes_mean_KD"], unit_rows(numbers["in.prototypes_KD"])
    tangent_KD = theirs_KD - (theirs_KD * rows_KD).sum(1, keepdim=True) * rows_KD
    np.testing.assert_allclose(mean, tangent_KD, rtol=0, atol=1e-9)
    for rank in ranks:
        np.testing.assert_allclose(rank["queue"], whole["queue"], rtol=0, atol=1e-6)
    # each rank for itself is another method
    alone = np.concatenate([rank["alone"] for rank in ranks])
    np.testing.assert_allclose(alone, numbers["rank_local.codes_BK"], rtol=0, atol=1e-9)
    assert np.abs(alone - whole["codes"][0]).max() > 0.5


def test_a_collapsed_encoder_is_named() -> None:
    views_VBE = F.normalize(torch.ones(2, 16, 8, dtype=torch.float64), dim=-1)
    prototypes_KE = unit_rows(torch.randn(10, 8, generator=torch.Generator().manual_seed(0)).double())
    scores_VBK = views_VBE @ prototypes_KE.T
    codes_ABK = codes_of_all_ranks(scores_VBK, None, 0.05, 3)
    torch.testing.assert_close(codes_ABK, torch.full_like(codes_ABK, 0.1), **EXACT)
    assert float(swapped_loss(scores_VBK, codes_ABK, 0.1)) >= math.log(10)
    equal = swapped_loss(torch.zeros_like(scores_VBK), codes_ABK, 0.1)
    assert float(equal) == pytest.approx(math.log(10), rel=1e-12)
    used, sharpness, spread, std = (float(each) for each in statistics(views_VBE, codes_ABK))
    assert (used, sharpness) == pytest.approx((10, 0.1))
    assert max(spread, std) < 0.05  # the limit of the warning, cmcgns/train/trainer.py
    assert load_method(small_config(method__name="images100m")).collapse_statistics == ("code_spread",)


def forward(seed: int = 0, **more: Any) -> tuple[Any, Any, Any]:
    config = small_config(
        **{"method__name": "images100m", "objective__freeze_steps": 0, "objective__instance_weight": 0.0, **more}
    )
    model = small_model(config).double()
    return config, model.train(), random_batch(config, slice(0, 6), seed)


def test_the_queue_holds_the_newest_films_of_all_ranks_first() -> None:
    """As published: `queue.queue_after_2QD` is this microbatch's rows, then the first of the old ones."""
    numbers = golden("swav")
    _, model, _ = forward(objective__queue=16, objective__embed=16)
    model.queue_AQE = numbers["in.queue_2QD"].clone()
    rows_VBE = numbers["in.embeddings_VBD"][:2]
    before = model._queue(rows_VBE)
    assert torch.equal(before, numbers["in.queue_2QD"])
    torch.testing.assert_close(model.queue_AQE, numbers["queue.queue_after_2QD"], rtol=0, atol=0)
    model.eval()
    assert torch.equal(model._queue(rows_VBE), model.queue_AQE)  # validation changes nothing
    # of 20 films in microbatches of 6, the last 16
    config, model, _ = forward(objective__queue=16)
    seen = []
    for seed in range(4):
        outputs = model(random_batch(config, slice(0, 6), seed))
        seen.append(outputs.views_VBE.detach())
    expected = torch.cat([*reversed(seen)], dim=1)[:, :16]
    torch.testing.assert_close(model.queue_AQE.double(), expected, rtol=0, atol=1e-6)


def test_the_queue_is_used_once_it_is_full() -> None:
    config, model, batch = forward(objective__queue=16, objective__queue_from_step=5)
    method = load_method(config)
    assert [method.uses_queue(step) for step in (1, 2, 3, 4, 5)] == [False] * 4 + [True]  # 8 films a step
    assert [load_method(forward(objective__queue=20)[0]).uses_queue(step) for step in (1, 2, 3, 4)] == [False] * 3 + [
        True
    ]
    model.queue_AQE = unit_rows(torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0))).double()
    outputs = model(batch)
    rows_KE = outputs.prototypes_KE.detach()
    for step, queued in ((4, None), (5, outputs.queue_AQE @ rows_KE.T)):
        scores_VBK = outputs.views_VBE.detach() @ rows_KE.T
        expected = swapped_loss(scores_VBK, codes_of_all_ranks(scores_VBK, queued, 0.05, 3), 0.1)
        torch.testing.assert_close(method.losses(outputs, batch, {}, 1, step).total.detach(), expected, **EXACT)


def test_frozen_prototypes_get_a_gradient_of_zero() -> None:
    config, model, batch = forward()
    for freeze, learns in ((5, False), (0, True)):
        settings = config.model_copy(update={"objective": config.objective.model_copy(update={"freeze_steps": freeze})})
        model.zero_grad()
        load_method(settings).losses(model(batch), batch, {}, 1, 5).total.backward()
        assert bool(model.prototypes.weight.grad.any()) == learns
        assert model.projector[0].weight.grad.any()


def test_by_k_means_each_view_predicts_the_nearest_centroid_of_the_other() -> None:
    config, model, batch = forward(objective__codes="kmeans", objective__prototypes=6, objective__embed=32)
    assert model.prototypes is None
    outputs = model(batch)
    rows_VBE = outputs.views_VBE.detach()
    centroids_KE = unit_rows(rows_VBE[0] - rows_VBE[0].mean(0))
    found = losses_of(config, outputs, batch, centroids_KE)
    expected = sum(
        F.cross_entropy(rows_VBE[1 - a] @ centroids_KE.T / 0.1, (rows_VBE[a] @ centroids_KE.T).argmax(1)) / 2
        for a in (0, 1)
    )
    torch.testing.assert_close(found.total.detach(), expected, **EXACT)
    assert torch.equal(found.bank_rows["films"], rows_VBE[0])
    before = losses_of(config, outputs, batch, None)
    assert float(before.total.detach()) == 0.0
    before.total.backward()
    assert not any(each.grad.any() for each in model.parameters() if each.grad is not None)


def test_without_reports_no_text_is_read_in_training() -> None:
    config, model, batch = forward()
    model.text_encoder.forward = None  # type: ignore[method-assign]
    outputs: Images100MOutputs = model(batch)
    assert outputs.report_BD is None
    losses_of(config, outputs, batch, None).total.backward()
    frozen = load_method(config).frozen(1)
    trained = {name for name, each in model.named_parameters() if not name.startswith(frozen) and name != "log_scale"}
    assert all(model.get_parameter(name).grad is not None for name in trained)
    config, model, batch = forward(objective__supervision="reports")
    assert load_method(config).frozen(1) == ()
    assert model(batch).report_BD is not None


def test_missing_and_uncertain_labels_cost_nothing() -> None:
    logit_BL = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    label_BL = torch.tensor([[1.0, -1.0], [0.0, 1.0], [math.nan, math.nan]])
    known = [(0, 0, 1.0), (1, 0, 0.0), (1, 1, 1.0)]
    slow = -sum(F.logsigmoid((2 * label - 1) * logit_BL[row, column]) for row, column, label in known) / 3
    found = label_loss(logit_BL, label_BL)
    torch.testing.assert_close(found, slow, rtol=1e-12, atol=0)
    found.backward()
    gradient_BL = logit_BL.grad
    assert gradient_BL is not None
    assert gradient_BL[label_BL >= 0].all()
    assert not gradient_BL[~(label_BL >= 0)].any()
    logit_BL.grad = None
    nothing = label_loss(logit_BL, torch.full((3, 2), math.nan))
    nothing.backward()
    assert nothing == 0
    assert logit_BL.grad is not None
    assert not logit_BL.grad.any()


def test_the_export_has_no_queue() -> None:
    _, model, _ = forward(objective__queue=16)
    weights = {name: value.float() for name, value in model.state_dict().items()}
    assert "queue_AQE" in weights
    exported = heads(weights, model.training_only)
    assert not [name for name in exported if "queue" in name]
    assert "prototypes.weight" in exported


def test_a_resumed_run_with_a_queue_matches_the_uninterrupted_one(tmp_path: Path) -> None:
    config = config_of(
        method__name="images100m", objective__queue=24, objective__prototypes=8, objective__freeze_steps=1, microbatch_size=8,
        global_batch_size=16, stage1_steps=6, stage2_steps=0, checkpoint_every=3, validate_every=3,
    )  # fmt: skip
    whole = start(config, tmp_path / "whole")
    assert whole.trainer.train()
    resumed = start(config, tmp_path / "resumed", 3, tmp_path / "whole")
    assert resumed.trainer.train()
    for ours, theirs in zip(resumed.rows() + resumed.rows("val"), whole.rows() + whole.rows("val"), strict=True):
        assert ours["loss"] == theirs["loss"]
    queues = [run.trainer.engine.weights()["queue_AQE"] for run in (resumed, whole)]
    assert torch.equal(*queues)
    assert (queues[0].norm(dim=-1) > 0.99).all()


@pytest.mark.parametrize("settings", [{"objective__queue": 8}, {"objective__codes": "kmeans", "objective__embed": 32}])
def test_a_step_with_queue_or_centroids_reads_nothing_back(settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(method__name="images100m", microbatch_size=8, global_batch_size=8, stage2_steps=0, **settings)
    trainer = start(config, tmp_path / "run").trainer
    for each in trainer.banks.clusterings.values():
        each.centroids.adopt(F.normalize(torch.randn(128, 32), dim=1), 1, 0, torch.ones(128))
    trainer.train_step(1, trainer.reader.next_step())
    data = trainer.reader.next_step()
    assert trainer.method.uses_queue(2)
    with HostReads({slot["step"].data_ptr() for slot in trainer.engine.optimizer.state.values()}) as reads:
        trainer.train_step(2, data)
    assert reads.found == []


def test_more_prototypes_than_films_are_named(caplog: pytest.LogCaptureFixture) -> None:
    for prototypes, queue, named in ((77, 0, True), (77, 80, False), (3, 0, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            small_model(
                small_config(method__name="images100m", objective__prototypes=prototypes, objective__queue=queue)
            )
        assert ("objective.prototypes 77 is more than the 8 films" in caplog.text) == named


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"data__reports": False},
            "data.reports false: method.name cm-cgns learns from reports; set data.reports=true",
        ),
        ({"data__reports": False, "method__name": "xdc"}, "data.reports false: method.name xdc learns from reports"),
        (
            {"data__reports": False, "method__name": "images100m", "objective__supervision": "reports"},
            "data.reports false: objective.supervision reports learns from reports",
        ),
        (
            {"method__name": "images100m", "objective__codes": "kmeans", "objective__queue": 32},
            "objective.queue 32 does not apply to objective.codes kmeans",
        ),
        (
            {"method__name": "images100m", "objective__supervision": "labels"},
            "supervision by labels needs the names of the labels",
        ),
        (
            {"method__name": "images100m", "objective__classes": ("Edema",)},
            "objective.supervision none with objective.classes",
        ),
        (
            {"method__name": "images100m", "objective__supervision": "labels", "objective__classes": ("a", "b", "a")},
            "names a label twice",
        ),
    ],
)
def test_what_needs_reports_or_does_not_go_together_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        small_config(**settings)


def test_films_without_reports_are_validated_without_recall(tmp_path: Path) -> None:
    run = start(
        config_of(
            method__name="images100m", data__reports=False, microbatch_size=8, global_batch_size=8, stage1_steps=3,
            stage2_steps=0, objective__prototypes=8,
        ),
        tmp_path / "run",
    )  # fmt: skip
    assert run.trainer.train()
    [row] = run.rows("val")
    assert row["studies"] == 40
    assert not [name for name in row if "recall" in name]
    assert run.trainer.progress.best == {"step": 3}
