"""Films alone: online clustering with swapped prediction (Ghesu et al. 2022, arXiv 2201.01283), after SwAV.

No code was released, and only the abstracts of paper and patent could be read: that vectors of two views and their cluster codes
train one encoder, with or without labels on top, is theirs. How codes are made is read from SwAV's code (Caron et al., NeurIPS
2020); that the two agree is inferred. Prototypes, temperatures, sizes and the strengths of views are ours. Formulas:
docs/methods.md.

V views, A views that have codes, B studies on this rank, G on all ranks, K prototypes, E width of their space, Q rows of the
queue, N rows of views, X rows of this microbatch and the queue, C channels of the image backbone, D embedding.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.config import Bank, MethodSettings, ModelConfig
from cmcgns.data.batch import ImageReportBatch
from cmcgns.data.views import ViewSettings
from cmcgns.methods.base import Losses, Method, column, in_full_precision
from cmcgns.methods.codes import Prototypes, codes_of_all_ranks, frozen_until, own_rows, swapped_loss
from cmcgns.methods.contrastive import contrastive_loss
from cmcgns.methods.loss_weights import LossWeight, weight_at
from cmcgns.models.attention import linear, unit
from cmcgns.models.backbones import ImageEncoder
from cmcgns.models.dual_encoder import DualEncoder, build_encoders
from cmcgns.models.text import TextEncoder

logger = logging.getLogger(__name__)
CODED = 2
"""Views that have codes; all views predict."""


class Settings(MethodSettings):
    prototypes: int = Field(128, ge=2)
    """Prototypes K; better no more than the studies of a microbatch of all ranks and the queue (published for ImageNet: 3000)."""
    embed: PositiveInt = 128
    """Width E of the space of the prototypes."""
    projector_width: PositiveInt = 2048
    """Width of the hidden layer between encoder and prototypes."""
    projector_norm: Literal["batch", "none"] = "batch"
    """`batch`: batch normalisation of the projector's hidden layer on each rank (published), without which small runs learn
    nothing (docs/methods.md). `none`: results do not depend on `microbatch_size`."""
    temperature: float = Field(0.1, gt=0.0)
    """Temperature of the predictions, never learned."""
    epsilon: float = Field(0.05, gt=0.0)
    """Sharpness of the codes: smaller is sharper; 0.03 helps against a loss that stays at ln K."""
    rounds: PositiveInt = 3
    """Rounds of balancing between prototypes and studies."""
    freeze_steps: int = Field(20, ge=0)
    """First steps in which the prototypes do not learn (published: one epoch)."""
    codes: Literal["sinkhorn", "kmeans"] = "sinkhorn"
    """`sinkhorn`: learned prototypes and balanced soft codes. `kmeans`: prototypes are the centroids of a clustering of all
    ranks' recent films, and the code of a view is its nearest one (DeepCluster-v2)."""
    queue: int = Field(0, ge=0)
    """Films of earlier microbatches of all ranks that are balanced together with those of this one; 0: none. It is used as soon
    as it is full."""
    queue_from_step: int = Field(0, ge=0)
    """First step that may use the queue (published: epoch 15)."""
    views: ViewSettings = ViewSettings()
    """Strengths of the random views: `{rotation: 5, blur_share: 0}`. `data.augment_*` has no effect on views."""
    num_views: int = Field(2, ge=2)
    """Views of each film; the first two have codes."""
    instance_weight: LossWeight = 1.0
    """Weight of InfoNCE between the first two views of all ranks' films; a number or a ramp. With 0 (published) batches of
    tens of films learn nothing (docs/methods.md)."""
    supervision: Literal["none", "reports", "labels"] = "none"
    """`reports`: InfoNCE between the first view of a film and its report in addition. `labels`: a classifier of the first view,
    trained on `classes` by cross-entropy; uncertain and missing labels are left out."""
    classes: tuple[str, ...] = ()
    """Labels of the corpus for `supervision: labels`: `[Cardiomegaly, Edema]`."""
    supervision_weight: LossWeight = 1.0
    """Weight of that; a number or a ramp."""
    supervision_temperature: float = Field(0.1, ge=0.01, le=1.0)
    """Temperature of that InfoNCE and of `instance_weight`'s, never learned."""

    def banks(self, model: ModelConfig) -> tuple[Bank, ...]:
        """The first view of films, if k-means makes the prototypes."""
        if self.codes == "sinkhorn":
            return ()
        return (
            Bank("films", self.prototypes, self.embed, "objective.prototypes", None, per_sentence=False, moves=False),
        )

    def needs_reports(self) -> str | None:
        return "objective.supervision" if self.supervision == "reports" else None

    def learned_labels(self) -> tuple[str, ...]:
        return self.classes

    def complaints(self) -> Iterable[str]:
        if (self.supervision == "labels") != bool(self.classes):
            yield (
                f"objective.supervision {self.supervision} with objective.classes {list(self.classes)}: supervision by labels "
                "needs the names of the labels, and only that uses them; give both, as in "
                "objective.classes=[Cardiomegaly, Edema], or none"
            )
        if len(set(self.classes)) < len(self.classes):
            yield f"objective.classes {list(self.classes)} names a label twice; name each once"
        if self.codes == "kmeans" and self.queue:
            yield f"objective.queue {self.queue} does not apply to objective.codes kmeans, whose bank is the queue; set it to 0"

    def sweep_space(self, sentences: int) -> dict[str, Any]:
        """Temperature and sharpness. Losses compare only at equal K."""
        return {
            "objective.temperature": {"log_uniform": [0.05, 0.3]},
            "objective.epsilon": {"log_uniform": [0.02, 0.1]},
        }


