"""``object-cxr``: rectangles, ellipses and polygons become the boxes around them."""

from pathlib import Path

import pytest

from cmcgns.data.labelled import open_set
from tests.data.labelled.trees import LEFT, TOP, Shot, rows, save, seen, shots, splits, write


def annotation(shot: Shot) -> str:
    """The devices of a film, each with another shape."""
    parts = []
    for k, (x0, y0, x1, y1) in enumerate(shot.boxes("device")):
        x0, y0, x1, y1 = x0 + LEFT, y0 + TOP, x1 + LEFT, y1 + TOP
        middle_x, middle_y = (x0 + x1) / 2, (y0 + y1) / 2
        parts.append(
            (
                f"0 {x0} {y0} {x1} {y1}",
                f"2 {middle_x} {y0} {x1} {middle_y} {middle_x} {y1} {x0} {middle_y}",
                f"1 {x1} {y1} {x0} {y0}",
            )[k % 3]
        )
    return ";".join(parts)


@pytest.mark.parametrize("column", ["image_name", "image_path"])
@pytest.mark.parametrize("flat", [False, True])
def test_every_object_has_its_box(tmp_path: Path, column: str, flat: bool) -> None:
    lines = {"train": [f"{column},annotation"], "dev": [f"{column},annotation"]}
    for i, shot in enumerate(shots()):
        part = "train" if i < 24 else "dev"
        lines[part].append(f"{i:05d}.jpg,{annotation(shot)}")
        # a PNG inside, so that its border is exactly black
        save(shot.scan_HW, tmp_path / ("" if flat else part) / f"{i:05d}.jpg", "PNG")
    for part, each in lines.items():
        write(tmp_path / f"{part}.csv", each)
    objects = ";".join(annotation(shot) for shot in shots())
    assert {text.split()[0] for text in objects.split(";") if text} == {"0", "1", "2"}
    images = open_set("object-cxr", str(tmp_path))
    for row, shot in zip(rows(images).values(), shots(), strict=True):
        boxes, mask_KHW = seen(images, row)
        assert [corners for _, corners in boxes] == shot.boxes("device")
        assert row["labels"] == [float(bool(boxes))]
        assert row["boxes"] is not None
        assert not len(mask_KHW)
    assert splits(images)["test"] == {f"{i:05d}.jpg" for i in range(24, 30)}
