"""Grounding: whether sentences attend to the location of their finding, which is known for the phantom.

N studies, n sentences, P patches.
"""

import numpy as np
from numpy.typing import NDArray

from cmcgns.config import DataConfig
from cmcgns.data.labelled.base import ImageSet
from cmcgns.errors import UserError
from cmcgns.evaluate.base import Inputs, Task
from cmcgns.evaluate.figures import SAMPLES, Figure, attention
from cmcgns.evaluate.films import center_crop, patch_coverage, resize_masks
from cmcgns.evaluate.pairs import Pairs
from cmcgns.evaluate.scores import Resampling, Score
from cmcgns.evaluate.sentence_truth import sentence_truth
from cmcgns.phantom.findings import FINDINGS

Floats = NDArray[np.float64]


def grounding_scores(
    pairs: Pairs, images: ImageSet, data: DataConfig, encoder: str, resamples: int, seed: int,
    shown: list[Figure] | None = None,
) -> list[Score]:  # fmt: skip
    """Pointing game and contrast-to-noise ratio over the sentences that state a finding, with intervals over patients.

    A sentence is a hit if the patch with its highest weight touches the finding (the pointing game, Zhang et al. 2016, with half
    a patch of tolerance). Contrast to noise is (mean inside - mean outside) / sqrt(sum of both variances), as for MS-CXR
    (Boecking et al. 2022), but signed. Appends some sentences with their attention to ``shown``.
    """
    stated = [
        (i, truth.finding) for i, truth in enumerate(map(sentence_truth, pairs.text_n)) if truth and not truth.negated
    ]
    covered_NKP = patch_truth(pairs, images, data, {pairs.study_of_n[i] for i, _ in stated})
    hits, contrasts, chances, groups, kept = [], [], [], [], list[tuple[int, Floats]]()
    for i, finding in stated:
        study = pairs.study_of_n[i]
        covered_P = covered_NKP[study][FINDINGS.index(finding)] if finding in FINDINGS else np.zeros(1)
        if not covered_P.any():
            continue  # outside the crop, or a finding that this film does not show
        weight_P = pairs.weight_nP[i].astype(np.float64)
        hits.append(float(covered_P[weight_P.argmax()] > 0))
        chances.append(float((covered_P > 0).mean()))
        contrasts.append(contrast_to_noise(weight_P, covered_P))
        groups.append(pairs.group_N[study])
        kept.append((i, covered_P))
    if not hits:
        raise UserError(f"{images.name}: no sentence of the split names a finding that its film shows")
    if shown is not None:
        shown.append(_looks(pairs, kept, f"{encoder}: where sentences of {images.name} look"))
    resampling, number = Resampling.of(groups, resamples, seed), len(hits)
    scores = []
    for metric, values in (("pointing game", hits), ("contrast to noise", contrasts)):
        value_n = np.array(values)
        note = f"by chance {np.mean(chances):.3f}" if metric == "pointing game" else ""
        scores.append(
            Score(
                "grounding",
                images.name,
                "sentences with a finding",
                metric,
                encoder,
                float(np.nanmean(value_n)),
                number,
                resampling.mean(value_n),
                note,
            )
        )
    return scores


def _looks(pairs: Pairs, kept: list[tuple[int, Floats]], title: str) -> Figure:
    """Figure of some sentences, one per film, with their attention."""
    first = {pairs.study_of_n[i]: (i, covered_P) for i, covered_P in reversed(kept)}
    some = [first[study] for study in sorted(first) if study < len(pairs.film_MHW)][:SAMPLES]
    indices = [i for i, _ in some]
    films, truth = pairs.film_MHW[pairs.study_of_n[indices]], np.array([covered_P for _, covered_P in some])
    return attention(title, films, pairs.weight_nP[indices], truth, list(pairs.text_n[indices]))


def patch_truth(pairs: Pairs, images: ImageSet, data: DataConfig, studies: set[int]) -> dict[int, Floats]:
    """Fraction of each patch that each finding covers on the embedded film, (K, P), by study."""
    grid = int(pairs.weight_nP.shape[1] ** 0.5)
    reader, covered = images.source.reader([]), {}
    for study in studies:
        path = pairs.path_N[study]
        film = reader.read_image(path)
        annotations = images.annotations({"path": path, "boxes": None, "masks": None}, film)
        covered[study] = patch_coverage(
            center_crop(resize_masks(annotations.mask_KHW, data.resize), data.image_size), grid
        )
    return covered


def contrast_to_noise(weight_P: Floats, covered_P: Floats) -> float:
    """(mean inside - mean outside) / sqrt(variance inside + variance outside), patches weighted by coverage; NaN if one
    side is empty or the variance is zero."""
    inside, outside = covered_P.sum(), (1 - covered_P).sum()
    if not inside or not outside:
        return float("nan")
    mean_in, mean_out = (weight_P @ covered_P) / inside, (weight_P @ (1 - covered_P)) / outside
    spread = ((weight_P - mean_in) ** 2 @ covered_P) / inside + ((weight_P - mean_out) ** 2 @ (1 - covered_P)) / outside
    # the mean of equal weights can differ in the last bit: a spread below float32 precision counts as zero
    least = (1e-9 * np.abs(weight_P).max()) ** 2
    return float((mean_in - mean_out) / np.sqrt(spread)) if spread > least else float("nan")


class Grounding(Task):
    """Whether sentences attend to the patches that show their finding."""

    reads = "pairs"
    needs_attention = True
    needs_truth = True

    def scores(self, inputs: Inputs) -> list[Score]:
        assert inputs.pairs is not None
        assert inputs.images is not None
        own, encoder = inputs.settings, inputs.encoder
        return grounding_scores(
            inputs.pairs, inputs.images, encoder.config.data, encoder.name, own.resamples, own.seed, inputs.shown
        )


TASK = Grounding()
