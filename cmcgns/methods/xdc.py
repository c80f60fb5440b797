"""XDC: the clusters of one modality are the labels of the other (Alwassel et al., NeurIPS 2020, arXiv 1911.12667).

The training code was never released. Who labels whom, cross-entropy, rounds of clustering and random starts are read from the
repository's README and its authors' answers; the weights of the variant MDC are recalled from the paper. Heads on unit rows with
a fixed temperature, labels of current features, heads that are kept from version to version and class weights are ours, after
DeepCluster and DeepCluster-v2, whose code was read. Formulas: docs/methods.md.

B studies on this rank, G studies on all ranks, H heads, K centroids of a clustering, D embedding.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.config import Bank, MethodSettings, ModelConfig
from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.base import BankCentroids, Losses, Method, column, in_full_precision
from cmcgns.methods.contrastive import contrastive_loss
from cmcgns.methods.loss_weights import LossWeight, weight_at
from cmcgns.models.attention import unit
from cmcgns.models.backbones import ImageEncoder
from cmcgns.models.dual_encoder import DualEncoder, build_encoders
from cmcgns.models.text import TextEncoder

LABELLED_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "xdc": {"films": ("reports",), "reports": ("films",)},
    "sdc": {"films": ("films",), "reports": ("reports",)},
    "mdc": {"films": ("films", "reports"), "reports": ("reports", "films")},
    "cdc": {"films": ("joint",), "reports": ("joint",)},
}
"""Clusterings that the heads of films and those of reports predict, by variant."""


class Settings(MethodSettings):
    variant: Literal["xdc", "sdc", "mdc", "cdc"] = "xdc"
    """Whose clusters films and reports predict: those of the other (`xdc`), their own (`sdc`), both, by two heads (`mdc`), or
    those of film and report side by side (`cdc`)."""
    num_clusters: int = Field(128, ge=2)
    """Centroids K of each clustering, and classes of each head."""
    centred: bool = True
    """Cluster embeddings less their mean over the microbatch of all ranks. Untrained embeddings are all similar, and what they
    have in common moves as they learn: without this all labels become one within a few steps."""
    head_temperature: float = Field(0.1, gt=0.0)
    """Temperature of the heads' softmax, never learned."""
    class_weights: Literal["inverse", "none"] = "inverse"
    """`inverse`: every cluster that has members counts the same, as if studies were drawn evenly from clusters (DeepCluster)."""
    weight_cap: float = Field(10.0, ge=1.0)
    """Largest weight of a study of a small cluster, before the weights are scaled to a mean of 1."""
    cluster_weight: LossWeight = 1.0
    """Weight of the clusters' cross-entropy, the mean over films and reports; a number or a ramp."""
    global_weight: LossWeight = 0.0
    """Weight of InfoNCE between films and reports, a hybrid of ours; a number or a ramp. Without it nothing brings the two into
    one space, and retrieval stays at chance."""
    temperature: float = Field(0.1, ge=0.01, le=1.0)
    """Temperature of that InfoNCE; the initial value if it is learned."""
    learn_temperature: bool = True
    """Learn that temperature; a sweep over `temperature` sets it to false."""

    def banks(self, model: ModelConfig) -> tuple[Bank, ...]:
        """Films and reports, or both side by side. Until their first version nothing is learned, so it comes at once."""
        wide = {"films": 1, "reports": 1, "joint": 2}
        used = {name for names in LABELLED_BY[self.variant].values() for name in names}
        return tuple(
            Bank(
                name,
                self.num_clusters,
                times * model.embed_dim,
                "objective.num_clusters",
                None,
                per_sentence=False,
                moves=False,
            )
            for name, times in wide.items()
            if name in used
        )

    def sweep_space(self, sentences: int) -> dict[str, Any]:
        """The heads' temperature. Label accuracies compare only at equal K."""
        return {"objective.head_temperature": {"log_uniform": [0.03, 0.5]}}


class XdcOutputs(NamedTuple):
    """Outputs for one microbatch."""

    image_BD: Tensor
    """Normalised film embeddings."""
    report_BD: Tensor
    """Normalised report embeddings."""
    sentences_BSD: Tensor
    """Sentence embeddings, zero where padded."""
    logits_HBK: Tensor
    """Scores of the classes by each head: those of films, then those of reports."""
    scale: Tensor
    """Inverse temperature of InfoNCE, shape (1,)."""


