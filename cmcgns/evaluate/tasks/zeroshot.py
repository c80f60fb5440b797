"""Zero-shot classification: compares a film with sentences that state a finding and sentences that negate it.

N films, K classes, D embedding.
"""

from importlib import resources
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from cmcgns import storage
from cmcgns.data.batch import pad_reports
from cmcgns.data.labelled.base import ImageSet
from cmcgns.data.reports import normalised_words
from cmcgns.errors import UserError
from cmcgns.evaluate.base import Inputs, Prompts, Task
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.encoders import PretrainedRun
from cmcgns.evaluate.features import Features
from cmcgns.evaluate.figures import Figure, curves
from cmcgns.evaluate.scores import Resampling, Score
from cmcgns.evaluate.tasks.classification import accuracy_scores, auc_scores, labels_of
from cmcgns.models.dual_encoder import DualEncoder


def read_prompts(settings: EvaluateConfig) -> dict[str, Prompts]:
    """Prompts by set, built in or from ``evaluate.prompts``.

    Raises:
        UserError: the file cannot be read or has another layout.
    """
    if settings.prompts is None:
        data = (resources.files("cmcgns.evaluate") / "prompts.yaml").read_bytes()
    else:
        data = storage.read_bytes(storage.absolute("evaluate.prompts", settings.prompts))
    try:
        prompts = yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise UserError(f"evaluate.prompts {settings.prompts} is not YAML: {str(error).splitlines()[0]}") from None
    for of_set in (prompts if isinstance(prompts, dict) else {None: None}).values():
        for name, sides in (of_set if isinstance(of_set, dict) else {"?": None}).items():
            if not _are_prompts(sides):
                raise UserError(
                    f"evaluate.prompts {settings.prompts}: {name} needs sentences under `present`, optionally `absent`; write "
                    "{set: {class: {present: [...], absent: [...]}}}"
                )
    return dict(prompts)


def _are_prompts(sides: Any) -> bool:
    are_sentences = lambda side: isinstance(side, list) and all(isinstance(text, str) for text in side)
    known = isinstance(sides, dict) and sides.keys() <= {"present", "absent"}
    return bool(known and sides.get("present") and all(map(are_sentences, sides.values())))


@torch.inference_mode()
def embed_sentences(model: DualEncoder, run: PretrainedRun, texts: list[str]) -> NDArray[np.float64]:
    """Embedding of each text as a separate report, rows of length 1, (texts, D)."""
    encoded = [run.tokenizer.encode([" ".join(normalised_words(text))]) for text in texts]
    counts = np.array([each.sentences for each in encoded])
    reports = pad_reports(
        [each.tokens_T for each in encoded],
        [each.sentence_of_token_T for each in encoded],
        counts,
        run.tokenizer.pad_id,
    )
    _, report_BD = model.text_encoder(
        reports.token_BT, reports.token_mask_BT, reports.sentence_of_token_BT, reports.sentence_mask_BS
    )
    return np.asarray(report_BD.float().numpy(), np.float64)


def zeroshot_scores(
    model: DualEncoder,
    run: PretrainedRun,
    features: Features,
    images: ImageSet,
    prompts: Prompts,
    encoder: str,
    settings: EvaluateConfig,
    shown: list[Figure] | None = None,
) -> list[Score]:
    """AUC of each class and their mean, or accuracy, on the test images, without training labels.

    The score of a class is the film's mean similarity to its ``present`` sentences minus that to its ``absent`` ones. Appends the
    curves to ``shown``.
    """
    rows = images.split("test")
    indices, test_features = features.of(rows["image_id"].to_pylist())
    if test_features.shared_ND is None:
        raise UserError(f"{encoder} has no text encoder, so it cannot read prompts")
    score_NK = np.stack(
        [_class_score(model, run, test_features.shared_ND, prompts[name]) for name in images.classes], axis=1
    )
    label_NK, groups = labels_of(rows.take(indices)), rows.take(indices)["group"].to_pylist()
    if shown is not None:
        shown.append(curves(f"{encoder}: prompts on {images.name}", score_NK, label_NK, images.classes))
    resampling = Resampling.of(groups, settings.resamples, settings.seed)
    table = (accuracy_scores if images.exclusive else auc_scores)([score_NK], images, label_NK, resampling)
    return [
        Score("zeroshot", images.name, "no labels", metric, encoder, value, len(indices), resampled, note)
        for metric, value, resampled, note in table
    ]


def _class_score(
    model: DualEncoder, run: PretrainedRun, image_ND: Any, sides: dict[str, list[str]]
) -> NDArray[np.float64]:
    present_D = embed_sentences(model, run, sides["present"]).mean(0)
    absent_D = embed_sentences(model, run, sides["absent"]).mean(0) if sides.get("absent") else 0.0
    return np.asarray(image_ND @ (present_D - absent_D), np.float64)


class ZeroShot(Task):
    """Classification by prompts, without labels."""

    reads = "features"
    needs_reports = True

    def missing(self, images: ImageSet, prompts: Prompts) -> str | None:
        unknown = [name for name in images.classes if name not in prompts]
        return f"there are no prompts for {', '.join(unknown)} (evaluate.prompts)" if unknown else None

    def scores(self, inputs: Inputs) -> list[Score]:
        assert inputs.features is not None
        assert inputs.images is not None
        assert inputs.prompts is not None
        encoder, images, prompts, own = inputs.encoder, inputs.images, inputs.prompts, inputs.settings
        model = encoder.load_model()
        return zeroshot_scores(model, encoder.run, inputs.features, images, prompts, encoder.name, own, inputs.shown)


TASK = ZeroShot()
