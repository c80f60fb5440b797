"""XDC and its variants: who labels whom, weights of classes, and what stays as it is until and between versions."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns.clustering.bank import RefreshRequest, recluster
from cmcgns.clustering.kmeans import numpy_assign
from cmcgns.clustering.rows import RowArray
from cmcgns.config import ClusteringConfig, Config
from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.base import BankCentroids, Losses, load_method
from cmcgns.methods.xdc import LABELLED_BY, XdcOutputs, cluster_loss, even_weights, labels_of, rows_of_banks
from tests.small import random_batch, small_config, small_model
from tests.train.test_trainer import HostReads, Run, config_of, start

EXACT = {"rtol": 0.0, "atol": 1e-12}
VARIANTS = tuple(LABELLED_BY)


def setting(variant: str = "xdc", **more: Any) -> tuple[Config, Any, ImageReportBatch]:
    """Config, model in float64 and a batch of 12 studies."""
    config = small_config(method__name="xdc", objective__variant=variant, **more)
    return config, small_model(config).double(), random_batch(config, slice(0, 12))


def centroids_of(config: Config) -> BankCentroids:
    """Random centroids of every bank, and uneven members."""
    source = torch.Generator().manual_seed(3)
    rows = {
        bank.name: F.normalize(torch.randn(bank.num_clusters, bank.dim, generator=source).double(), dim=1)
        for bank in config.banks
    }
    return BankCentroids(rows, {bank.name: torch.tensor([0.0, 1, 5, 30, 200, 4]) for bank in config.banks})


def losses(config: Config, outputs: XdcOutputs, batch: ImageReportBatch, centroids: BankCentroids) -> Losses:
    return load_method(config).losses(outputs, batch, centroids, 1, 1)


def slow_loss(config: Config, outputs: XdcOutputs, centroids: BankCentroids) -> float:
    """The formula of docs/methods.md, a study at a time."""
    both = [outputs.image_BD.detach().numpy(), outputs.report_BD.detach().numpy()]
    if config.objective.centred:
        both = [rows - rows.mean(0) for rows in both]
        both = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in both]
    image_BD, report_BD = both
    total, head = 0.0, 0
    for names in LABELLED_BY[config.objective.variant].values():
        for name in names:
            logits_BK, of_side = outputs.logits_HBK[head].detach().numpy(), 0.0
            counts = centroids.counts[name].tolist()
            used = sum(count > 0 for count in counts)
            raw = [min(sum(counts) / (used * max(count, 1)), 10.0) for count in counts]
            scale = sum(counts) / sum(count * each for count, each in zip(counts, raw, strict=True))
            for i, row in enumerate(logits_BK):
                joint = np.concatenate([image_BD[i], report_BD[i]]) / math.sqrt(2)
                feature = {"films": image_BD[i], "reports": report_BD[i], "joint": joint}[name]
                label = int(np.argmax([feature @ each for each in centroids[name].numpy()]))
                of_side += scale * raw[label] * (math.log(sum(math.exp(each) for each in row)) - row[label])
            total += of_side / len(logits_BK) / len(names) / 2
            head += 1
    return total


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_that_of_a_loop_over_heads_and_studies(variant: str, centred: bool) -> None:
    config, model, batch = setting(variant, objective__centred=centred)
    outputs, centroids = model(batch), centroids_of(config)
    found = losses(config, outputs, batch, centroids)
    assert float(found.total.detach()) == pytest.approx(slow_loss(config, outputs, centroids), rel=1e-12)
    assert {name: rows.shape[1] for name, rows in found.bank_rows.items()} == {b.name: b.dim for b in config.banks}
    for rows in found.bank_rows.values():
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(12, dtype=torch.float64), **EXACT)
        assert not rows.requires_grad
    # a head scores its own side
    sides = [(side, name) for side, names in LABELLED_BY[variant].items() for name in names]
    assert len(outputs.logits_HBK) == len(sides)
    for (side, name), logits_BK in zip(sides, outputs.logits_HBK, strict=True):
        rows_BD = outputs.image_BD if side == "films" else outputs.report_BD
        weight_KD = F.normalize(model.heads[f"{side}_by_{name}"].weight, dim=1)
        torch.testing.assert_close(logits_BK, 10 * rows_BD @ weight_KD.T, **EXACT)


def test_a_film_is_labelled_by_its_report() -> None:
    _, model, batch = setting(objective__centred=False)
    outputs = model(batch)
    # untrained features are all similar: the centroids tell their differences apart
    features = {"films": outputs.image_BD.detach(), "reports": outputs.report_BD.detach()}
    centroids = {name: F.normalize(rows - rows.mean(0), dim=1)[:6] for name, rows in features.items()}
    label_B = labels_of(outputs.report_BD.detach(), centroids["reports"])
    cosine_BK = outputs.report_BD.detach().numpy() @ centroids["reports"].numpy().T
    assert label_B.tolist() == cosine_BK.argmax(1).tolist()
    assert len(set(label_B.tolist())) > 1
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(labels_of(outputs.report_BD[order], centroids["reports"]), label_B[order])
    # another film changes what has to be predicted for the report, and not the label of the film
    other = model(batch._replace(image_B1HW=batch.image_B1HW.flip(0)))
    assert torch.equal(labels_of(other.report_BD, centroids["reports"]), label_B)
    assert not torch.equal(
        labels_of(other.image_BD, centroids["films"]), labels_of(outputs.image_BD, centroids["films"])
    )
    assert labels_of(torch.ones(2, 4), torch.ones(3, 4)).tolist() == [0, 0]  # ties


def test_class_weights_are_even_sampling_of_clusters() -> None:
    source = torch.Generator().manual_seed(0)
    counts = [400, 0, 3, 90, 1]
    label_N = torch.repeat_interleave(torch.arange(5), torch.tensor(counts))
    logits_NK = torch.randn(len(label_N), 5, generator=source).double()
    found = cluster_loss(logits_NK, label_N, even_weights(torch.tensor(counts).double(), None))
    loss_N = F.cross_entropy(logits_NK, label_N, reduction="none")
    expected = torch.stack([loss_N[label_N == k].mean() for k in range(5) if counts[k]]).mean()
    torch.testing.assert_close(found, expected, **EXACT)


def test_the_weight_of_a_small_cluster_is_capped_and_the_mean_stays_1() -> None:
    counts_K = torch.tensor([5000.0, 1, 0, 900]).double()
    weights_K = even_weights(counts_K, 10.0)
    assert torch.isfinite(weights_K).all()
    torch.testing.assert_close(counts_K @ weights_K, counts_K.sum(), **EXACT)
    assert weights_K[1] / weights_K[3] == pytest.approx(10.0 / (5901 / 3 / 900))
    none, model, batch = setting(objective__class_weights="none", objective__centred=False)
    outputs, centroids = model(batch), centroids_of(none)
    of_films = [centroids["reports"], outputs.report_BD.detach(), outputs.logits_HBK[0]]
    expected = cluster_loss(of_films[2], labels_of(of_films[1], of_films[0]), None)
    torch.testing.assert_close(losses(none, outputs, batch, centroids).weighted["loss_films"], expected / 2, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_reaches_the_side_that_labels(variant: str) -> None:
    config, model, batch = setting(variant)
    model.eval()  # the same features in both forwards
    centroids = centroids_of(config)
    losses(config, model(batch), batch, centroids).weighted["loss_films"].backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    assert not any(gradient.any() for name, gradient in found.items() if name.startswith("text_encoder"))
    assert any(gradient.any() for name, gradient in found.items() if name.startswith("image_encoder"))
    # the same loss with labels as integers
    model.zero_grad()
    outputs = model(batch)
    names, parts = LABELLED_BY[variant]["films"], []
    rows = rows_of_banks(outputs.image_BD, outputs.report_BD, centroids, centred=True)
    for head, name in enumerate(names):
        label_B = torch.tensor(labels_of(rows[name], centroids[name]).tolist())
        weights_K = even_weights(centroids.counts[name].double(), 10.0)
        parts.append(cluster_loss(outputs.logits_HBK[head], label_B, weights_K))
    (sum(parts) / len(parts) / 2).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, **EXACT)


def test_ids_survive_a_reclustering_and_not_a_cold_start() -> None:
    source, clusters = np.random.default_rng(0), 8
    centres_KD = source.normal(size=(clusters, 24))
    rows_ND = (centres_KD[source.integers(0, clusters, 1200)] + 0.4 * source.normal(size=(1200, 24))).astype(np.float32)
    config = ClusteringConfig()

    def labels(rows: np.ndarray, start_KD: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        request = RefreshRequest(1, 1, 0, len(rows), clusters, start_KD)
        found = recluster(RowArray(rows, assign=numpy_assign), request, config)
        assert found.rows_KD is not None
        unit_ND = rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)
        return numpy_assign(unit_ND, found.rows_KD).nearest_N, found.rows_KD

    first_N, first_KD = labels(rows_ND, None)
    assert (labels(rows_ND, first_KD)[0] == first_N).all()
    drifted_ND = rows_ND + (0.2 * source.normal(size=rows_ND.shape)).astype(np.float32)
    assert (labels(drifted_ND, first_KD)[0] == first_N).mean() > 0.9
    cold_N, _ = labels(rows_ND, rows_ND[labels_first_rows(first_N, clusters)])
    assert (cold_N == first_N).mean() < 0.5
    pairs = np.zeros((clusters, clusters))
    np.add.at(pairs, (first_N, cold_N), 1)
    assert (pairs.max(1).sum() / len(first_N)) > 0.95  # the same clusters under other numbers


def labels_first_rows(label_N: np.ndarray, clusters: int) -> list[int]:
    """A row of each cluster, in another order than the clusters."""
    return [int(np.flatnonzero(label_N == (k + 3) % clusters)[0]) for k in range(clusters)]


def test_an_emptied_cluster_gets_a_row_and_a_finite_weight() -> None:
    source = np.random.default_rng(1)
    rows_ND = np.abs(source.normal(size=(300, 16))).astype(np.float32)  # all in one orthant
    start_KD = np.stack([*rows_ND[:3] / np.linalg.norm(rows_ND[:3], axis=1, keepdims=True), -np.ones(16) / 4.0])
    request = RefreshRequest(2, 1, 0, 300, 4, start_KD.astype(np.float32))
    found = recluster(RowArray(rows_ND, assign=numpy_assign), request, ClusteringConfig())
    assert found.rows_KD is not None
    assert found.counts_K is not None
    assert (found.rows_KD[3] > 0).any()
    assert found.counts_K.sum() == 300
    weights_K = even_weights(torch.from_numpy(found.counts_K).double(), 10.0)
    assert torch.isfinite(weights_K).all()
    empty = even_weights(torch.tensor([300.0, 0, 0, 0]), 10.0)
    assert torch.isfinite(empty).all()


def run_of(folder: Path, checkpoint: int | None = None, source: Path | None = None, **more: object) -> Run:
    """32 studies a step: the banks hold 1,024 rows at step 32, and are clustered then and, requested at 36, at 40."""
    config = config_of(
        method__name="xdc", stage1_steps=42, stage2_steps=0, checkpoint_every=38, warmup_steps=0, validate_every=42,
        weight_decay=0.0, microbatch_size=32, **more,
    )  # fmt: skip
    return start(config, folder, checkpoint, source)


@pytest.mark.parametrize("variant", ["xdc", "cdc"])
def test_no_weight_moves_before_the_first_version(variant: str, tmp_path: Path) -> None:
    trainer = run_of(tmp_path / "run", objective__variant=variant).trainer
    before = trainer.engine.weights()
    for _ in range(32):
        trainer.next_step()
    now = trainer.engine.weights()
    still = {name for name in before if torch.equal(before[name], now[name])}
    assert still == set(before)
    assert {each.centroids.started_at for each in trainer.banks.clusterings.values()} == {32}
    trainer.next_step()
    moved = {name for name, value in trainer.engine.weights().items() if not torch.equal(before[name], value)}
    assert {name for name in before if name.startswith("heads.")} <= moved
    assert any(name.startswith("image_encoder.") for name in moved)
    assert any(name.startswith("text_encoder.") for name in moved)


def test_a_resumed_run_with_two_banks_matches_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole")
    assert whole.trainer.train()
    resumed = run_of(tmp_path / "resumed", 38, tmp_path / "whole")  # a re-clustering of each bank is in flight
    assert resumed.trainer.train()
    ours, theirs = ({row["step"]: row for row in run.rows()} for run in (resumed, whole))
    for step in range(1, 43):
        for key in (
            "loss",
            "loss_films",
            "loss_reports",
            "centroids_version",
            "reports/centroids_version",
            "film_label_accuracy",
        ):
            assert ours[step][key] == theirs[step][key], (step, key)
    assert [theirs[step]["centroids_version"] for step in (31, 32, 39, 40)] == [0, 1, 1, 2]
    assert theirs[31]["loss"] == 0.0 < theirs[33]["loss"]
    for name in ("films", "reports"):
        digests = {
            each.centroids.digest() for run in (whole, resumed)
            for bank, each in run.trainer.banks.clusterings.items() if bank.name == name
        }  # fmt: skip
        assert len(digests) == 1
    assert whole.trainer.progress.best == {"step": 42}


def test_what_all_embeddings_have_in_common_moves_no_label() -> None:
    """Untrained embeddings are all similar: while they learn, they first move together, from one centroid to another."""
    source = torch.Generator().manual_seed(0)
    own_BD, shift_D = torch.randn(40, 16, generator=source).double(), torch.randn(16, generator=source).double()
    centroids_KD = F.normalize(torch.randn(6, 16, generator=source).double(), dim=1)
    found = {}
    for centred in (True, False):
        labels = []
        for common in (5 * shift_D, 7 * shift_D.flip(0)):
            image_BD = F.normalize(own_BD + common, dim=1)
            rows = rows_of_banks(image_BD, image_BD, ("films",), centred)
            labels.append(labels_of(rows["films"], centroids_KD))
        found[centred] = [len(set(each.tolist())) for each in labels], float((labels[0] == labels[1]).double().mean())
    assert found[True][0] == [6, 6]
    assert found[True][1] > 0.6
    assert found[False][0] == [1, 1]
    assert found[False][1] == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_steady_step_with_centroids_reads_nothing_back(variant: str, tmp_path: Path) -> None:
    config = config_of(
        method__name="xdc", objective__variant=variant, microbatch_size=8, global_batch_size=8, stage2_steps=0
    )
    trainer = start(config, tmp_path / "run").trainer
    for bank, each in trainer.banks.clusterings.items():
        each.centroids.adopt(F.normalize(torch.randn(6, bank.dim), dim=1), 1, 0, torch.arange(6.0))
    trainer.train_step(1, trainer.reader.next_step())
    data = trainer.reader.next_step()
    with HostReads({slot["step"].data_ptr() for slot in trainer.engine.optimizer.state.values()}) as reads:
        trainer.train_step(2, data)
    assert reads.found == []


def test_all_banks_share_the_actors_and_no_bank_needs_none() -> None:
    assert len(small_config(method__name="xdc").banks) == 2
    actors = [
        small_config(**settings).pool_actors for settings in ({}, {"method__name": "xdc"}, {"method__name": "infonce"})
    ]
    assert actors == [2, 2, 0]
    assert small_config(method__name="images100m").pool_actors == 0
    assert small_config(method__name="images100m", objective__codes="kmeans").pool_actors == 2


def test_heads_learn_the_labels_of_the_other_side() -> None:
    """The heads alone: encoders that learn too move the labels."""
    config, model, batch = setting("xdc", objective__class_weights="none")
    outputs, centroids = model(batch), centroids_of(config)
    image_BD, report_BD = outputs.image_BD.detach(), outputs.report_BD.detach()
    heads = [model.heads[name] for name in ("films_by_reports", "reports_by_films")]
    optimizer = torch.optim.Adam(model.heads.parameters(), lr=0.05)
    accuracies: list[Tensor] = []
    for _ in range(150):
        logits_HBK = torch.stack([head(rows_BD) for head, rows_BD in zip(heads, (image_BD, report_BD), strict=True)])
        found = losses(config, outputs._replace(logits_HBK=logits_HBK), batch, centroids)
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
        accuracies.append(found.statistics[:2])
    assert float(accuracies[0].max()) < 0.6
    assert float(accuracies[-1].min()) > 0.9
