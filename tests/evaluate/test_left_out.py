"""Tasks without labels: splits that are not annotated, and test films without findings."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cmcgns.data.labelled.base import ImageSet, image_table
from cmcgns.errors import UserError
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.films import Films
from cmcgns.evaluate.tasks import _empty_split
from cmcgns.evaluate.tasks.detection import detection_scores

ANYWHERE: Any = SimpleNamespace(uri="nowhere")
BOX = [{"kind": 0, "x0": 1.0, "y0": 1.0, "x1": 5.0, "y1": 5.0}]


def boxed(**boxes: Any) -> ImageSet:
    """One image per split, with the given boxes."""
    rows = [
        {"image_id": split, "path": "", "group": split, "split": split, "boxes": found}
        for split, found in boxes.items()
    ]
    return ImageSet("boxed", ANYWHERE, image_table(rows), "by name", box_classes=("mass",))


def test_a_split_in_which_nobody_has_looked_is_named_and_one_with_nothing_on_it_is_none() -> None:
    assert _empty_split(boxed(train=None, valid=None, test=BOX), "boxes") == "train"
    assert _empty_split(boxed(train=BOX, valid=None, test=BOX), "boxes") == "valid"
    assert _empty_split(boxed(train=BOX, valid=[], test=BOX), "boxes") is None


def test_detection_without_a_box_on_any_test_film_is_refused() -> None:
    nothing = Films(["test"], np.zeros((1, 32, 32), np.uint8), np.zeros((1, 0, 32, 32), bool), [np.zeros(0, np.int32)],
                    [np.zeros((0, 4))])  # fmt: skip
    unused: Any = None
    with pytest.raises(UserError, match="boxed: no test film has any of mass"):
        detection_scores(unused, boxed(test=[]), {"test": nothing}, ["test"], 1.0, False, EvaluateConfig(run="unused"))
