"""An ablation: variants of one pretraining, each with several seeds, side by side with intervals over studies and seeds."""

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from cmcgns.command_line import read_yaml, resolve
from cmcgns.config import Config, Section
from cmcgns.data import storage
from cmcgns.errors import UserError
from cmcgns.evaluate.scores import Difference, Score, over_draws
from cmcgns.run_folder import RunFolder

RUNS = "runs"
CORPUS = ("uri", "format", "views", "seed", "phantom_studies", "phantom_size")
"""Settings of `data` that decide which studies are tested, and what their films show."""


@dataclass(frozen=True)
class Ablation:
    """What is compared: settings by variant, in the order in which each one adds to the one before it."""

    variants: dict[str, Config]
    seeds: tuple[int, ...]

    def config(self, folder: RunFolder, variant: str, seed: int) -> Config:
        """The settings of one run, resumed where it has begun."""
        config, name = self.variants[variant], run_name(variant, seed)
        runs = storage.join(folder.uri, RUNS)
        there = storage.exists(storage.join(runs, f"{name}/config.yaml"))
        own = {"train.seed": seed, "run.storage": runs, f"run.{'resume' if there else 'name'}": name}
        return resolve(config.model_dump(mode="json"), own, Config)


def run_name(variant: str, seed: int) -> str:
    """Name of a run's folder."""
    return f"{re.sub(r'[^a-z0-9]+', '-', variant.lower()).strip('-')}-{seed}"


class Written(Section):
    """The file of an ablation."""

    base: str | None = None
    """Config of all variants, beside the file."""
    seeds: tuple[int, ...] = Field(min_length=1)
    variants: dict[str, dict[str, Any] | None] = Field(min_length=2)
    """Settings of each variant beside the base's."""


def read_ablation(path: str) -> Ablation:
    """The ablation that a YAML file describes, see ``Written``.

    Raises:
        UserError: a file that is laid out otherwise, or a setting that is refused; the variant is named.
    """
    try:
        written = Written.model_validate(read_yaml(path, "evaluate.ablation"))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"evaluate.ablation {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; write base, seeds and variants as "
            "jobs/ablation.yaml does"
        ) from None
    beside = path.rpartition("/")[0] or "."
    base = read_yaml(storage.join(beside, written.base), "evaluate.ablation base") if written.base else {}
    configs = {}
    for name, settings in written.variants.items():
        try:
            configs[name] = resolve(copy.deepcopy(base), dict(settings or {}), Config)
        except UserError as error:
            raise UserError(f"evaluate.ablation {path}: variant {name}: {error}") from None
    complaint = _complaint(configs, written.seeds)
    if complaint:
        raise UserError(f"evaluate.ablation {path}: {complaint}")
    return Ablation(configs, written.seeds)


def _complaint(configs: dict[str, Config], seeds: tuple[int, ...]) -> str | None:
    """Why the variants cannot be compared."""
    if len(set(seeds)) < len(seeds):
        return f"seeds {', '.join(map(str, seeds))}: one is there twice"
    odd = [key for key in CORPUS if len({str(getattr(config.data, key)) for config in configs.values()}) > 1]
    if odd:
        return f"data.{odd[0]} differs between variants; all need the same test studies"
    if len({run_name(name, seeds[0]) for name in configs}) < len(configs):
        return "two variants would have the same folder; their names need other letters"
    return None


def over_seeds(scores: Sequence[Score], variants: dict[str, list[str]]) -> list[Score]:
    """A score for each variant and number: the mean over the runs (``variants`` names each one's encoders), its resamples over
    test studies and over seeds."""
    found = []
    for key in dict.fromkeys(score.key for score in scores):
        for variant, encoders in variants.items():
            own = [score for score in scores if score.key == key and score.encoder in encoders]
            if own and all(score.resampled_R is not None for score in own):
                value, resampled = over_draws([score.value for score in own], [_resamples(score) for score in own])
                found.append(replace(own[0], encoder=variant, value=value, resampled_R=resampled, note=_spread(own)))
    return found


def _resamples(score: Score) -> Any:
    assert score.resampled_R is not None
    return score.resampled_R


def _spread(own: Sequence[Score]) -> str:
    values = [score.value for score in own]
    return f"{len(values)} seeds, standard deviation {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""


def increments(scores: Sequence[Score], variants: Sequence[str]) -> list[Difference]:
    """Each variant against the one before it, number by number."""
    by_name = {(score.encoder, score.key): score for score in scores}
    return [
        Difference(by_name[after, key], by_name[before, key])
        for key in dict.fromkeys(score.key for score in scores)
        for before, after in itertools.pairwise(variants)
        if (after, key) in by_name and (before, key) in by_name
    ]
