"""Films and sentences of a run's validation split as its model sees them: retrieval both ways, heat maps, clusters.

N studies, n rows of a bank, K centroids, D embedding.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load

from cmcgns import storage
from cmcgns.config import Bank
from cmcgns.data.image import Target, resize_image
from cmcgns.data.order import VALIDATION_EPOCH, drawn_image
from cmcgns.data.readers import open_splits
from cmcgns.data.reports import ParsedReport
from cmcgns.data.tokenizer import EncodedReport
from cmcgns.errors import BadRow, UserError
from cmcgns.library.films import READERS
from cmcgns.library.model import Model
from cmcgns.library.runs import PretrainedRun, open_run
from cmcgns.methods.base import BankCentroids
from cmcgns.storage.ahead import map_ahead

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
KEY = "report"
QUERIES, NEAREST = 4, 3
CLUSTERS = 12
"""Clusters of a bank that are shown: those with most of the rows."""
SIDE = 224
"""Largest side of a picture in pixels."""


@dataclass(frozen=True)
class Case:
    """A study that was read."""

    square_RR: Pixels = field(repr=False)
    parsed: ParsedReport = field(repr=False)
    encoded: EncodedReport = field(repr=False)

    @property
    def sentences(self) -> list[str]:
        """What the model read of the report."""
        return self.parsed.sentences[: self.encoded.sentences]


@dataclass(frozen=True)
class Found:
    """A study that a query has found."""

    film: Image.Image
    sentences: list[str]
    cosine: float
    is_right: bool
    """It is the query's own, or has the same report."""


@dataclass(frozen=True)
class Query:
    """A film that looks for its report, or a report that looks for its film."""

    film: Image.Image
    sentences: list[str]
    rank: int
    """Place of the first study that is right, from 1."""
    nearest: list[Found]


@dataclass(frozen=True)
class Heat:
    """Where a sentence looks on the film of its study."""

    film: Image.Image
    heat: Image.Image
    sentence: str


@dataclass(frozen=True)
class Cluster:
    """A centroid with what is nearest to it."""

    number: int
    share: float
    """Share of the rows whose nearest centroid it is."""
    sentences: list[tuple[str, float]]
    """Texts of its rows and their cosines, nearest first."""
    films: list[Image.Image]


@dataclass(frozen=True)
class Samples:
    """What report.html shows of the validation split."""

    studies: int = 0
    films: list[Query] = field(default_factory=list)
    reports: list[Query] = field(default_factory=list)
    heats: list[Heat] = field(default_factory=list)
    clusters: dict[str, list[Cluster]] = field(default_factory=dict)
    """By name of the bank."""
    left_out: list[str] = field(default_factory=list)
    """What is not shown, and why."""


def read_samples(uri: str, most: int, trusted: Collection[str] = ()) -> Samples:
    """What the model of the finished run in the folder ``uri`` makes of the first ``most`` validation studies, on the CPU.

    What cannot be had is in ``left_out``.
    """
    try:
        run = open_run(KEY, uri, trusted)
        if not run.config.data.reports:
            return Samples(left_out=["retrieval, heat maps and clusters: the run has films without reports"])
        cases = read_cases(run, most)
        if len(cases) < 2:
            return Samples(left_out=[f"samples: {len(cases)} validation studies can be read, and two are needed"])
        return _samples(Model(run, torch.device("cpu"), progress=False), cases)
    except UserError as error:
        return Samples(left_out=[f"retrieval, heat maps and clusters: {error}"])


def read_cases(run: PretrainedRun, most: int) -> list[Case]:
    """The usable studies among the first ``most`` of the validation split, each with the film that validations see."""
    data, tokenizer = run.config.data, run.tokenizer
    split = open_splits("data.uri", data, Target(data.resize, "longer"), data.group_studies).studies.get("valid")
    if split is None:
        return []
    valid = split.first(min(most, data.validation_studies or most))
    order = valid.epoch(data.seed, VALIDATION_EPOCH, data.groups_per_window)
    studies, reader_of = valid.read(order, range(len(valid)))
    film_of = lambda study: study["films"][
        drawn_image(data.seed, VALIDATION_EPOCH, study["study_id"], len(study["films"]))
    ]["path"]
    reader = reader_of([film_of(study) for study in studies])

    def read(study: dict[str, Any]) -> Case | None:
        path = film_of(study)
        try:
            parsed = reader.read_sentences(study, path)
            square_RR = resize_image(reader.read_image(path).grey_HW, data.resize)
            return Case(square_RR, parsed, tokenizer.encode(parsed.sentences))
        except BadRow:
            return None  # the run has listed it

    return [case for case in map_ahead(read, studies, READERS) if case is not None]


