"""Small encoders, and films with bright and black rectangles that a head learns in seconds."""

from dataclasses import dataclass

import numpy as np

from cmcgns.data.labelled import ImageSet
from cmcgns.data.labelled.base import image_table
from cmcgns.data.readers import PhantomSource
from cmcgns.evaluate.encoders import RANDOM, EncoderSpec
from cmcgns.evaluate.films import Films
from cmcgns.library.film_encoder import FilmEncoder
from cmcgns.library.runs import PretrainedRun
from tests.small import small_config

KINDS = ("bright", "black")
GREY = (240, 5)
BLANK = 128
"""Side in pixels of films whose content does not matter."""
SET = ImageSet(
    "rectangles", PhantomSource(1, 0, 8, 8), image_table([]), "as given", box_classes=KINDS, mask_classes=KINDS
)


def small_spec(name: str = "resnet-tiny", size: int = 64, resize: int = 72, seed: int = 0) -> EncoderSpec:
    """An encoder without a run; its weights depend on ``seed``."""
    config = small_config(model__image_encoder=name, data__image_size=size, data__resize=resize)
    return EncoderSpec(f"{name} {seed}", PretrainedRun("nowhere", config, None), RANDOM, seed=seed)


@dataclass(frozen=True)
class Kept(EncoderSpec):
    """An encoder that stays loaded, so that a test can see what a task has done to it."""

    opened: FilmEncoder | None = None

    @classmethod
    def of(cls, spec: EncoderSpec) -> "Kept":
        return cls(spec.name, spec.run, spec.kind, spec.folder, spec.seed, spec.load())

    def load(self) -> FilmEncoder:
        assert self.opened is not None
        return self.opened


def rectangles(number: int, side: int = 64, seed: int = 0, empty: int = 0) -> Films:
    """Grey noise with one rectangle of each kind per film; the last ``empty`` films have none."""
    random = np.random.default_rng(seed)
    film_NRR = random.integers(90, 130, (number, side, side)).astype(np.uint8)
    mask_N2RR = np.zeros((number, 2, side, side), bool)
    boxes, half = [], side // 2
    for i in range(number - empty):
        found, left_first = [], int(random.integers(2))
        for kind in range(2):
            width, height = random.integers(side // 4, half - 2, 2)
            x0 = int(random.integers(1, half - width)) + half * (kind ^ left_first)
            y0 = int(random.integers(1, side - height))
            mask_N2RR[i, kind, y0 : y0 + height, x0 : x0 + width] = True
            film_NRR[i][mask_N2RR[i, kind]] = GREY[kind]
            found.append([x0, y0, x0 + width, y0 + height])
        boxes.append(np.array(found, np.float64))
    boxes += [np.zeros((0, 4))] * empty
    kinds = [np.arange(len(each), dtype=np.int32) for each in boxes]
    return Films([f"film {i}" for i in range(number)], film_NRR, mask_N2RR, kinds, boxes)


def joined(*parts: Films) -> Films:
    """All films of ``parts``."""
    return Films(
        [image_id for part in parts for image_id in part.image_ids],
        np.concatenate([part.film_NRR for part in parts]),
        np.concatenate([part.mask_NKRR for part in parts]),
        [kinds for part in parts for kinds in part.kinds],
        [boxes for part in parts for boxes in part.boxes],
    )


def films_with(boxes: list[np.ndarray], kinds: list[np.ndarray]) -> Films:
    """Films whose content does not matter."""
    number = len(boxes)
    blank = np.zeros((number, BLANK, BLANK), np.uint8)
    return Films([str(i) for i in range(number)], blank, np.zeros((number, 0, BLANK, BLANK), bool), kinds, boxes)
