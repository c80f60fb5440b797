"""The space of a sweep: which settings its trials draw, and from where."""

import math
from collections.abc import Iterator
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from cmcgns.command_line import resolve
from cmcgns.config import Config
from cmcgns.errors import UserError

Space = dict[str, BaseDistribution]
"""Distribution of each drawn ``section.key``."""

FORMS = ("uniform", "log_uniform", "integer", "log_integer", "choice")
MOST_CLUSTERS, LEAST_CLUSTERS, SENTENCES_PER_CLUSTER = 1024, 16, 4
FIXED = (
    "train.num_workers", "train.cpus_per_worker", "train.use_gpu", "train.seed", "clustering.actors",
    "clustering.cpus_per_actor", "clustering.gpus_per_actor", "data.cpus_per_task", "data.seed",
    "train.validate_every",
)  # fmt: skip
"""What all trials share: what they hold of the cluster, the drawn splits, the rungs, and the seed, which repetitions change."""
LEARNT = {"objective.temperature": "objective.learn_temperature"}
"""Settings that count only where another one is false."""


def default_space(sentences: int) -> dict[str, Any]:
    """What is drawn where nothing else is asked for, as a user would write it, for a corpus of ``sentences``."""
    most = max(min(MOST_CLUSTERS, sentences // SENTENCES_PER_CLUSTER), LEAST_CLUSTERS)
    powers = [2**power for power in range(int(math.log2(LEAST_CLUSTERS)), int(math.log2(most)) + 1)]
    return {
        "objective.mask_ratio": {"uniform": [0.25, 0.85]},
        "objective.num_clusters": {"choice": powers},
        "objective.temperature": {"log_uniform": [0.02, 0.5]},
        "objective.sentence_temperature": {"log_uniform": [0.02, 0.5]},
    }


def read_space(written: dict[str, Any], base: Config) -> Space:
    """The space that ``written`` describes: ``{section.key: {form: values}}``; every value must suit ``base``.

    Raises:
        UserError: an unknown key or form, an empty range, a value that the setting refuses.
    """
    if not written:
        raise UserError("sweep.space is empty; name a setting, such as objective.mask_ratio: {uniform: [0.25, 0.85]}")
    space = {}
    for key, form in written.items():
        if key in FIXED or key.startswith("run."):
            raise UserError(f"sweep.space {key}: it is the same for all trials; set it beside the space")
        if not isinstance(form, dict) or len(form) != 1 or next(iter(form)) not in FORMS:
            raise UserError(
                f"sweep.space {key}: {form!r} is no range; write one of {', '.join(FORMS)} and its values, such as "
                "{uniform: [0.25, 0.85]} or {choice: [16, 32]}"
            )
        ((name, values),) = form.items()
        space[key] = _distribution(key, name, values)
        for value in _samples(space[key]):
            drawn_settings(base, {key: value})
    return space


def drawn_settings(base: Config, drawn: dict[str, Any]) -> Config:
    """``base`` with what a trial has drawn."""
    fixed = {other: False for key, other in LEARNT.items() if key in drawn}
    return resolve(base.model_dump(mode="json"), fixed | drawn, Config)


def _distribution(key: str, form: str, values: Any) -> BaseDistribution:
    if not isinstance(values, list) or not values:
        raise UserError(f"sweep.space {key}: {form} needs a list of values, not {values!r}")
    if form == "choice":
        if not all(isinstance(value, (str, int, float)) for value in values):
            raise UserError(f"sweep.space {key}: choice takes numbers, words, true and false, not {values!r}")
        return CategoricalDistribution(values)
    kind = int if form.endswith("integer") else (int, float)
    if len(values) != 2 or not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
        raise UserError(f"sweep.space {key}: {form} needs two {'whole ' * (kind is int)}numbers, not {values!r}")
    low, high = values
    if low >= high:
        raise UserError(f"sweep.space {key}: {form} from {low} to {high} is empty; write the smaller number first")
    log = form.startswith("log_")
    if log and low <= 0:
        raise UserError(f"sweep.space {key}: {form} from {low} has no logarithm; begin above 0")
    return IntDistribution(low, high, log) if kind is int else FloatDistribution(low, high, log)


def _samples(distribution: BaseDistribution) -> Iterator[Any]:
    """Values that show whether the setting takes what may be drawn: all choices; both ends of a range and what no whole
    number would be."""
    if isinstance(distribution, CategoricalDistribution):
        yield from distribution.choices
    elif isinstance(distribution, (IntDistribution, FloatDistribution)):
        yield from (distribution.low, distribution.high)
        if isinstance(distribution, FloatDistribution):
            yield distribution.low + (distribution.high - distribution.low) / math.e