@torch.inference_mode()
def _samples(model: Model, cases: Sequence[Case]) -> Samples:
    centroids = read_centroids(model.run)
    images, reports, rows = list[Floats](), list[Floats](), dict[str, list[Floats]]()
    for start in range(0, len(cases), model.batch_size):
        some = cases[start : start + model.batch_size]
        texts = [(case.parsed, case.encoded) for case in some]
        batch = model.batch([case.square_RR for case in some], texts, model.method.views)
        outputs = model.network(batch)
        images.append(outputs.image_BD.numpy())
        reports.append(outputs.report_BD.numpy())
        if any(each is not None for each in centroids.values()):
            for name, rows_nD in model.method.losses(outputs, batch, centroids, stage=1, step=0).bank_rows.items():
                rows.setdefault(name, []).append(rows_nD.numpy())
    cosine_NN = np.concatenate(images) @ np.concatenate(reports).T
    right_NN = np.array([[one.parsed.report_hash == other.parsed.report_hash for other in cases] for one in cases])
    left_out = []
    if model.method.banks and not rows:
        left_out.append("clusters: clustering has not started in this run")
    if not model.method.has_attention:
        left_out.append(f"heat maps: method {model.config.method.name} attends to no patches")
    return Samples(
        studies=len(cases),
        films=queries(model, cases, cosine_NN, right_NN),
        reports=queries(model, cases, cosine_NN.T, right_NN.T),
        heats=heats(model, cases) if model.method.has_attention else [],
        clusters={
            bank.name: clusters(model, cases, bank, rows[bank.name], centroid_KD.numpy())
            for bank in model.method.banks
            if (centroid_KD := centroids[bank.name]) is not None
        },
        left_out=left_out,
    )


def read_centroids(run: PretrainedRun) -> BankCentroids:
    """The centroids with which the run ended."""
    uri = storage.join(run.export, "centroids.safetensors")
    tensors = load(storage.read_bytes(uri)) if storage.exists(uri) else {}
    rows, counts = dict[str, torch.Tensor | None](), dict[str, torch.Tensor]()
    for number, bank in enumerate(run.config.banks):
        prefix = f"{bank.name}/" if number else ""  # as Banks names them
        started = f"{prefix}rows_KD" in tensors and int(tensors[f"{prefix}version_and_start"][0]) > 0
        rows[bank.name] = tensors[f"{prefix}rows_KD"] if started else None
        counts[bank.name] = tensors.get(f"{prefix}counts_K", torch.ones(bank.num_clusters))
    return BankCentroids(rows, counts)


def spread_out(number: int, of: int) -> list[int]:
    """Up to ``number`` indices below ``of``, evenly spaced: the same ones for runs with the same split."""
    return sorted({int(index) for index in np.linspace(0, of - 1, number)})


def queries(model: Model, cases: Sequence[Case], cosine_NN: Floats, right_NN: NDArray[np.bool_]) -> list[Query]:
    """Some rows of ``cosine_NN`` with the studies of its columns that they find."""
    made = []
    for row in spread_out(QUERIES, len(cases)):
        order = np.argsort(-cosine_NN[row], kind="stable")
        found = [
            Found(picture(model, cases[i]), cases[i].sentences, float(cosine_NN[row, i]), bool(right_NN[row, i]))
            for i in order[:NEAREST]
        ]
        rank = int(np.argmax(right_NN[row, order])) + 1
        made.append(Query(picture(model, cases[row]), cases[row].sentences, rank, found))
    return made


def heats(model: Model, cases: Sequence[Case]) -> list[Heat]:
    """Heat maps of the two sentences of some studies that fewest studies have."""
    common = Counter(sentence for case in cases for sentence in set(case.sentences))
    some = [cases[index] for index in spread_out(QUERIES, len(cases))]
    maps = model.heatmaps([case.square_RR for case in some], [(case.parsed, case.encoded) for case in some])
    found = []
    for case, heatmap in zip(some, maps, strict=True):
        rarest = sorted(range(len(case.sentences)), key=lambda s: common[case.sentences[s]])[:2]
        found += [Heat(picture(model, case), thumbnail(heatmap.picture(s)), case.sentences[s]) for s in sorted(rarest)]
    return found


def clusters(
    model: Model, cases: Sequence[Case], bank: Bank, rows_of_batches: Sequence[Floats], centroid_KD: Floats
) -> list[Cluster]:
    """The clusters with most rows, each with its nearest texts and films."""
    owners, texts = row_owners(cases, bank, model.batch_size)
    cosine_nK = np.concatenate(rows_of_batches) @ centroid_KD.T
    nearest_n = cosine_nK.argmax(1)
    made = []
    for number, members in Counter(nearest_n.tolist()).most_common(CLUSTERS):
        own = np.flatnonzero(nearest_n == number)
        order = own[np.argsort(-cosine_nK[own, number], kind="stable")].tolist()
        nearest_text = dict[str, float]()
        for row in order:
            nearest_text.setdefault(texts[row], float(cosine_nK[row, number]))
        films = list(dict.fromkeys(owners[row] for row in order))[:NEAREST]
        made.append(
            Cluster(
                number, members / len(nearest_n), list(nearest_text.items())[:NEAREST],
                [picture(model, cases[study]) for study in films],
            )
        )  # fmt: skip
    return made


def row_owners(cases: Sequence[Case], bank: Bank, batch_size: int) -> tuple[list[int], list[str]]:
    """Study and text of each row of a bank: its sentence, or the first one of its study."""
    owners, texts = list[int](), list[str]()
    for start in range(0, len(cases), batch_size):
        some = range(start, min(start + batch_size, len(cases)))
        if bank.per_sentence:
            each = [(study, sentence) for study in some for sentence in cases[study].sentences]
        else:
            each = [(study, cases[study].sentences[0]) for study in some]
        for study, text in each * bank.rows_each:
            owners.append(study)
            texts.append(text)
    return owners, texts


def picture(model: Model, case: Case) -> Image.Image:
    """The film as the model sees it, at most ``SIDE`` pixels wide."""
    return thumbnail(Image.fromarray(model.seen(case.square_RR)))


def thumbnail(image: Image.Image) -> Image.Image:
    image.thumbnail((SIDE, SIDE))
    return image