class ClusterHead(nn.Module):
    """Cosines of rows with K learned directions, by a temperature."""

    def __init__(self, dim: int, num_clusters: int, temperature: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_clusters, dim) / dim**0.5)
        self.temperature = temperature

    def forward(self, rows_BD: Tensor) -> Tensor:
        """Logits (B, K) of unit rows."""
        return rows_BD @ unit(self.weight).T / self.temperature


class XdcModel(DualEncoder):
    """The two encoders and a head for each clustering that a modality predicts."""

    def __init__(self, image_encoder: ImageEncoder, text_encoder: TextEncoder, dim: int, settings: Settings) -> None:
        learn = settings.learn_temperature and settings.global_weight != 0.0
        super().__init__(image_encoder, text_encoder, dim, settings.temperature, learn)
        of = LABELLED_BY[settings.variant]
        self.heads = nn.ModuleDict(
            {
                f"{side}_by_{bank}": ClusterHead(dim, settings.num_clusters, settings.head_temperature)
                for side in of
                for bank in of[side]
            }
        )

    def forward(self, batch: ImageReportBatch, stage: int = 1) -> XdcOutputs:
        """Embeddings and class scores of one microbatch."""
        _, image_BD = self.embed_images(batch.image_B1HW)
        sentences_BSD, report_BD = self.embed_reports(batch)
        logits = [head(image_BD if name.startswith("films") else report_BD) for name, head in self.heads.items()]
        return XdcOutputs(image_BD, report_BD, sentences_BSD, torch.stack(logits), self.scale)


