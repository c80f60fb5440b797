"""The tasks of an evaluation as Ray runs them: what is started for which set and encoder, each on one CPU by itself."""

import hashlib
import itertools
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from cmcgns.data.labelled.base import SPLITS, AnnotationKind, ImageSet
from cmcgns.data.readers import PhantomSource
from cmcgns.errors import UserError, cause
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.encoders import EncoderSpec
from cmcgns.evaluate.features import make_features, read_features
from cmcgns.evaluate.figures import Figure
from cmcgns.evaluate.films import Films, film_ids, load_films, make_films
from cmcgns.evaluate.pairs import Pairs, embed_pairs
from cmcgns.evaluate.scores import Score, percent
from cmcgns.evaluate.tasks.classification import drawn_groups, finetune_scores, probe_scores
from cmcgns.evaluate.tasks.clusters import cluster_scores
from cmcgns.evaluate.tasks.detection import detection_scores
from cmcgns.evaluate.tasks.grounding import grounding_scores
from cmcgns.evaluate.tasks.retrieval import retrieval_scores
from cmcgns.evaluate.tasks.segmentation import segmentation_scores
from cmcgns.evaluate.tasks.zeroshot import Prompts, zeroshot_scores

ON_PAIRS = ("retrieval", "clusters", "grounding")
ON_ATTENTION = ("clusters", "grounding")
"""Those of them that ask where sentences attend."""
ON_FEATURES = ("zeroshot", "classification")
CORPUS = "corpus"
"""What the run's own corpus is called where it is no set of images."""
ON_PLACES: dict[str, AnnotationKind] = {
    "segmentation": "masks",
    "detection": "boxes",
    "classification": "labels",
}
"""Heads that are trained on films, and what they are taught; classification only where encoders are tuned."""