class Images100MOutputs(NamedTuple):
    """Outputs for one microbatch. In training ``image_BD`` is of the first view."""

    image_BD: Tensor
    """Normalised film embeddings; only trained with reports."""
    report_BD: Tensor | None
    """Normalised report embeddings; None in training without reports."""
    sentences_BSD: Tensor | None
    """Sentence embeddings, zero where padded; None in training without reports."""
    views_VBE: Tensor | None
    """Unit rows of the views; None for a batch without views."""
    prototypes_KE: Tensor | None
    """Unit rows; None if k-means makes them."""
    queue_AQE: Tensor | None
    """Rows of earlier microbatches of all ranks, newest first; None without a queue."""
    logit_BL: Tensor | None
    """The classifier's logits of the first view; None without one."""
    scale: Tensor
    """Inverse temperature of InfoNCE, shape (1,)."""


class Images100MModel(DualEncoder):
    """Image encoder, projector, prototypes and queue; the text encoder only learns with reports."""

    training_only = ("queue_AQE",)

    def __init__(self, image_encoder: ImageEncoder, text_encoder: TextEncoder, dim: int, settings: Settings) -> None:
        super().__init__(image_encoder, text_encoder, dim, settings.supervision_temperature, learn_temperature=False)
        self.settings = settings
        width = settings.projector_width
        norm = [nn.BatchNorm1d(width)] if settings.projector_norm == "batch" else []
        self.projector = nn.Sequential(
            linear(image_encoder.dim, width), *norm, nn.ReLU(), linear(width, settings.embed)
        )
        learned = settings.codes == "sinkhorn"
        self.prototypes = Prototypes(settings.prototypes, settings.embed) if learned else None
        self.queue_AQE: Tensor
        labels = len(settings.classes)
        self.classifier = linear(image_encoder.dim, labels) if labels else None
        if settings.queue:
            self.register_buffer("queue_AQE", torch.zeros(CODED, settings.queue, settings.embed))

    def forward(self, batch: ImageReportBatch, stage: int = 1) -> Images100MOutputs:
        """Embeddings of one microbatch; in training its views join the queue for the next one. Collective."""
        views_VBE, pooled_BC = None, None
        if batch.view_VB1HW is not None:
            pooled = self.image_encoder(batch.view_VB1HW.flatten(0, 1))[1]
            views_VBE = unit(self.projector(pooled)).unflatten(0, batch.view_VB1HW.shape[:2])
            pooled_BC = pooled[: batch.studies]
        if not self.training or pooled_BC is None:
            _, image_BD = self.embed_images(batch.image_B1HW)
        else:
            image_BD = unit(self.image_projection(pooled_BC))
        sentences_BSD, report_BD = None, None
        if not self.training or self.settings.supervision == "reports":
            sentences_BSD, report_BD = self.embed_reports(batch)
        prototypes_KE = None if self.prototypes is None else self.prototypes()
        queue_AQE = self._queue(views_VBE)
        logit_BL = None if self.classifier is None or pooled_BC is None else self.classifier(pooled_BC)
        return Images100MOutputs(
            image_BD, report_BD, sentences_BSD, views_VBE, prototypes_KE, queue_AQE, logit_BL, self.scale
        )

    @torch.no_grad()
    def _queue(self, views_VBE: Tensor | None) -> Tensor | None:
        """The queue before this microbatch, which joins it in training."""
        if not self.settings.queue:
            return None
        before_AQE = self.queue_AQE
        if self.training and views_VBE is not None:
            every_GAE = distributed.all_gather(views_VBE[:CODED].detach().transpose(0, 1))
            joined_AXE = torch.cat([every_GAE.to(before_AQE.dtype).transpose(0, 1), before_AQE], dim=1)
            self.queue_AQE = joined_AXE[:, : self.settings.queue].contiguous()
        return before_AQE


