"""Zero-shot classification: compares a film with sentences that state a finding and sentences that negate it.

N films, K classes, D embedding.
"""

import numpy as np
import yaml

from cmcgns import storage
from cmcgns.data.labelled.base import ImageSet
from cmcgns.errors import UserError
from cmcgns.evaluate.base import Inputs, Task
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.features import Features
from cmcgns.evaluate.figures import Figure, curves
from cmcgns.evaluate.scores import Resampling, Score
from cmcgns.evaluate.tasks.classification import accuracy_scores, auc_scores, labels_of
from cmcgns.library.runs import PretrainedRun
from cmcgns.library.texts import Prompts, built_in_prompts, check_prompts, class_score
from cmcgns.models.device import autocast
from cmcgns.models.dual_encoder import DualEncoder

LAYOUT = "{set: {class: {present: [...], absent: [...]}}}"


def read_prompts(settings: EvaluateConfig) -> dict[str, Prompts]:
    """Prompts by set, built in or from ``evaluate.prompts``.

    Raises:
        UserError: the file cannot be read or has another layout.
    """
    if settings.prompts is None:
        return built_in_prompts()
    data = storage.read_bytes(storage.absolute("evaluate.prompts", settings.prompts))
    try:
        prompts = yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise UserError(f"evaluate.prompts {settings.prompts} is not YAML: {str(error).splitlines()[0]}") from None
    for of_set in (prompts if isinstance(prompts, dict) else {None: None}).values():
        check_prompts(f"evaluate.prompts {settings.prompts}", of_set, LAYOUT)
    return dict(prompts)


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
        [class_score(model, run.tokenizer, test_features.shared_ND, prompts[name]) for name in images.classes], axis=1
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


class ZeroShot(Task):
    """Classification by prompts, without labels."""

    reads = "features"
    needs_reports = True
    uses_gpu = True

    def missing(self, images: ImageSet, prompts: Prompts) -> str | None:
        unknown = [name for name in images.classes if name not in prompts]
        return f"there are no prompts for {', '.join(unknown)} (evaluate.prompts)" if unknown else None

    def scores(self, inputs: Inputs) -> list[Score]:
        assert inputs.features is not None
        assert inputs.images is not None
        assert inputs.prompts is not None
        encoder, images, prompts, own = inputs.encoder, inputs.images, inputs.prompts, inputs.settings
        model = encoder.load_model().to(inputs.device)
        with autocast(inputs.device, own.precision):
            return zeroshot_scores(
                model, encoder.run, inputs.features, images, prompts, encoder.name, own, inputs.shown
            )


TASK = ZeroShot()