class Xdc(Method[Settings]):
    """One stage: two cross-entropies, and InfoNCE if wanted."""

    statistics = (
        "film_label_accuracy", "report_label_accuracy", "clusters_used", "label_entropy", "image_std", "report_std",
    )  # fmt: skip
    collapse_statistics = ("label_entropy",)
    ranked_by = ()  # recall says nothing: the last validation counts as the best

    def build_model(self, vocabulary_size: int) -> XdcModel:
        encoders = build_encoders(self.config, vocabulary_size)
        return XdcModel(*encoders, self.config.model.embed_dim, self.settings)

    def terms(self, stage: int) -> tuple[str, ...]:
        names = ("loss", "loss_films", "loss_reports")
        return names if self.settings.global_weight == 0.0 else (*names, "loss_global")

    def losses(self, outputs: Any, batch: ImageReportBatch, centroids: BankCentroids, stage: int, step: int) -> Losses:
        own, wide = self.settings, in_full_precision(outputs)
        rows = rows_of_banks(wide.image_BD, wide.report_BD, centroids, own.centred)
        labels = {name: labels_of(rows[name], centroids[name]) for name in rows}
        sides, accuracies, logits = dict[str, Tensor](), list[Tensor](), iter(wide.logits_HBK)
        for side, names in LABELLED_BY[own.variant].items():
            found = [self._head_loss(next(logits), labels[name], centroids.counts[name]) for name in names]
            sides[f"loss_{side}"] = torch.stack([loss for loss, _ in found]).mean()
            accuracies.append(torch.stack([accuracy for _, accuracy in found]).mean())
        weight = weight_at(own.cluster_weight, step)
        weighted = {name: weight * term / 2 for name, term in sides.items()}
        terms = dict(sides)
        if own.global_weight != 0.0:
            terms["loss_global"] = contrastive_loss(
                wide.image_BD, wide.report_BD, batch.report_hash_B, wide.scale, wire_dtype=self.wire_dtype
            )
            weighted["loss_global"] = weight_at(own.global_weight, step) * terms["loss_global"]
        total = torch.stack(list(weighted.values())).sum()
        statistics = column(*accuracies, *spread_of_labels(labels, own.num_clusters, wide))
        return Losses(total, column(total, *terms.values()), statistics, rows, weighted)

    def _head_loss(self, logits_BK: Tensor, label_B: Tensor | None, counts_K: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of one head, and the share of its classes that are the labels; both are 0 before the first version."""
        if label_B is None:
            return 0.0 * logits_BK.sum(), logits_BK.new_zeros(())  # every parameter stays in the graph
        weights_K = None
        if self.settings.class_weights == "inverse":
            weights_K = even_weights(counts_K.to(logits_BK.dtype), self.settings.weight_cap)
        return cluster_loss(logits_BK, label_B, weights_K), (logits_BK.argmax(1) == label_B).float().mean()


METHOD = Xdc


def rows_of_banks(image_BD: Tensor, report_BD: Tensor, names: Mapping[str, Any], centred: bool) -> dict[str, Tensor]:
    """Unit rows of each of the banks ``names``, detached. Collective if they are ``centred``."""
    both_BE = torch.cat([image_BD, report_BD], dim=1).detach()
    if centred:
        both_BE = both_BE - distributed.all_reduce(both_BE.mean(0)) / distributed.world_size()
    films_BD, reports_BD = (unit(part) for part in both_BE.chunk(2, dim=1))
    every = {"films": films_BD, "reports": reports_BD, "joint": torch.cat([films_BD, reports_BD], dim=1) / 2**0.5}
    return {name: every[name] for name in names}


def labels_of(rows_BD: Tensor, centroids_KD: Tensor | None) -> Tensor | None:
    """Nearest centroid of each row, the lowest index on ties; None before the first version."""
    return None if centroids_KD is None else (rows_BD @ centroids_KD.to(rows_BD.dtype).T).argmax(1)


def cluster_loss(logits_BK: Tensor, label_B: Tensor, weights_K: Tensor | None) -> Tensor:
    """Mean over studies of the cross-entropy, times the weight of each study's class.

    The number of studies divides, not the sum of their weights: the mean over ranks is then that of one whole batch.
    """
    loss_B = F.cross_entropy(logits_BK, label_B, reduction="none")
    return (loss_B if weights_K is None else loss_B * weights_K[label_B]).mean()


def even_weights(counts_K: Tensor, cap: float | None) -> Tensor:
    """Weights of classes with which all that have members count the same; their mean over the members is 1.

    Without a cap the weighted mean over a bank is the expectation of DeepCluster's even sampling of clusters.
    """
    total, used = counts_K.sum(), (counts_K > 0).sum()
    weights_K = total / (used * counts_K.clamp(min=1))
    if cap is not None:
        weights_K = weights_K.clamp(max=cap)
    return weights_K * (total / (counts_K @ weights_K))


def spread_of_labels(
    labels: Mapping[str, Tensor | None], num_clusters: int, outputs: XdcOutputs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over the studies of all ranks: how many clusters the labels of the least spread clustering use (exp of their entropy), that
    entropy by the largest possible (1 before the first version), and the spread of films and reports. Collective.

    A spread is sqrt(D) x the mean standard deviation per dimension: 1 when spread out, 0 when collapsed.
    """
    features = outputs.image_BD.detach(), outputs.report_BD.detach()
    one_B = torch.ones_like(features[0][:, 0])
    counted = [one_B.new_zeros(num_clusters).index_add(0, each, one_B) for each in labels.values() if each is not None]
    sums = [total for rows_BD in features for total in (rows_BD.sum(0), rows_BD.square().sum(0))]
    parts = distributed.all_reduce(torch.cat([*counted, *sums])).split([len(part) for part in (*counted, *sums)])
    size = len(features[0]) * distributed.world_size()
    entropies = [torch.special.entr(counts_K / size).sum() for counts_K in parts[: len(counted)]]
    entropy = torch.stack(entropies).min() if entropies else features[0].new_full((), num_clusters).log()
    spreads = []
    for total_D, square_D in (parts[-4:-2], parts[-2:]):
        variance_D = (square_D - total_D.square() / size) / max(size - 1, 1)
        spreads.append(len(total_D) ** 0.5 * variance_D.clamp(min=0).sqrt().mean())
    largest = torch.full_like(entropy, min(num_clusters, max(size, 2))).log()
    return entropy.exp(), (entropy / largest).clamp(max=1.0), spreads[0], spreads[1]