class Images100M(Method[Settings]):
    """One stage. Recall says nothing without reports: judge it by probes."""

    statistics = ("prototypes_used", "code_sharpness", "code_spread", "views_std")
    collapse_statistics = ("code_spread",)
    ranked_by = ()  # the last validation counts as the best

    @property
    def views(self) -> tuple[int, ViewSettings] | None:
        return self.settings.num_views, self.settings.views

    def build_model(self, vocabulary_size: int) -> Images100MModel:
        own, train = self.settings, self.config.train
        balanced = train.compared + own.queue
        if own.codes == "sinkhorn" and distributed.rank() == 0:
            warn_if_many(own.prototypes, balanced)
        return Images100MModel(*build_encoders(self.config, vocabulary_size), self.config.model.embed_dim, own)

    def frozen(self, stage: int) -> tuple[str, ...]:
        return () if self.settings.supervision == "reports" else ("text_encoder.", "image_projection.")

    def terms(self, stage: int) -> tuple[str, ...]:
        own = self.settings
        optional = {"loss_instance": own.instance_weight != 0.0, "loss_supervised": own.supervision != "none"}
        return ("loss", "loss_swap", *(name for name, used in optional.items() if used))

    def losses(
        self, outputs: Any, batch: ImageReportBatch, centroids: Mapping[str, Tensor | None], stage: int, step: int
    ) -> Losses:
        own, wide = self.settings, in_full_precision(outputs)
        views_VBE = wide.views_VBE
        scores_VBK, codes_ABK = self._scores_and_codes(wide, centroids, step)
        terms = {"loss_swap": 0.0 * views_VBE.sum()}  # until k-means has found prototypes
        if codes_ABK is not None:
            terms["loss_swap"] = swapped_loss(scores_VBK, codes_ABK, own.temperature)
        weighted = dict(terms)
        if own.instance_weight != 0.0:
            # a film may be in a padded batch twice
            terms["loss_instance"] = contrastive_loss(
                views_VBE[0], views_VBE[1], batch.draw_key_B, wide.scale, wire_dtype=self.wire_dtype
            )
            weighted["loss_instance"] = weight_at(own.instance_weight, step) * terms["loss_instance"]
        if own.supervision == "reports":
            terms["loss_supervised"] = contrastive_loss(
                wide.image_BD, wide.report_BD, batch.report_hash_B, wide.scale, wire_dtype=self.wire_dtype
            )
            weighted["loss_supervised"] = weight_at(own.supervision_weight, step) * terms["loss_supervised"]
        if own.supervision == "labels":
            assert batch.label_BL is not None
            terms["loss_supervised"] = label_loss(wide.logit_BL, batch.label_BL)
            weighted["loss_supervised"] = weight_at(own.supervision_weight, step) * terms["loss_supervised"]
        total = torch.stack(list(weighted.values())).sum()
        rows = {name: views_VBE[0].detach() for name in centroids}
        return Losses(total, column(total, *terms.values()), column(*statistics(views_VBE, codes_ABK)), rows, weighted)

    def _scores_and_codes(
        self, outputs: Images100MOutputs, centroids: Mapping[str, Tensor | None], step: int
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of all views and codes of the first two; no codes before k-means has started. Collective."""
        own, views_VBE = self.settings, outputs.views_VBE
        assert views_VBE is not None
        if own.codes == "kmeans":
            rows_KE = centroids["films"]
            if rows_KE is None:
                return views_VBE, None
            scores_VBK = views_VBE @ rows_KE.to(views_VBE.dtype).T
            coded_ABK = scores_VBK[:CODED].detach()
            # not one_hot, which reads its input on the host
            return scores_VBK, torch.zeros_like(coded_ABK).scatter(-1, coded_ABK.argmax(-1, keepdim=True), 1.0)
        rows_KE = outputs.prototypes_KE
        assert rows_KE is not None
        rows_KE = frozen_until(rows_KE, own.freeze_steps, step)
        scores_VBK = views_VBE @ rows_KE.T
        queued_AQK = None
        if outputs.queue_AQE is not None and self.uses_queue(step):
            queued_AQK = outputs.queue_AQE.to(rows_KE.dtype) @ rows_KE.detach().T
        codes_AGK = codes_of_all_ranks(scores_VBK[:CODED], queued_AQK, own.epsilon, own.rounds)
        return scores_VBK, own_rows(codes_AGK, scores_VBK.shape[1])

    def uses_queue(self, step: int) -> bool:
        """Whether the queue is full and may be used: known from the step, without a look at the device."""
        full_after = math.ceil(self.settings.queue / self.config.train.global_batch_size)
        return step > full_after and step >= self.settings.queue_from_step


METHOD = Images100M


def label_loss(logit_BL: Tensor, label_BL: Tensor) -> Tensor:
    """Cross-entropy over the labels of all ranks that are 1 or 0; 0 if there are none. Collective.

    Its mean over ranks, as of the gradients, is the mean over these labels, however they are spread.
    """
    known_BL = (label_BL == 0) | (label_BL == 1)  # neither uncertain nor missing
    target_BL = torch.where(known_BL, label_BL, 0).to(logit_BL.dtype)
    entropy_BL = F.binary_cross_entropy_with_logits(logit_BL, target_BL, reduction="none")
    known = distributed.all_reduce(known_BL.sum().to(logit_BL.dtype))
    return (entropy_BL * known_BL).sum() * distributed.world_size() / known.clamp(min=1)


@cache
def warn_if_many(prototypes: int, balanced: int) -> None:
    """Log a warning, once, if there are more prototypes than films to balance them over."""
    if prototypes > balanced:
        logger.warning(
            "objective.prototypes %d is more than the %d films that are balanced at a time (train.microbatch_size x num_workers "
            "+ objective.queue): give fewer, or a longer queue", prototypes, balanced,
        )  # fmt: skip


def statistics(views_VBE: Tensor, codes_ABK: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over the films of all ranks: how many prototypes the codes use (exp of the entropy of their mean), the largest entry of a
    code on average, that between 0 (all entries equal: collapsed) and 1, and the spread of the views. Collective.

    Before there are codes the first two are 0 and the third is 1.
    """
    rows_NE = views_VBE.detach().flatten(0, 1)
    size = len(rows_NE) * distributed.world_size()
    parts = [rows_NE.sum(0), rows_NE.square().sum(0)]
    parts += [] if codes_ABK is None else [codes_ABK.mean(dim=(0, 1))]
    sums = distributed.all_reduce(torch.cat(parts)).split([len(part) for part in parts])
    variance_E = (sums[1] - sums[0].square() / size) / max(size - 1, 1)
    spread = len(variance_E) ** 0.5 * variance_E.clamp(min=0).sqrt().mean()
    if codes_ABK is None:
        return spread.new_zeros(()), spread.new_zeros(()), spread.new_ones(()), spread
    prototypes = codes_ABK.shape[-1]
    used = torch.special.entr(sums[2] / distributed.world_size()).sum().exp()
    sharpness = codes_ABK.amax(-1).mean()
    return used, sharpness, (prototypes * sharpness - 1) / (prototypes - 1), spread
