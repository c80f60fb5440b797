"""``siim``: relative runs against a slow, obvious loop; several rows of one image; both kinds of -1."""

from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cmcgns.data.labelled import open_set
from cmcgns.data.labelled.located import decode_relative_rle
from cmcgns.errors import UserError
from tests.data.labelled.trees import SIDE, Shot, rows, save, shots, splits, write

ZOOM = 1024 // SIDE
TOP, LEFT = 3, 2  # lines of the phantom that are set to black
CHOSEN = slice(0, 10)


def encoded(mask_HW: NDArray[np.bool_]) -> str:
    """The pixels from one change to the next, down the columns: a gap, a run, a gap, a run."""
    changes = np.flatnonzero(np.diff(mask_HW.T.ravel(), prepend=False, append=False))
    return " ".join(map(str, np.diff(changes, prepend=0)))


def decoded(text: str, height: int, width: int) -> NDArray[np.bool_]:
    """Like the code of the competition, number by number."""
    mask = np.zeros(height * width, bool)
    numbers = [int(word) for word in text.split()]
    place = 0
    for gap, run in zip(numbers[::2], numbers[1::2], strict=True):
        place += gap
        for pixel in range(place, place + run):
            mask[pixel] = True
        place += run
    return mask.reshape(width, height).T


def torn_mask(shot: Shot) -> NDArray[np.bool_]:
    """The mask of the pneumothorax; effusions count too, so that more films have one."""
    mask_HW = shot.mask("pneumothorax", "effusion")
    mask_HW[:TOP] = mask_HW[:, :LEFT] = False
    return mask_HW


def tree(folder: Path, zoom: int = ZOOM) -> None:
    lines, negative = ["ImageId, EncodedPixels"], cycle([",-1", ", -1"])
    for i, shot in enumerate(shots()[CHOSEN]):
        scan_HW = shot.grey_HW.copy()
        scan_HW[:TOP] = scan_HW[:, :LEFT] = 0
        save(np.kron(scan_HW, np.ones((zoom, zoom), np.uint8)), folder / f"dicom-images-train/{i}.{i}/1.2.{i}.4.png")
        mask_HW = np.kron(torn_mask(shot), np.ones((ZOOM, ZOOM), bool))
        halves = (np.arange(1024) % 100 < 50) | (i % 2 == 0)  # stripes in two rows, or all in one
        parts = [part for part in (mask_HW & halves, mask_HW & ~halves) if part.any()]
        lines += [f"1.2.{i}.4, {encoded(part)}" for part in parts] or [f"1.2.{i}.4{next(negative)}"]
    assert any(line.endswith(",-1") for line in lines)
    assert any(line.endswith(", -1") for line in lines)
    write(folder / "train-rle.csv", lines)


@pytest.mark.parametrize("zoom", [ZOOM, 4], ids=["official size", "shrunk to 256"])
def test_the_rows_of_an_image_are_one_mask_on_its_film(tmp_path: Path, zoom: int) -> None:
    tree(tmp_path, zoom)
    images = open_set("siim", str(tmp_path))
    found = rows(images)
    assert list(found) == [f"1.2.{i}.4" for i in range(len(shots()[CHOSEN]))]
    assert max(len(row["masks"]) for row in found.values()) == 2
    assert min(len(row["masks"]) for row in found.values()) == 0
    for row, shot in zip(found.values(), shots()[CHOSEN], strict=True):
        film = images.source.reader([]).read_image(row["path"])
        assert film.frame == (LEFT * zoom, TOP * zoom, SIDE * zoom, SIDE * zoom)
        truth = np.kron(torn_mask(shot)[TOP:, LEFT:], np.ones((zoom, zoom), bool))
        assert (images.annotations(row, film).mask_KHW == truth).all()
        assert row["labels"] == [float(truth.any())]


def as_second_stage(folder: Path) -> None:
    """Rename the table and the films of ``tree``."""
    table = (folder / "train-rle.csv").read_text()
    (folder / "train-rle.csv").unlink()
    write(folder / "stage_2_train.csv", table.replace(", ", ",").splitlines())
    (folder / "dicom-images-train").rename(folder / "stage_2_images")


def test_the_table_of_the_second_stage_is_read_like_that_of_the_first(tmp_path: Path) -> None:
    tree(tmp_path)
    first = open_set("siim", str(tmp_path))
    as_second_stage(tmp_path)
    second = open_set("siim", str(tmp_path))
    assert second.table.drop_columns(["path"]) == first.table.drop_columns(["path"])


def test_images_are_split_by_image(tmp_path: Path) -> None:
    tree(tmp_path)
    splits(open_set("siim", str(tmp_path), seed=1))


@pytest.mark.parametrize("seed", range(5))
def test_relative_runs_match_a_slow_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2)
    mask_HW = rng.random((height, width)) < rng.random()
    mask_HW.flat[rng.integers(mask_HW.size)] = True
    text = encoded(mask_HW)
    assert (decoded(text, height, width) == mask_HW).all()
    assert (decode_relative_rle(text, height, width) == mask_HW).all()


def test_a_run_may_start_at_the_first_pixel_and_end_at_the_last() -> None:
    assert decode_relative_rle(" 0 6 ", 2, 3).all()
    assert decode_relative_rle("2 1 2 1", 2, 3).tolist() == [[False, True, False], [False, False, True]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3", "1 numbers, not pairs"),
        ("", "0 numbers, not pairs"),
        ("0 5 -2 1", "exceeds the mask"),
        ("0 5 1 1", "exceeds the mask"),
        ("9 9223372036854775807", "exceeds the mask"),
        ("0 99999999999999999999", "not integers"),
        ("1 2.5", "not integers"),
        ("one 2", "not integers"),
    ],
)
def test_errors_of_run_lengths_name_the_image(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        decode_relative_rle(text, 2, 3)
    write(tmp_path / "train-rle.csv", ["ImageId, EncodedPixels", "a, -1", f"1.2.b,{text.replace('1 1', '1 2000000')}"])
    with pytest.raises(UserError, match=r"train-rle.csv: image 1.2.b: its encoding"):
        open_set("siim", str(tmp_path))