@dataclass
class Evaluation:
    """What is evaluated, and what has come of it."""

    settings: EvaluateConfig
    encoders: list[EncoderSpec]
    sets: list[ImageSet]
    prompts: dict[str, Prompts]
    scores: list[Score] = field(default_factory=list)
    shown: list[Figure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Tasks that a set or an encoder has nothing for."""
    failures: list[str] = field(default_factory=list)
    """Tasks and sets that could not be evaluated, and why."""
    bad_rows: dict[str, dict[str, str]] = field(default_factory=dict)
    """By set, the reason of each image that could not be used."""
    seconds: dict[str, float] = field(default_factory=dict)
    pairs_digest: str | None = None
    """Of the test studies that films and reports were taken from."""

    def tests(self) -> dict[str, str]:
        """Digest of the test images of each set, and of the corpus's test studies."""
        digests = {images.name: images.digest("test") for images in self.sets}
        return {CORPUS: self.pairs_digest} | digests if self.pairs_digest else digests


def start_pair_tasks(found: Evaluation) -> dict[Any, str]:
    """References of what is measured on the corpus's films and reports together, with what each one is."""
    settings, started = found.settings, dict[Any, str]()
    images = next((each for each in found.sets if isinstance(each.source, PhantomSource)), None)
    wanted = [task for task in ON_PAIRS if task in settings.tasks]
    if images is None:
        unknown = [task for task in wanted if task != "retrieval"]
        found.left_out += [f"{task}: what sentences say is known of the phantom alone" for task in unknown]
        wanted = [task for task in wanted if task == "retrieval"]
    shared = ray.put(images)
    for encoder in found.encoders if wanted else []:
        if not encoder.has_reports:
            found.left_out.append(f"{', '.join(wanted)} by {encoder.name}: it reads no reports")
            continue
        own, method = list(wanted), encoder.run.method
        if not method.has_attention:
            own = [task for task in wanted if task not in ON_ATTENTION]
            found.left_out += [
                f"{task} by {encoder.name}: {encoder.config.method.name} attends to no patches"
                for task in wanted
                if task not in own
            ]
        if not own:
            continue
        pairs = embed.remote(encoder)
        try:  # one after the other: each needs a CPU beside those of its data
            digest = ray.get(studies_digest.remote(pairs))
        except Exception as error:
            found.failures.append(f"pairs by {encoder.name}: {cause(error)}")
            continue
        if found.pairs_digest not in (None, digest):
            found.left_out.append(f"{', '.join(wanted)} by {encoder.name}: its corpus has other test studies")
            continue
        found.pairs_digest = digest
        for task in own:
            started[on_pairs.remote(task, pairs, encoder, shared, settings)] = f"{task} by {encoder.name}"
    return started


def start_feature_tasks(found: Evaluation, images: ImageSet, cache: str) -> dict[Any, str]:
    """References of what is measured on films alone."""
    settings, started = found.settings, dict[Any, str]()
    if not images.classes:
        found.left_out.append(f"{images.name}: it has no labels for classification")
        return started
    probed = "classification" in settings.tasks and "frozen" in settings.encoder
    unknown = [name for name in images.classes if name not in found.prompts.get(images.kind, {})]
    prompted = "zeroshot" in settings.tasks and not unknown
    if "zeroshot" in settings.tasks and unknown:
        found.left_out.append(
            f"zeroshot of {images.name}: there are no prompts for {', '.join(unknown)} (evaluate.prompts)"
        )
    if not (probed or prompted):
        return started
    try:
        uris, bad = make_features(found.encoders, images, cache, settings)
    except Exception as error:
        found.failures.append(f"features of {images.name}: {cause(error)}")
        return started
    found.bad_rows[images.name] = bad
    shared = ray.put(images)
    for encoder, uri in zip(found.encoders, uris, strict=True):
        if probed:
            reference = classification.remote(uri, shared, encoder.name, settings)
            started[reference] = f"classification of {images.name} by {encoder.name}"
        if prompted and encoder.has_reports:
            reference = zeroshot.remote(uri, shared, encoder, found.prompts[images.kind], settings)
            started[reference] = f"zeroshot of {images.name} by {encoder.name}"
        elif prompted:
            found.left_out.append(f"zeroshot of {images.name} by {encoder.name}: it reads no reports")
    return started


def start_place_tasks(found: Evaluation, images: ImageSet, cache: str) -> dict[Any, str]:
    """References of what is measured by heads that say where findings lie."""
    settings, started, data = found.settings, dict[Any, str](), found.encoders[0].config.data
    shares = {
        "segmentation": settings.segmentation_fractions,
        "detection": settings.detection_fractions,
        "classification": settings.fractions,
    }
    classes = {"segmentation": images.mask_classes, "detection": images.box_classes, "classification": images.classes}
    asked = [task for task in ON_PLACES if task in settings.tasks]
    if "tuned" not in settings.encoder and "classification" in asked:
        asked.remove("classification")
    empty = {task: _empty_split(images, ON_PLACES[task]) for task in asked if classes[task]}
    found.left_out += [
        f"{task} of {images.name}: no image of its {split} split has {ON_PLACES[task]}"
        for task, split in empty.items()
        if split
    ]
    wanted = [task for task, split in empty.items() if not split]
    absent = [task for task in asked if not classes[task] and task != "classification"]
    found.left_out += [f"{task} of {images.name}: it has no {ON_PLACES[task]}" for task in absent]
    if not wanted:
        return started
    needed = pa.concat_tables([images.annotated(images.table, ON_PLACES[task]).select(["image_id"]) for task in wanted])
    images = replace(images, table=images.table.filter(pc.is_in(images.table["image_id"], needed["image_id"])))
    shared = ray.put(images)
    for side in dict.fromkeys(encoder.config.data.image_size for encoder in found.encoders):
        try:
            uri, bad = make_films(images, side, data.cpus_per_task, cache)
        except Exception as error:
            found.failures.append(f"films of {images.name}: {cause(error)}")
            continue
        found.bad_rows.setdefault(images.name, {}).update(bad)
        for encoder in (each for each in found.encoders if each.config.data.image_size == side):
            for task in wanted:
                modes = [mode for mode in settings.encoder if mode == "tuned" or task != "classification"]
                for share, mode in itertools.product(shares[task], modes):
                    reference = on_places.remote(task, uri, shared, encoder, share, mode == "tuned", settings)
                    started[reference] = (
                        f"{task} of {images.name} by {encoder.name}, {mode}, {percent(share)} of labels"
                    )
    return started


def _empty_split(images: ImageSet, what: AnnotationKind) -> str | None:
    """The first split in which nobody has looked for ``what`` on any image."""
    return next((split for split in SPLITS if not len(images.annotated(images.split(split), what))), None)


@dataclass(frozen=True)
class Measured:
    """What one task gives."""

    scores: list[Score]
    shown: list[Figure]
    seconds: float


@ray.remote(num_cpus=1)
def embed(encoder: EncoderSpec) -> Pairs:
    """The corpus's test split through an encoder's model."""
    return embed_pairs(encoder.load_model(), encoder.run, "test")


@ray.remote(num_cpus=0)
def studies_digest(pairs: Pairs) -> str:
    """Hash of the studies and films of ``pairs``, which stay where they are."""
    shown = [*pairs.study_N, *pairs.path_N]
    return hashlib.blake2b("\n".join(shown).encode(), digest_size=6).hexdigest()


@ray.remote(num_cpus=1)
def on_pairs(
    task: str, pairs: Pairs, encoder: EncoderSpec, images: ImageSet | None, settings: EvaluateConfig
) -> Measured:
    """One of ``ON_PAIRS``."""
    began, again, shown = time.perf_counter(), (settings.resamples, settings.seed), list[Figure]()
    name = images.name if images else CORPUS
    if task == "retrieval" or images is None:
        scores = retrieval_scores(pairs, encoder.name, name, *again, shown)
    elif task == "clusters":
        scores = cluster_scores(pairs, encoder.name, name, encoder.num_clusters, *again)
    else:
        scores = grounding_scores(pairs, images, encoder.config.data, encoder.name, *again, shown)
    return Measured(scores, shown, time.perf_counter() - began)


@ray.remote(num_cpus=1)
def classification(uri: str, images: ImageSet, encoder: str, settings: EvaluateConfig) -> Measured:
    """Linear probes on the features at ``uri``."""
    began, shown = time.perf_counter(), list[Figure]()
    scores = probe_scores(read_features(uri), images, encoder, settings, shown)
    return Measured(scores, shown, time.perf_counter() - began)


@ray.remote(num_cpus=1)
def zeroshot(uri: str, images: ImageSet, encoder: EncoderSpec, prompts: Prompts, settings: EvaluateConfig) -> Measured:
    """The prompts on the features at ``uri``."""
    began, model, shown = time.perf_counter(), encoder.load_model(), list[Figure]()
    scores = zeroshot_scores(model, encoder.run, read_features(uri), images, prompts, encoder.name, settings, shown)
    return Measured(scores, shown, time.perf_counter() - began)


@ray.remote(num_cpus=1)
def on_places(
    task: str, uri: str, images: ImageSet, encoder: EncoderSpec, share: float, tuned: bool, settings: EvaluateConfig
) -> Measured:
    """One of ``ON_PLACES``, on the films at ``uri``."""
    began, shown = time.perf_counter(), list[Figure]()
    torch.set_num_threads(1)
    side = encoder.config.data.image_size
    parts, groups = parts_of(uri, images, side, ON_PLACES[task], share, settings.seed)
    if task == "classification":
        scores = finetune_scores(encoder, images, parts, groups, share, settings)
    else:
        measured = segmentation_scores if task == "segmentation" else detection_scores
        scores = measured(encoder, images, parts, groups, share, tuned, settings, shown)
    return Measured(scores, shown, time.perf_counter() - began)


def parts_of(
    uri: str, images: ImageSet, side: int, what: AnnotationKind, share: float, seed: int
) -> tuple[dict[str, Films], list[str]]:
    """The films of each split on which somebody has looked for ``what``, of the training split a ``share`` of the groups; and
    the groups of the test films.

    Raises:
        UserError: a split without such a film.
    """
    usable, parts, groups = pa.array(film_ids(uri), pa.string()), dict[str, Films](), list[str]()
    for split in SPLITS:
        rows = images.annotated(images.split(split), what)
        rows = rows.filter(pc.is_in(rows["image_id"], usable))
        if not len(rows):
            raise UserError(f"{images.name}: no image of the {split} split has {what} and can be used")
        if split == "train":
            rows = rows.filter(pa.array(drawn_groups(rows["group"].to_pylist(), share, seed)))
        # in the set's order, as they lie in the file
        parts[split] = load_films(uri, images, side, rows["image_id"].to_pylist())
        groups = rows["group"].to_pylist()
    return parts, groups
